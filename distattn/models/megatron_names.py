"""Convert weights between transformers' names and layouts and those of Megatron-core's GPTModel, in both directions.

    shard = MegatronShard.even(config, tensor_rank, tensor_ranks, pipeline_rank, pipeline_ranks)
    model.load_state_dict(dict(to_megatron(tensors.__getitem__, config, shard)), strict=False)

This supports layers of `get_gpt_layer_local_spec(normalization="RMSNorm")` with gated MLPs, and does not import Megatron.
Megatron keeps a layer's query, key and value projections in one matrix, group by group (a key/value head with its query heads),
and the gate and up projections in another. Tensor-parallel ranks hold rows of these and of the vocabulary, and columns of the
projections that read their outputs.
"""

# G key/value heads (groups), Q query heads per group, D head dim, C hidden size, F MLP width

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from distattn.ir.errors import DistattnError

# Llama, and its variants with query, key and value biases or with query and key norms
_KINDS = ("llama", "mistral", "qwen2", "qwen3")
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
# a layer's tensors that Megatron keeps unchanged and in full on every rank
_SAME = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}
_QK_NORMS = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
# tensors whose columns are split over tensor-parallel ranks
_BY_COLUMNS = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


class MegatronShard(NamedTuple):
    """The part of a GPTModel that a rank holds. layers: indices in the entire model, not in the stage."""

    tensor_rank: int
    tensor_ranks: int
    layers: range
    first: bool
    """Whether the stage has the embedding."""
    last: bool
    """Whether the stage has the final norm and the output layer."""

    @staticmethod
    def even(
        config: PretrainedConfig,
        tensor_rank: int = 0,
        tensor_ranks: int = 1,
        pipeline_rank: int = 0,
        pipeline_ranks: int = 1,
    ) -> MegatronShard:
        """Return a rank's shard, with layers divided evenly over stages. Raises DistattnError if they do not divide evenly."""
        count = config.num_hidden_layers
        if count % pipeline_ranks:
            raise DistattnError(f"{count} layers do not divide into {pipeline_ranks} pipeline stages.")
        size = count // pipeline_ranks
        layers = range(pipeline_rank * size, (pipeline_rank + 1) * size)
        return MegatronShard(tensor_rank, tensor_ranks, layers, pipeline_rank == 0, pipeline_rank == pipeline_ranks - 1)


def check_megatron(config: PretrainedConfig, tensor_ranks: int = 1) -> None:
    """Raise DistattnError, with the reason, if a model's Megatron layout is unknown or does not divide over the ranks."""
    kind = config.model_type
    if kind not in _KINDS:
        raise DistattnError(f"the Megatron layout of {kind} models is not known; those of {', '.join(_KINDS)} are.")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise DistattnError(f"the Megatron layout of {kind} models with {name} is not known; set it to False.")
    sizes = {
        "key/value heads": config.num_key_value_heads,
        "columns of the MLP": config.intermediate_size,
        "token ids": config.vocab_size,
    }
    for name, size in sizes.items():
        if size % tensor_ranks:
            raise DistattnError(f"{size} {name} cannot be divided evenly over {tensor_ranks} tensor-parallel ranks.")


def to_megatron(
    read: Callable[[str], Tensor], config: PretrainedConfig, shard: MegatronShard
) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of a rank's GPTModel parameters, computed from transformers' tensors.

    read: returns a full tensor by its name in transformers; it is called once for each tensor that the rank needs. Raises
    DistattnError as `check_megatron` does.
    """
    check_megatron(config, shard.tensor_ranks)
    tied = config.tie_word_embeddings
    if shard.first:
        yield _EMBEDDING, _part(read("model.embed_tokens.weight"), 0, shard)
    for local, layer in enumerate(shard.layers):
        for name, tensor in _layer_to_megatron(read, f"model.layers.{layer}.", config, shard):
            yield f"decoder.layers.{local}.{name}", tensor
    if shard.last:
        yield "decoder.final_layernorm.weight", read("model.norm.weight")
        # if a stage is both first and last, Megatron keeps a tied embedding only once
        if not (tied and shard.first):
            yield _OUTPUT, _part(read("model.embed_tokens.weight" if tied else "lm_head.weight"), 0, shard)


def to_huggingface(
    parts: Sequence[Mapping[str, Tensor]], config: PretrainedConfig, shard: MegatronShard
) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of transformers' full tensors, computed from the parameters of a pipeline stage.

    parts: the parameters of every tensor-parallel rank of the stage, in order. shard: that of any rank of the stage. A tied
    embedding comes from the first stage. Raises DistattnError as `check_megatron` does, and if parts are missing.
    """
    check_megatron(config, shard.tensor_ranks)
    if len(parts) != shard.tensor_ranks:
        raise DistattnError(
            f"there are {len(parts)} parts, but the stage has {shard.tensor_ranks} tensor-parallel ranks."
        )
    if shard.first:
        yield "model.embed_tokens.weight", torch.cat([part[_EMBEDDING] for part in parts])
    for local, layer in enumerate(shard.layers):
        for name, tensor in _layer_to_huggingface(parts, f"decoder.layers.{local}.", config):
            yield f"model.layers.{layer}.{name}", tensor
    if shard.last:
        yield "model.norm.weight", parts[0]["decoder.final_layernorm.weight"]
        if not config.tie_word_embeddings:
            yield "lm_head.weight", torch.cat([part[_OUTPUT] for part in parts])


def _layer_to_megatron(
    read: Callable[[str], Tensor], prefix: str, config: PretrainedConfig, shard: MegatronShard
) -> Iterator[tuple[str, Tensor]]:
    for megatron, name in _unsplit_names(config).items():
        yield megatron, read(prefix + name)
    for kind in _qkv_kinds(config):
        q, k, v = (read(f"{prefix}self_attn.{letter}_proj.{kind}") for letter in "qkv")
        groups = config.num_key_value_heads
        # (G, (Q + 2) D, ...)
        grouped = torch.cat([x.reshape(groups, -1, *x.shape[1:]) for x in (q, k, v)], 1)
        yield f"self_attention.linear_qkv.{kind}", _part(grouped, 0, shard).flatten(0, 1)
    gate_FC, up_FC = (read(f"{prefix}mlp.{half}_proj.weight") for half in ("gate", "up"))
    yield "mlp.linear_fc1.weight", torch.cat([_part(gate_FC, 0, shard), _part(up_FC, 0, shard)])
    for megatron, name in _BY_COLUMNS.items():
        yield megatron, _part(read(prefix + name), 1, shard).contiguous()


def _layer_to_huggingface(
    parts: Sequence[Mapping[str, Tensor]], prefix: str, config: PretrainedConfig
) -> Iterator[tuple[str, Tensor]]:
    for megatron, name in _unsplit_names(config).items():
        yield name, parts[0][prefix + megatron]
    queries = config.num_attention_heads // config.num_key_value_heads
    for kind in _qkv_kinds(config):
        whole = torch.cat([part[f"{prefix}self_attention.linear_qkv.{kind}"] for part in parts])
        # (G, Q + 2, D, ...)
        grouped = whole.reshape(config.num_key_value_heads, queries + 2, -1, *whole.shape[1:])
        for letter, tensor in zip("qkv", grouped.split([queries, 1, 1], 1), strict=True):
            yield f"self_attn.{letter}_proj.{kind}", tensor.flatten(0, 2)
    fc1 = [part[f"{prefix}mlp.linear_fc1.weight"].chunk(2) for part in parts]
    for index, half in enumerate(("gate", "up")):
        yield f"mlp.{half}_proj.weight", torch.cat([halves[index] for halves in fc1])
    for megatron, name in _BY_COLUMNS.items():
        yield name, torch.cat([part[prefix + megatron] for part in parts], 1)


def _unsplit_names(config: PretrainedConfig) -> dict[str, str]:
    return _SAME | (_QK_NORMS if config.model_type == "qwen3" else {})


def _qkv_kinds(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the names of each query, key and value projection's parameters."""
    return ("weight", "bias") if config.model_type == "qwen2" else ("weight",)


def _part(tensor: Tensor, dim: int, shard: MegatronShard) -> Tensor:
    """Return a tensor-parallel rank's part of a tensor."""
    return tensor.chunk(shard.tensor_ranks, dim)[shard.tensor_rank]
