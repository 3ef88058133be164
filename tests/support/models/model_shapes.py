"""Tiny transformers models of several kinds, and functions that compare them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from distattn.models.build import materialise, meta_model

# token ids of one row; the models' windows are shorter than the row
IDS = torch.arange(40)[None] % 64
_SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_MAKE = {
    "llama": lambda: LlamaConfig(**_SMALL),
    "llama-tied": lambda: LlamaConfig(**_SMALL | {"pad_token_id": 3}, tie_word_embeddings=True),
    "llama3-rope": lambda: LlamaConfig(**_SMALL, rope_parameters=_LLAMA3),
    "yarn": lambda: LlamaConfig(**_SMALL, rope_parameters=_YARN),
    "qwen3": lambda: Qwen3Config(**_SMALL, head_dim=16),
    "mistral": lambda: MistralConfig(**_SMALL, sliding_window=7),
    "gemma": lambda: Gemma2Config(**_SMALL, head_dim=8, sliding_window=7),
    "gemma3": lambda: Gemma3TextConfig(**_SMALL, head_dim=8, sliding_window=7),
    "gpt-oss": lambda: GptOssConfig(**_SMALL, head_dim=8, num_local_experts=4, sliding_window=7),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **_SMALL, head_dim=8, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "mixtral": lambda: MixtralConfig(**_SMALL),
    "gpt2": lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None),
}
NAMES = tuple(_MAKE)


def config(name: str) -> PretrainedConfig:
    """Return a new configuration for the model kind `name`."""
    return _MAKE[name]()


def materialised(name: str) -> PreTrainedModel:
    """Return the full model of the kind `name`, with the initial weights of seed 1."""
    model = meta_model(config(name))
    materialise(model, 1)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Compute the logits of `IDS` in one process."""
    model.set_attn_implementation("eager")
    return model.eval()(IDS, use_cache=False).logits.detach()


def assert_equal(got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Assert that names, dtypes and bits are equal."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
