"""Hugging Face transformers: attention that follows the batch's plan.

    register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="distattn")
    batch = cp.shard(batch)
    model(batch["input_ids"], position_ids=batch["position_ids"], context_parallel=batch["context_parallel"])

Goes through transformers' public registries of attention and mask functions; nothing is patched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from distattn.batches import ShardedBatch
from distattn.errors import DistattnError

NAME = "distattn"
# arguments by which models ask for attention that this adapter does not compute
_UNSUPPORTED = {
    "sliding_window": "a sliding window",
    "position_bias": "a position bias",
}


def register() -> None:
    """Make attn_implementation="distattn" known to transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, no_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    context_parallel: ShardedBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, H, T, D), key (1, K, T, D), value (1, K, T, E) -> (1, T, H, E), as transformers calls it.

    softcap and s_aux (H,), a sink logit per head, as Gemma 2 and gpt-oss pass them.
    """
    if context_parallel is None:
        raise DistattnError(
            'attn_implementation="distattn" needs the sharded batch: '
            'call the model with context_parallel=batch["context_parallel"].'
        )
    if attention_mask is not None:
        raise DistattnError("an attention mask was passed; give document_lengths to ContextParallel.shard instead.")
    if dropout:
        raise DistattnError(
            f"attention dropout {dropout} is not computed; set attention_dropout = 0 in the model's config."
        )
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise DistattnError(
                f"layer {getattr(module, 'layer_idx', '?')} asks for {what} ({name}), which is not computed yet."
            )
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise DistattnError("the layer is not causal; this adapter serves causal language models.")
    if query.shape[0] != 1:
        raise DistattnError(f"a sharded batch has one row; this one has {query.shape[0]}. Use ContextParallel.shard.")
    q_THD, k_TKD, v_TKE = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    o_THE = context_parallel.attention(q_THD, k_TKD, v_TKE, scaling, softcap=softcap or 0.0, sink=s_aux)
    return o_THE[None], None


def no_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> None:
    """The plan carries the mask: causal inside each document. Refuses what transformers would add to that.

    transformers marks windows and chunks by local_size, masks of users and multimodal models by use_vmap or an outer
    `or_mask`; it wraps its causal function in an `and_mask` where positions restart, as those of packed documents do.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise DistattnError(
            "a padding mask was passed; pack documents without padding and give document_lengths instead."
        )
    if local_size is not None:
        raise DistattnError(
            f"the model asks for local attention of {local_size} tokens (windows, chunks), which is not computed."
        )
    name = getattr(mask_function, "__name__", "causal_mask_function")
    if use_vmap or name not in ("causal_mask_function", "and_mask"):
        raise DistattnError(f"the model asks for a mask other than causal ({name}), which is not computed.")
