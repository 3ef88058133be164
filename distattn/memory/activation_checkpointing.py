"""Activation checkpointing: each layer keeps only its input, possibly on the host, and is recomputed in the backward pass.

Chen et al. 2016, arXiv 1604.06174, with `torch.utils.checkpoint`. Attention's outputs may be saved along with the input, so that
attention is neither communicated nor computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from distattn.ir.errors import DistattnError
from distattn.memory.host_offload import HostOffload, Ticket
from distattn.ops.attention import save_attention
from distattn.ops.current_micro_batch import current_micro_batch

SAVED = ("nothing", "attention")
# returns what `torch.utils.checkpoint` needs: a context for the forward pass and a context for its recomputation
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def checkpoint_layers(
    layers: Iterable[nn.Module], *, save: str = "nothing", offload: HostOffload | None = None
) -> None:
    """Make layers keep only their input between the forward and the backward pass.

    The first argument of a layer's forward is its input, a tensor of hidden states. All other arguments, such as the batch, are
    kept as they are. save: "nothing" to keep only the input, or "attention" to keep attention's outputs, too, and not recompute
    them. offload: copies inputs to the host, and back before they are needed.

    Call this before or after `fully_shard`; parameters are gathered around the layer. Compile a layer afterwards, with
    `layer.compile()`. With offload, compile it before, with `layer.forward = torch.compile(layer.forward)`, since copies to the
    host are not compiled. With offload and save="attention", leave layers uncompiled, since the policy cannot see inside compiled
    code. Switch off the trainer's own checkpointing. Raises DistattnError if there are no layers or one is already checkpointed.
    """
    if save not in SAVED:
        raise DistattnError(f"save must be one of {', '.join(SAVED)}, not {save!r}.")
    layers = list(layers)
    if not layers:
        raise DistattnError("there are no layers to checkpoint.")
    for layer in layers:
        if isinstance(layer.__dict__.get("forward"), CheckpointedForward):
            raise DistattnError(f"{type(layer).__name__} is checkpointed already.")
        if getattr(layer, "gradient_checkpointing", False):
            raise DistattnError(
                f"{type(layer).__name__} is checkpointed by transformers; call model.gradient_checkpointing_disable() first."
            )
    for layer in layers:
        layer.forward = CheckpointedForward(layer, layer.forward, save, offload)


class CheckpointedForward:
    """The forward function of a checkpointed layer."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any], save: str, offload: HostOffload | None):
        self._layer, self._name, self._forward, self._offload = layer, type(layer).__name__, forward, offload
        # without a policy, leave context_fn out, since torch.compile rejects a context_fn that does nothing
        self._options: dict[str, Any] = {}
        if save == "attention":
            self._options["context_fn"] = partial(create_selective_checkpoint_contexts, save_attention)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        interleaved = current_micro_batch()
        if interleaved is not None and interleaved.layer is self._layer:
            put = None if self._offload is None else self._offload.put
            return interleaved.checkpoint(self._forward, put, args, kwargs)
        if self._offload is None:
            return checkpoint(self._forward, *args, use_reentrant=False, **self._options, **kwargs)
        if not args or not isinstance(args[0], Tensor):
            raise DistattnError(f"{self._name}: its input is to be offloaded, but its first argument is not a tensor.")
        return self._offloaded(self._offload, *args, **kwargs)

    @torch.compiler.disable
    def _offloaded(self, offload: HostOffload, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        source = _InputSource(
            offload.put(x.detach()), x.requires_grad, self._options.get("context_fn", noop_context_fn)
        )
        # the first call is the forward pass, after which no object here keeps the input
        source.input = x
        del x

        def forward(*rest: Any, **named: Any) -> Any:
            return self._forward(source.take(), *rest, **named)

        return checkpoint(forward, *args, use_reentrant=False, context_fn=source.contexts, **kwargs)


class _InputSource:
    """The source of a layer's input: the caller in the forward pass, and the copy on the host when the layer is recomputed."""

    def __init__(self, ticket: Ticket, requires_grad: bool, contexts: Contexts):
        self._ticket, self._requires_grad, self._contexts = ticket, requires_grad, contexts
        self.input: Tensor | None = None

    def take(self) -> Tensor:
        """Return the input and drop this object's reference to it."""
        x, self.input = self.input, None
        assert x is not None
        return x

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return the contexts of the forward pass and its recomputation. The latter first fetches the input."""
        forward, repetition = self._contexts()
        return forward, _Fetched(self, repetition)

    def fetch(self) -> None:
        """Copy the input back to the device."""
        self.input = self._ticket.get().requires_grad_(self._requires_grad)


class _Fetched:
    """A context that fetches a layer's input whenever it is entered."""

    def __init__(self, source: _InputSource, inner: AbstractContextManager[Any]):
        self._source, self._inner = source, inner

    def __enter__(self) -> None:
        self._source.fetch()
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        # the recomputation may end before the layer has taken its input
        self._source.input = None
        return self._inner.__exit__(*error)
