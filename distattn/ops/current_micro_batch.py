"""Micro-batches that take turns on one rank: which of them an operator or a checkpointed layer is called for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from distattn.ops.executable import Executable


class InterleavedBatch(Protocol):
    """A micro-batch that takes turns with others on this rank (see `driver.overlap`): it runs its own attention calls."""

    @property
    def layer(self) -> nn.Module | None:
        """The layer that is computed for it; None outside of the schedule's layers, and in a layer's repetition."""

    def attention(
        self,
        executable: Executable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        slopes: Tensor | None,
        scale: float,
        softcap: float,
    ) -> Tensor: ...

    def checkpoint(
        self,
        forward: Callable[..., Any],
        put: Callable[[Tensor], Any] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Compute `layer`, of which only the input and attention's outputs are kept; return its output.

        put: takes the input to the host, and returns an object whose `get` brings it back.
        """


class _PerThread(threading.local):
    """The micro-batch that this thread works on, if several take turns."""

    batch: InterleavedBatch | None = None


INTERLEAVED = _PerThread()
# micro-batches whose backward pass runs: a recomputed forward in it may be on a thread of autograd
RECOMPUTING: list[InterleavedBatch] = []


def current_micro_batch() -> InterleavedBatch | None:
    """Return the micro-batch whose turn it is, if several take turns."""
    return INTERLEAVED.batch or (RECOMPUTING[-1] if RECOMPUTING else None)
