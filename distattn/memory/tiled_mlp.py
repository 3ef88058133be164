"""Feed-forward layers and norms that process tiles of tokens and recompute them in the backward pass, to save memory.

A layer's weights get one gradient, the sum over its tiles, so trainers' hooks run as they do without tiles. Tiles need no
communication, so ranks may have different numbers of tiles, or no tiles.
"""

# T tokens on this rank, H width of the hidden states, t tokens in a tile

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from distattn.ir.errors import DistattnError
from distattn.kernels.merge import accumulation_dtype

# names of dense feed-forward layers in transformers and in other models
_NAMES = ("mlp", "feed_forward")
# suffixes of the names of classes that normalize over the width
_NORMS = ("RMSNorm", "LayerNorm")
# names of child modules in layers that send tokens to experts
_OF_EXPERTS = ("experts", "router", "gate")


def tile_feed_forward(model: nn.Module, tile_tokens: int) -> int:
    """Make a model's norms and its modules named mlp or feed_forward process `tile_tokens` tokens at a time.

    Norms are tiled because in eager mode they allocate several fp32 tensors, which would take more memory than tiled feed-forward
    layers. Return the number of feed-forward layers. Call this before or after `fully_shard`. Raises DistattnError if there are
    no feed-forward layers, or if a layer (named in the error) has experts, dropout, or parts that FSDP2 shards separately.
    """
    if tile_tokens < 1:
        raise DistattnError(f"tile_tokens must be at least 1, not {tile_tokens}.")
    feed_forwards = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in _NAMES}
    if not feed_forwards:
        raise DistattnError(f"{type(model).__name__} has no module called {' or '.join(_NAMES)}; nothing can be tiled.")
    for name, module in feed_forwards.items():
        _check_module(name, module)
    norms = [module for module in model.modules() if type(module).__name__.endswith(_NORMS)]
    for module in (*feed_forwards.values(), *norms):
        before = module.__dict__.get("forward")
        forward = before.forward if isinstance(before, TiledForward) else module.forward
        module.forward = TiledForward(module, forward, tile_tokens)
    return len(feed_forwards)


class TiledForward:
    """The forward function of a module that treats tokens independently, (..., T, H) -> (..., T, H'), run tile by tile.

    Query and key norms take four dimensions, (1, T, heads, D).
    """

    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Tensor], tile_tokens: int):
        self.module, self.forward, self.tile_tokens = module, forward, tile_tokens

    # torch.compile cannot trace a function that calls autograd inside
    @torch.compiler.disable
    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() < 2:
            raise DistattnError(
                f"{type(self.module).__name__}: hidden states have shape {tuple(x.shape)}; (..., tokens, width) is needed."
            )
        # check this before the number of tokens, so that all ranks raise the error
        if any(hasattr(parameter, "ds_id") for parameter in self.module.parameters()):
            raise DistattnError(
                f"{type(self.module).__name__}: ZeRO 3 would gather its weights for every tile, and wait for ranks that "
                "have fewer tiles; use ZeRO 1 or 2, or FSDP2."
            )
        dim = -3 if x.dim() == 4 else -2
        if x.shape[dim] <= self.tile_tokens:
            # ranks without tokens also call it, since gradient hooks must run on every rank
            return self.forward(x)
        # look up the parameters here, where they are gathered, since FSDP2 replaces them between passes
        parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if not torch.is_grad_enabled() or not (parameters or x.requires_grad):
            return torch.cat([self.forward(tile) for tile in x.split(self.tile_tokens, dim)], dim)
        autocast = _Autocast.current(x.device.type)
        y: Tensor = _Tiled.apply(x, self.forward, self.tile_tokens, dim, parameters, autocast, *parameters)
        return y


class _Autocast(NamedTuple):
    """Autocast's state in the forward pass. The backward pass runs on another thread, which does not inherit it."""

    kind: str
    enabled: bool
    dtype: torch.dtype

    @staticmethod
    def current(kind: str) -> _Autocast | None:
        if not torch.amp.is_autocast_available(kind):
            return None
        return _Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))


class _Tiled(torch.autograd.Function):
    """A tiled function that saves only its input. Parameters are passed twice: as a list for autograd.grad, and as inputs that
    receive gradients.
    """

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
        # a sum over many tiles in half precision would be less precise than the sum over tokens inside one product
        sums = [torch.zeros_like(parameter, dtype=accumulation_dtype(parameter.dtype)) for parameter in parameters]
        for number, (tile, dtile) in enumerate(
            zip(x.split(ctx.tile_tokens, ctx.dim), dy.split(ctx.tile_tokens, ctx.dim), strict=True)
        ):
            tile = tile.detach().requires_grad_(wants_x)
            autocast = ctx.autocast
            with (
                torch.enable_grad(),
                nullcontext() if autocast is None else torch.autocast(autocast.kind, autocast.dtype, autocast.enabled),
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
        dparameters = [total.to(parameter.dtype) for total, parameter in zip(sums, parameters, strict=True)]
        return dx, None, None, None, None, None, *dparameters


def _check_module(name: str, module: nn.Module) -> None:
    """Raise DistattnError if running a module tile by tile would change its result or require communication."""
    label = f"{name} ({type(module).__name__})"
    children = dict(module.named_children())
    if experts := [child for child in _OF_EXPERTS if child in children]:
        raise DistattnError(
            f"{label} sends tokens to experts ({experts[0]}): the tokens and losses of each expert cannot be computed for one "
            "tile. Leave such layers untiled."
        )
    for below, part in module.named_modules():
        if isinstance(part, nn.Dropout) and part.p:
            raise DistattnError(
                f"{label} has dropout ({below}), whose random numbers a tile would draw anew; set it to 0."
            )
        if below and isinstance(part, FSDPModule):
            raise DistattnError(
                f"{label}: FSDP2 shards {below} separately, and would gather it for every tile; shard the whole layer instead."
            )
