"""Rotary embeddings of transformers whose frequencies depend on the longest position: dynamic NTK and longrope.

transformers uses the largest position in a call. Under context parallelism, a rank has only some of a pack's positions, so ranks
would compute different frequencies. Here every rank uses the last position of the pack's longest document, as one process with
the whole pack would. Frequencies depend on the pack alone, whereas transformers keeps those of the longest call so far.
"""

# T tokens on this rank

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distattn.ir.errors import DistattnError

DYNAMIC, LONGROPE = "dynamic", "longrope"
BY_LENGTH = (DYNAMIC, LONGROPE)
# a keyword argument that tells attention layers that rotary embeddings know the pack's longest document
KNOWS_PACK = "rope_knows_pack"


def rope_by_length(config: Any) -> str:
    """Return a transformers configuration's RoPE type if its frequencies depend on the length, otherwise ""."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    return kind if kind in BY_LENGTH else ""


def scale_rope_by_pack(model: torch.nn.Module) -> None:
    """Make a transformers model scale dynamic RoPE or longrope by a sharded pack's longest document, equally on all ranks.

    Call this once, before the first forward pass. It does nothing for models with other RoPE types. In calls with whole batches
    (no context_parallel), RoPE is scaled by their longest position. Raises DistattnError if the model's rotary embeddings are not
    modules like transformers' own.
    """
    kind = rope_by_length(model.config)
    if not kind:
        return
    rotaries = [module for module in model.modules() if getattr(module, "rope_type", None) == kind]
    if not rotaries:
        raise DistattnError(
            f"{type(model).__name__} has {kind} RoPE, but no module that computes it like transformers' own models; use linear, "
            "yarn or llama3 scaling."
        )
    # the length of the longest document in the current call; 0 for whole batches
    longest = [0]

    def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        batch = kwargs.get("context_parallel")
        longest[0] = 0 if batch is None else batch.longest_document
        if batch is not None and not longest[0]:
            raise DistattnError(
                f"the model has {kind} RoPE, and the longest document of the pack is unknown: distattn doctor and pipeline "
                "schedules do not pass it. Use linear, yarn or llama3 scaling with them."
            )
        return args, kwargs | {KNOWS_PACK: True} if longest[0] else kwargs

    def append(rotary: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        # positions on the meta device, which is used to count bytes, have no values to compare
        rotary.rope_type = "default" if positions.is_meta else kind
        if kind == DYNAMIC:
            # transformers would keep the frequencies of an earlier, longer call
            rotary.inv_freq, rotary.max_seq_len_cached = rotary.original_inv_freq, rotary.original_max_seq_len
        if not longest[0]:
            return args, kwargs
        more = _with_last(positions, longest[0])
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": more}
        return (args[0], more, *args[2:]), kwargs

    def cut(_: Any, __: Any, out: Any) -> Any:
        if not longest[0]:
            return out
        return tuple(part[:, :-1] for part in out) if isinstance(out, tuple) else out[:, :-1]

    model.register_forward_pre_hook(begin, with_kwargs=True)
    for rotary in rotaries:
        rotary.register_forward_pre_hook(append, with_kwargs=True)
        rotary.register_forward_hook(cut)


def check_rope(config: Any, arguments: Mapping[str, Any]) -> None:
    """Raise DistattnError if a layer's model needs `scale_rope_by_pack`. arguments: the keyword arguments of the layer's call."""
    kind = rope_by_length(config)
    if kind and not arguments.get(KNOWS_PACK):
        raise DistattnError(
            f"the model has {kind} RoPE, whose frequencies depend on the longest position: they would differ between ranks. "
            "Call huggingface.scale_rope_by_pack(model) once, or use linear, yarn or llama3 scaling."
        )


def _with_last(position_ids: Tensor, length: int) -> Tensor:
    """Append the last position of a document of `length` tokens to positions (1, T)."""
    return torch.cat([position_ids, position_ids.new_full((len(position_ids), 1), length - 1)], 1)
