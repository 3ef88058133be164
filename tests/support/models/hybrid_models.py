"""Tiny transformers models with recurrent layers, short convolutions or latent attention, and their reference results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from one_process import loss_by_document
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from distattn.adapters import huggingface

_ALONE = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
_SIZES = _ALONE | dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
_TINY = _SIZES | dict(head_dim=8)
_MIXED = ["linear_attention", "full_attention"]
_DELTA_NET = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=6,
    linear_conv_kernel_dim=4,
    layer_types=_MIXED,
)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
_SHARED = _EXPERTS | dict(shared_expert_intermediate_size=16)
# in models with latent attention, qk_nope_head_dim is a key's width without its rotary part
_LATENT = _SIZES | dict(
    num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6
)
_KIMI = _LATENT | dict(linear_num_heads=2, linear_head_dim=8, linear_conv_kernel_dim=4, layer_types=_MIXED)
_GROUPS = dict(n_group=1, topk_group=1)
_MAMBA = dict(
    mamba_n_heads=4,
    mamba_d_head=8,
    mamba_n_groups=2,
    mamba_d_state=6,
    mamba_d_conv=4,
    mamba_expand=1,
    mamba_chunk_size=16,
)
_NEMOTRON = dict(
    num_hidden_layers=4,
    layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
    mamba_num_heads=4,
    mamba_head_dim=8,
    n_groups=2,
    ssm_state_size=6,
    conv_kernel=4,
    chunk_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
)
_ZAMBA = dict(
    num_hidden_layers=3,
    layers_block_type=["linear_attention", "hybrid", "linear_attention"],
    mamba_d_state=6,
    mamba_d_conv=4,
    mamba_expand=1,
    mamba_ngroups=2,
    n_mamba_heads=4,
    mamba_headdim=8,
    chunk_size=16,
    num_mem_blocks=1,
    attention_head_dim=16,
    adapter_rank=4,
)
_CONVOLUTION = dict(layer_types=["conv", "full_attention"], conv_L_cache=3)
_MAMBA_2 = dict(num_heads=4, head_dim=16, expand=2, n_groups=2, state_size=6, conv_kernel=4, chunk_size=16)
# keyed by transformers' model_type
RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_next": _TINY | _DELTA_NET | _SHARED,
    "qwen3_5_text": _TINY | _DELTA_NET,
    "qwen3_5_moe_text": _TINY | _DELTA_NET | _SHARED,
    "olmo_hybrid": _TINY | _DELTA_NET | dict(linear_num_key_heads=4),
    "kimi_linear": _KIMI
    | _GROUPS
    | dict(num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    | dict(mlp_layer_types=["dense", "sparse"]),
    "bailing_hybrid": _KIMI | _GROUPS | _EXPERTS,
    "nemotron_h": _TINY | _NEMOTRON,
    "mamba2": _ALONE | _MAMBA_2,
    "bamba": _TINY | _MAMBA | dict(attn_layer_indices=[1]),
    "falcon_h1": _TINY | _MAMBA | dict(mamba_d_ssm=32),
    "granitemoehybrid": _TINY
    | _MAMBA
    | dict(layer_types=_MIXED, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16),
    "zamba2": _TINY | _ZAMBA,
    "lfm2": _TINY | _CONVOLUTION | dict(block_multiple_of=8),
    "lfm2_moe": _TINY | _CONVOLUTION | _EXPERTS,
}
_ROUTED = _GROUPS | dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LATENT: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT | _ROUTED | dict(q_lora_rank=8, first_k_dense_replace=1),
    "deepseek_v3": _LATENT | _ROUTED | dict(q_lora_rank=8, first_k_dense_replace=1),
    "glm4_moe_lite": _LATENT | _ROUTED | dict(q_lora_rank=8),
    **{name: RECURRENT[name] for name in ("kimi_linear", "bailing_hybrid")},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "glm4_moe": _TINY | _ROUTED,
    "mixtral": _TINY | dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _TINY | _EXPERTS,
    "qwen3_next": RECURRENT["qwen3_next"],
}
MODELS = RECURRENT | LATENT | EXPERTS


def config(name: str, **changes: Any) -> PretrainedConfig:
    """Return a new configuration for transformers' model_type `name`."""
    return AutoConfig.for_model(name, **MODELS[name] | changes)


def build(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> torch.nn.Module:
    """Return a model in training mode, identical on all ranks. No parameter keeps its initial zeros or ones."""
    huggingface.register()
    torch.manual_seed(0)
    # transformers' grouped experts do not support float64
    how: dict[str, Any] = dict(attn_implementation="distattn", experts_implementation="eager")
    model = AutoModelForCausalLM.from_config(config(name, **changes), **how).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model.train()


def batch_of(lengths: Sequence[int]) -> dict[str, Any]:
    """Return a batch of packed documents with random token ids."""
    ids = torch.randint(0, 64, (1, sum(lengths)), generator=torch.Generator().manual_seed(len(lengths)))
    return {"input_ids": ids, "document_lengths": list(lengths)}


def in_one_process(model: torch.nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Compute the loss and gradients with transformers alone, one document at a time."""
    with huggingface.single_process_attention(model):
        loss = loss_by_document(lambda ids: model(ids, use_cache=False).logits[0], [batch])
        loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@contextmanager
def double_precision() -> Iterator[None]:
    """Replace float32 with float64 in torch while in the block, because transformers always computes decays, states and
    routers in float32.
    """
    names, as_float = ("float32", "float"), torch.Tensor.float
    before = {name: getattr(torch, name) for name in names}
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    for name in names:
        setattr(torch, name, torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = as_float  # type: ignore[method-assign]
        for name, dtype in before.items():
            setattr(torch, name, dtype)


def worst(got: Sequence[torch.Tensor | None], wanted: Sequence[torch.Tensor | None]) -> float:
    """Return the largest relative error of any gradient, measured by norms.

    The error of a gradient near zero (such as that of keys seen by no other token) is relative to 1e-4 of the model's
    largest gradient.
    """
    assert [x is None for x in got] == [x is None for x in wanted]
    pairs = [(a, b) for a, b in zip(got, wanted, strict=True) if a is not None and b is not None]
    largest = max(float(b.norm()) for _, b in pairs)
    return max(float((a - b).norm()) / max(float(b.norm()), 1e-4 * largest) for a, b in pairs)
