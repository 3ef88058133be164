"""Hugging Face transformers: attention that follows the batch's plan.

    register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="distattn")
    batch = cp.shard(batch)
    logits = model(**inputs(batch)).logits

This uses transformers' public registries of attention and mask functions. Recurrent layers and convolutions have no registry, so
the functions that hybrid models call are replaced (see `huggingface_recurrent`). Models with their own attention classes refuse
the implementation (see `huggingface_masks`). For a `Trainer`, see `distattn.adapters.hf_trainer`.
"""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from distattn.adapters.huggingface_latent import attend_by_latents as attend_by_latents
from distattn.adapters.huggingface_latent import has_latents, latent_attention, latents_expanded
from distattn.adapters.huggingface_mamba import pass_batches_to_layers
from distattn.adapters.huggingface_masks import NAME as NAME
from distattn.adapters.huggingface_masks import MaskPattern as MaskPattern
from distattn.adapters.huggingface_masks import refuse_attention_classes
from distattn.adapters.huggingface_modules import patch_model_modules
from distattn.adapters.huggingface_recurrent import MIXING, check_mixing_layer, replace_functions
from distattn.adapters.huggingface_rope import BY_LENGTH, check_rope
from distattn.adapters.huggingface_rope import scale_rope_by_pack as scale_rope_by_pack
from distattn.adapters.huggingface_spans import relayout_recurrent_spans as relayout_recurrent_spans
from distattn.adapters.pytorch import inputs as inputs
from distattn.batch.local_batch import BatchAttention
from distattn.ir.errors import DistattnError
from distattn.ir.renamed import renamed_attributes

# the supported kinds of layers in configurations: attention layers, and layers in which no token reads another
_COMPUTED = ("full_attention", "sliding_attention", "mlp", "moe")
__getattr__ = renamed_attributes(__name__, {"relayout_recurrent_runs": "relayout_recurrent_spans"})


def register() -> None:
    """Register attn_implementation="distattn" with transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_pattern)
    patch_model_modules(refuse_attention_classes)
    patch_model_modules(replace_functions)
    patch_model_modules(pass_batches_to_layers)


@contextmanager
def single_process_attention(model: Any) -> Iterator[None]:
    """Let a transformers model attend to whole batches in this process while the context is open, for evaluation or `generate`.

    With activation checkpointing, also run backward passes inside the context, since they recompute attention.
    """
    # transformers' sdpa has no soft cap
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    model.set_attn_implementation("sdpa" if model._supports_sdpa and not capped else "eager")
    try:
        with latents_expanded(model):
            yield
    finally:
        model.set_attn_implementation(NAME)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskPattern | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    context_parallel: BatchAttention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers calls it: query (1, H, T, D), key (1, K, T, D), value (1, K, T, E) -> (1, T, H, E).

    softcap, s_aux (a sink logit per head, (H,)) and sliding_window: as Gemma 2, gpt-oss and Mistral pass them. None
    stands for the attention weights that transformers expects. Raises DistattnError for anything else that a layer requests.
    """
    layer = getattr(module, "layer_idx", None)
    where = "" if layer is None else f"layer {layer}: "
    if context_parallel is None:
        raise DistattnError(
            f'{where}attn_implementation="distattn" needs the sharded batch: call the model with '
            'context_parallel=batch["context_parallel"]; evaluate whole batches inside '
            "huggingface.single_process_attention(model). Models that do not pass it to their attention layers cannot be split."
        )
    check_rope(getattr(module, "config", None), kwargs)
    if position_ids is not None:
        context_parallel.check_positions(position_ids)
    if attention_mask is not None and not isinstance(attention_mask, MaskPattern):
        raise DistattnError(
            f"{where}an attention mask was passed; pass document_lengths to ContextParallel.shard instead."
        )
    if attention_mask is not None and attention_mask.window not in (None, sliding_window):
        raise DistattnError(
            f"{where}the model masks all but {attention_mask.window} tokens, but the layer passes no such window; not computed."
        )
    if dropout:
        names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
        name = next((name for name in names if hasattr(getattr(module, "config", None), name)), names[0])
        raise DistattnError(f"{where}attention dropout {dropout} is not computed; set {name} = 0 in its config.")
    if kwargs.get("position_bias") is not None:
        raise DistattnError(f"{where}a position bias (position_bias) is not computed.")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise DistattnError(f"{where}it is not causal; this adapter serves causal language models.")
    if query.shape[0] != 1:
        raise DistattnError(f"a sharded batch has one row; this one has {query.shape[0]}. Use ContextParallel.shard.")
    if key.shape[2] != query.shape[2]:
        raise DistattnError(
            f"{where}{key.shape[2]} keys for {query.shape[2]} queries: generation with a key/value cache is not computed; "
            "generate inside huggingface.single_process_attention(model)."
        )
    softcap = softcap or 0.0
    if has_latents(module):
        inputs = module, context_parallel, query, key, value
        return latent_attention(*inputs, scaling, window=sliding_window, layer=layer, softcap=softcap, sink=s_aux), None
    # squeeze is free in the backward pass, whereas indexing row 0 would cost a copy
    q_THD, k_TKD = query.squeeze(0).transpose(0, 1), key.squeeze(0).transpose(0, 1)
    v_TKE = value.squeeze(0).transpose(0, 1)
    out_THE = context_parallel.attention(
        q_THD, k_TKD, v_TKE, scaling, window=sliding_window, layer=layer, softcap=softcap, sink=s_aux
    )
    return out_THE[None], None


def mask_pattern(
    *args: Any,
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> MaskPattern:
    """Return a pattern in place of a mask, since the plan has the mask: causal in each document, possibly with a window.

    transformers marks windows and chunks by local_size, and masks of users and multimodal models by use_vmap or an outer
    `or_mask`. It wraps its causal function in an `and_mask` for windows, and when positions restart, as in packed documents.
    Raises DistattnError for other masks.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise DistattnError(
            "a padding mask was passed to the model; pass it to ContextParallel.shard, which leaves padding out."
        )
    if local_size is not None and local_size != getattr(config, "sliding_window", None):
        raise DistattnError(f"the model asks for attention in chunks of {local_size} tokens, which is not computed.")
    name = getattr(mask_function, "__name__", "causal_mask_function")
    if use_vmap or name not in ("causal_mask_function", "and_mask"):
        raise DistattnError(f"the model asks for a mask other than causal ({name}), which is not computed.")
    if config is not None:
        check_config(config)
    return MaskPattern(local_size)


def has_recurrence_or_convolution(config: Any) -> bool:
    """Return whether a model has layers that read other tokens through a recurrence or a convolution."""
    return any(kind in MIXING for kind in getattr(config, "layer_types", None) or ())


def check_config(config: Any) -> None:
    """Raise DistattnError if a setting of the model would give wrong results on sharded sequences."""
    for number, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind in MIXING:
            check_mixing_layer(number, config)
        elif kind not in _COMPUTED:
            raise DistattnError(f"layer {number} is a {kind} layer, which is unknown; only known layers can be split.")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for section in (rope, *(part for part in rope.values() if isinstance(part, Mapping))):
        if "mrope_section" in section:
            raise DistattnError("the model has multimodal RoPE (mrope_section), whose positions are not sharded.")
        kind = section.get("rope_type", section.get("type"))
        if kind in BY_LENGTH and section is not rope:
            raise DistattnError(
                f"the model has {kind} RoPE in some kinds of layers only; its frequencies depend on the longest position, "
                "and would differ between ranks. Use linear, yarn or llama3 scaling."
            )
    if getattr(config, "output_router_logits", False) and config.model_type == "doge":
        raise DistattnError(
            "the router loss of doge models is not computed; set output_router_logits to False in their config."
        )
