"""Finds the update that made a weight grow: keeps weight norms after updates, and compares them if a step is refused."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.training.engines.engine import WEIGHT, StateTensor
from distattn.training.watch.module_observer import plain_name

# an update that multiplies a weight's norm by more than this counts as having destroyed the weight
LARGE_GROWTH = 1000.0
# number of recent updates to compare
_UPDATES = 16


class Growth(NamedTuple):
    """The growth of a weight on one rank. step: the update's step, counted from 0. before, after: norms of the shard."""

    step: int
    name: str
    before: float
    after: float

    @property
    def factor(self) -> float:
        """The ratio of the norms; infinite if the norm is no longer finite."""
        return self.after / self.before if math.isfinite(self.after) else math.inf

    def text(self, rank: int) -> str:
        """Return the growth as a clause of an error message."""
        growth = f"grow {self.factor:,.0f}-fold" if math.isfinite(self.factor) else "infinite or NaN"
        norms = f"norm {self.before:.4g} to {self.after:.4g}"
        return f"the update of step {self.step + 1} made weight {self.name} of rank {rank} {growth} ({norms})"


class WeightGrowth:
    """Norms of this rank's weights. It never communicates, and only `largest` synchronizes with the device.

    tensors: see `StateDigest`; tensors of kind "weight" are read once per update.
    """

    def __init__(self, tensors: Callable[[], Iterable[StateTensor]]):
        self._tensors = tensors
        self._names: list[str] = []
        # (step, norms) after each update
        self._norms: deque[tuple[int, Tensor]] = deque(maxlen=_UPDATES + 1)

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Record the norms after an update. step: counted from 0; -1 before the first update."""
        weights = [(name, part) for kind, name, part in self._tensors() if kind == WEIGHT and part.numel()]
        self._names = [plain_name(name) for name, _ in weights]
        if weights:
            norms = [torch.linalg.vector_norm(part).double() for _, part in weights]
            self._norms.append((step, torch.stack(norms)))

    def forget(self) -> None:
        """Discard all norms, because other weights were loaded."""
        self._norms.clear()

    def largest(self) -> Growth | None:
        """Return the largest growth in the first recorded update that multiplied a norm by more than LARGE_GROWTH.

        Returns None if no update did. Weights that were zero may grow to any norm. Only this rank's shards are compared.
        """
        for (_, before), (step, after) in zip(self._norms, list(self._norms)[1:], strict=False):
            # comparisons with NaN are false
            grown = ~(after <= before * LARGE_GROWTH) & (before > 0) & before.isfinite()
            if bool(grown.any()):
                factors = torch.where(grown, (after / before).nan_to_num(math.inf, math.inf), 0.0)
                at = int(factors.argmax())
                return Growth(step, self._names[at], float(before[at]), float(after[at]))
        return None
