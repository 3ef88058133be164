"""Feed-forward layers and norms over tiles of tokens, computed again in the backward pass: their inside is of one tile.

A layer's weights get one gradient, the sum over its tiles, as if there were none: trainers' hooks see nothing new. Tiles are this
rank's own matter. Nothing is communicated for one, so ranks may have unequally many, or none.
"""

# T tokens on this rank, H width of the hidden states, t tokens of a tile

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from distattn.ir.errors import DistattnError
from distattn.kernels.merge import accumulation_dtype

# as transformers and models of one's own name dense feed-forward layers
_NAMES = ("mlp", "feed_forward")
# as classes of norms over the width end
_NORMS = ("RMSNorm", "LayerNorm")
# what a layer has that sends tokens to experts
_OF_EXPERTS = ("experts", "router", "gate")


def tile_feed_forward(model: nn.Module, tile_tokens: int) -> int:
    """Have the modules of a model that are called mlp or feed_forward, and its norms, compute `tile_tokens` tokens at a time.

    Norms in eager mode have several tensors in fp32, which are larger than what tiled feed-forward layers leave. Returns how many
    feed-forward layers there are. Call it before or after `fully_shard`. Raises DistattnError where there is none, and, by name,
    for a module that has experts, dropout, or parts that FSDP2 shards for themselves.
    """
    if tile_tokens < 1:
        raise DistattnError(f"tile_tokens is at least 1, not {tile_tokens}.")
    found = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in _NAMES}
    if not found:
        raise DistattnError(f"{type(model).__name__} has no module called {' or '.join(_NAMES)}; nothing can be tiled.")
    for name, module in found.items():
        _check_module(name, module)
    norms = [module for module in model.modules() if type(module).__name__.endswith(_NORMS)]
    for module in (*found.values(), *norms):
        before = module.__dict__.get("forward")
        forward = before.forward if isinstance(before, TiledForward) else module.forward
        module.forward = TiledForward(module, forward, tile_tokens)
    return len(found)


class TiledForward:
    """The forward of a module whose tokens do not know of each other, (..., T, H) to (..., T, H'), by tiles of tokens.

    Norms of queries and keys take four dims, (1, T, heads, D).
    """

    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Tensor], tile_tokens: int):
        self.module, self.forward, self.tile_tokens = module, forward, tile_tokens

    # a function that differentiates inside is nothing that torch.compile can look into
    @torch.compiler.disable
    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() < 2:
            raise DistattnError(f"{type(self.module).__name__}: {tuple(x.shape)} are no (..., tokens, width).")
        # every rank refuses, however few its tokens are
        if any(hasattr(one, "ds_id") for one in self.module.parameters()):
            raise DistattnError(
                f"{type(self.module).__name__}: ZeRO 3 would gather its weights for every tile, and wait for ranks that "
                "have fewer tiles; use ZeRO 1 or 2, or FSDP2."
            )
        dim = -3 if x.dim() == 4 else -2
        if x.shape[dim] <= self.tile_tokens:
            # no tokens at all have their place in the graph as well: hooks on gradients run on every rank
            return self.forward(x)
        # while they are gathered: FSDP2 has them elsewhere in between
        parameters = [one for one in self.module.parameters() if one.requires_grad]
        if not torch.is_grad_enabled() or not (parameters or x.requires_grad):
            return torch.cat([self.forward(tile) for tile in x.split(self.tile_tokens, dim)], dim)
        autocast = _Autocast.current(x.device.type)
        y: Tensor = _Tiled.apply(x, self.forward, self.tile_tokens, dim, parameters, autocast, *parameters)
        return y


class _Autocast(NamedTuple):
    """Autocast's state; a backward pass, on a thread of its own, has none."""

    kind: str
    enabled: bool
    dtype: torch.dtype

    @staticmethod
    def current(kind: str) -> _Autocast | None:
        if not torch.amp.is_autocast_available(kind):
            return None
        return _Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))


class _Tiled(torch.autograd.Function):
    """Keeps its input only. Parameters are given twice: as a list to differentiate for, and as inputs to have gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        forward: Callable[[Tensor], Tensor],
        tile_tokens: int,
        dim: int,
        parameters: Sequence[Tensor],
        autocast: _Autocast | None,
        *_: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.forward_of_tile, ctx.tile_tokens, ctx.dim = forward, tile_tokens, dim
        ctx.parameters, ctx.autocast = parameters, autocast
        out = None
        for number, tile in enumerate(x.split(tile_tokens, dim)):
            part = forward(tile)
            if not isinstance(part, Tensor) or part.shape[:-1] != tile.shape[:-1]:
                raise DistattnError("a tiled layer returns one tensor, with as many tokens as it was given.")
            if out is None:
                out = part.new_empty((*x.shape[:-1], part.shape[-1]))
            out.narrow(dim, number * tile_tokens, part.shape[dim]).copy_(part)
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        wants_x, parameters = ctx.needs_input_grad[0], ctx.parameters
        dx = torch.empty_like(x) if wants_x else None
        # a sum of many tiles in half precision would lose what the sum over tokens inside one product has not
        sums = [torch.zeros_like(one, dtype=accumulation_dtype(one.dtype)) for one in parameters]
        for number, (tile, dtile) in enumerate(
            zip(x.split(ctx.tile_tokens, ctx.dim), dy.split(ctx.tile_tokens, ctx.dim), strict=True)
        ):
            tile = tile.detach().requires_grad_(wants_x)
            given = ctx.autocast
            with (
                torch.enable_grad(),
                nullcontext() if given is None else torch.autocast(given.kind, given.dtype, given.enabled),
            ):
                part = ctx.forward_of_tile(tile)
            wanted = [*parameters, tile] if wants_x else parameters
            gradients = torch.autograd.grad(part, wanted, dtile, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=False):
                if gradient is not None:
                    total += gradient
            if dx is not None and gradients[-1] is not None:
                dx.narrow(ctx.dim, number * ctx.tile_tokens, tile.shape[ctx.dim]).copy_(gradients[-1])
            del part, gradients
        found = [total.to(one.dtype) for total, one in zip(sums, parameters, strict=True)]
        return dx, None, None, None, None, None, *found


def _check_module(name: str, module: nn.Module) -> None:
    """Raise DistattnError where tiles would not compute what the whole does, or would communicate."""
    what = f"{name} ({type(module).__name__})"
    children = dict(module.named_children())
    if experts := [one for one in _OF_EXPERTS if one in children]:
        raise DistattnError(
            f"{what} sends tokens to experts ({experts[0]}): how many tokens each expert has, and its losses, are not known of a "
            "tile. Leave such layers untiled."
        )
    for below, part in module.named_modules():
        if isinstance(part, nn.Dropout) and part.p:
            raise DistattnError(
                f"{what} has dropout ({below}), whose random numbers a tile would draw anew; set it to 0."
            )
        if below and isinstance(part, FSDPModule):
            raise DistattnError(
                f"{what}: FSDP2 shards {below} for itself, and would gather it for every tile; shard the whole layer instead."
            )
