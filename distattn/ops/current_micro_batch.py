"""The micro-batch that operators and checkpointed layers are called for, if several take turns on a rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from distattn.ops.executable import Executable


class InterleavedBatch(Protocol):
    """A micro-batch that takes turns with others on this rank (see `driver.overlap`), and runs its attention calls itself."""

    @property
    def layer(self) -> nn.Module | None:
        """The layer that the micro-batch is in; None outside the schedule's layers, and while a layer is recomputed."""

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
        """Run `layer`, keeping only its input and attention's outputs; return its output.

        put: moves the input to the host, and returns an object whose `get` moves it back; None if the input stays.
        """


class _PerThread(threading.local):
    """The micro-batch that this thread works on; None unless several take turns."""

    batch: InterleavedBatch | None = None


INTERLEAVED = _PerThread()
# micro-batches in their backward pass, which recompute their forward pass on an autograd thread
RECOMPUTING: list[InterleavedBatch] = []


def current_micro_batch() -> InterleavedBatch | None:
    """Return the micro-batch that this thread works on; None unless several take turns."""
    return INTERLEAVED.batch or (RECOMPUTING[-1] if RECOMPUTING else None)
