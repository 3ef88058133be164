"""The micro-batch that an operator is called for, if several take turns on one rank."""

from __future__ import annotations

import threading
from typing import Protocol

from torch import Tensor

from distattn.ops.executable import Executable


class InterleavedBatch(Protocol):
    """A micro-batch that takes turns with others on this rank (see `driver.overlap`): it runs its own attention calls."""

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


class _PerThread(threading.local):
    """The micro-batch that this thread works on, if several take turns."""

    batch: InterleavedBatch | None = None


INTERLEAVED = _PerThread()
# micro-batches whose backward pass runs: a recomputed forward in it may be on a thread of autograd
RECOMPUTING: list[InterleavedBatch] = []


def current_micro_batch() -> InterleavedBatch | None:
    """Return the micro-batch whose turn it is, if several take turns."""
    return INTERLEAVED.batch or (RECOMPUTING[-1] if RECOMPUTING else None)
