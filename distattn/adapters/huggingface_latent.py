"""Hugging Face transformers: latent attention (DeepSeek's MLA) that sends latents between ranks instead of keys and values.

    attend_by_latents(model)

Without that call, such models are computed like any others: each rank expands its tokens' latents, and the keys and values of
all heads are sent. transformers' attention layers expand latents in a method, `expand_kv`. The call replaces it, on the layers of
this model only, by a function that returns the latents unchanged. `attention_forward` passes them to the plan with the weight.
"""

# T tokens on this rank, H heads, N key dim without the rotary part, R rotary dim, L latent dim, E value head dim

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distattn.adapters.huggingface_modules import model_folder
from distattn.ir.errors import DistattnError

# folders of transformers models whose layers pass the result of expand_kv unchanged to their attention function; all are tested
MODELS = ("bailing_hybrid", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear")


def attend_by_latents(model: torch.nn.Module) -> None:
    """Make a transformers model's latent attention send latents, R + L numbers per token, and expand them at the receiver.

    A rank expands the latents of all tokens that it attends to, and does so again in the backward pass. Call this before the
    model is compiled. Raises DistattnError if the model has no latent attention, or if its up-projections are not plain linear
    layers (LoRA).
    """
    folder = model_folder(type(model).__module__)
    layers = [layer for layer in model.modules() if hasattr(layer, "expand_kv")]
    if folder not in MODELS or not layers:
        raise DistattnError(
            f"{type(model).__name__} has no latent attention that distattn supports; it supports models of {', '.join(MODELS)}."
        )
    for layer in layers:
        _up_projection(layer)
        # set it in __dict__ to bypass torch.nn.Module's bookkeeping, since it is neither a parameter nor a submodule
        layer.__dict__["expand_kv"] = _keep_latents


@contextmanager
def latents_expanded(model: torch.nn.Module) -> Iterator[None]:
    """Let the model's layers expand latents themselves while the context is open, for transformers' own attention."""
    layers = [layer for layer in model.modules() if has_latents(layer)]
    for layer in layers:
        del layer.__dict__["expand_kv"]
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__["expand_kv"] = _keep_latents


def has_latents(layer: torch.nn.Module) -> bool:
    """Return whether an attention layer passes latents and rotary keys to its attention function instead of keys and values."""
    return getattr(layer, "expand_kv", None) is _keep_latents


def latent_attention(
    module: Any,
    batch: Any,
    query: Tensor,
    latent: Tensor,
    rope: Tensor,
    scale: float | None,
    *,
    window: int | None,
    layer: int | None,
    softcap: float,
    sink: Tensor | None,
) -> Tensor:
    """Compute latent attention: query (1, H, T, N + R), latent (1, 1, T, L), rope (1, 1, T, R) -> (1, T, H, E).

    batch: an object with the methods of `LocalBatch`.
    """
    if softcap or sink is not None:
        raise DistattnError("latent attention with a soft cap or sinks is not computed; leave attend_by_latents out.")
    q_THD, latent_TL, rope_TR = query.squeeze(0).transpose(0, 1), latent.squeeze((0, 1)), rope.squeeze((0, 1))
    up = _up_projection(module)
    if isinstance(up, DTensor) or up.dim() != 2:
        raise DistattnError(
            "the up-projection of latents is sharded apart from its attention layer; shard whole layers, or leave "
            "attend_by_latents out."
        )
    up_HEL = up.unflatten(0, (q_THD.shape[1], -1))
    o_THE: Tensor = batch.latent_attention(q_THD, rope_TR, latent_TL, up_HEL, scale, window=window, layer=layer)
    return o_THE[None]


def _keep_latents(latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    return latent, rope


def _up_projection(layer: Any) -> Tensor:
    linear = layer.kv_b_proj
    if type(linear) is not torch.nn.Linear or linear.bias is not None:
        raise DistattnError(
            f"the up-projection of latents is a {type(linear).__name__}, not a plain linear layer without a bias: its weight is "
            "not all of it. Leave attend_by_latents out."
        )
    weight: Tensor = linear.weight
    return weight
