"""Activation checkpointing of layers: of each its input is kept, maybe on the host, and what is inside is computed again.

Chen et al. 2016, arXiv 1604.06174, by `torch.utils.checkpoint`. Attention's outputs may be saved beside the input, so that a
backward pass neither communicates nor attends again for what it has had before.
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
# what `torch.utils.checkpoint` asks for: a context of the forward pass, and one of its repetition
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def checkpoint_layers(
    layers: Iterable[nn.Module], *, save: str = "nothing", offload: HostOffload | None = None
) -> None:
    """Have layers keep their input only between the forward and the backward pass.

    The first argument of a layer's forward is its input, a tensor of hidden states; all others, as the batch, are kept as they
    are. save: "nothing" more, or "attention", its outputs, which are then not computed again. offload: takes inputs to the host
    and brings them back in time.

    Call it before or after `fully_shard`; parameters are gathered around it. To compile a layer, do so after, `layer.compile()`;
    with offload before, `layer.forward = torch.compile(layer.forward)`, as copies to the host are not compiled (with
    save="attention", too, as a policy does not see what is compiled inside of it: leave such layers uncompiled). Leave a
    trainer's own checkpointing off. Raises DistattnError for what cannot be.
    """
    if save not in SAVED:
        raise DistattnError(f"save is one of {', '.join(SAVED)}, not {save!r}.")
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
    """The forward of a checkpointed layer."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any], save: str, offload: HostOffload | None):
        self._layer, self._name, self._forward, self._offload = layer, type(layer).__name__, forward, offload
        # torch.compile takes no context_fn that does nothing
        self._how: dict[str, Any] = {}
        if save == "attention":
            self._how["context_fn"] = partial(create_selective_checkpoint_contexts, save_attention)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        interleaved = current_micro_batch()
        if interleaved is not None and interleaved.layer is self._layer:
            put = None if self._offload is None else self._offload.put
            return interleaved.checkpoint(self._forward, put, args, kwargs)
        if self._offload is None:
            return checkpoint(self._forward, *args, use_reentrant=False, **self._how, **kwargs)
        if not args or not isinstance(args[0], Tensor):
            raise DistattnError(f"{self._name}: its input is to be offloaded, but its first argument is no tensor.")
        return self._offloaded(self._offload, *args, **kwargs)

    @torch.compiler.disable
    def _offloaded(self, offload: HostOffload, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        source = _Source(offload.put(x.detach()), x.requires_grad, self._how.get("context_fn", noop_context_fn))
        # the first call is the forward pass; what it was given nobody keeps
        source.given = x
        del x

        def forward(*rest: Any, **named: Any) -> Any:
            return self._forward(source.take(), *rest, **named)

        return checkpoint(forward, *args, use_reentrant=False, context_fn=source.contexts, **kwargs)


class _Source:
    """Where a layer's input comes from: given in the forward pass, back from the host before the layer is computed again."""

    def __init__(self, ticket: Ticket, requires_grad: bool, contexts: Contexts):
        self._ticket, self._requires_grad, self._contexts = ticket, requires_grad, contexts
        self.given: Tensor | None = None

    def take(self) -> Tensor:
        """The input; this object does not keep it."""
        x, self.given = self.given, None
        assert x is not None
        return x

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Those of the forward pass, and of its repetition, before which the input is fetched: a policy does not see it."""
        forward, again = self._contexts()
        return forward, _Fetched(self, again)

    def fetch(self) -> None:
        """Bring the input back."""
        self.given = self._ticket.get().requires_grad_(self._requires_grad)


class _Fetched:
    """A context that fetches a layer's input when it is entered, which may happen more than once."""

    def __init__(self, source: _Source, inner: AbstractContextManager[Any]):
        self._source, self._inner = source, inner

    def __enter__(self) -> None:
        self._source.fetch()
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        # where computing ends early, and before the layer took its input
        self._source.given = None
        return self._inner.__exit__(*error)
