"""Micro-batches that take turns on one rank: which of them an operator is called for."""

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
    """Which micro-batch this thread works on, where several take turns."""

    batch: InterleavedBatch | None = None


INTERLEAVED = _PerThread()
# the micro-batch whose backward pass runs: a forward that is recomputed there may be on a thread of autograd's
RECOMPUTING: list[InterleavedBatch] = []


def current_micro_batch() -> InterleavedBatch | None:
    """The micro-batch whose turn it is, where several take turns."""
    return INTERLEAVED.batch or (RECOMPUTING[-1] if RECOMPUTING else None)
