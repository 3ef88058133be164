"""Find the update that made a weight grow: norms of all weights are kept after updates, and compared when a step is refused."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.training.engines.engine import WEIGHT, StateTensor
from distattn.training.module_observer import plain_name

# an update that makes a weight's norm this many times larger has destroyed it
LARGE_GROWTH = 1000.0
# norms are kept for this many of the last updates
_UPDATES = 16


class Growth(NamedTuple):
    """The growth of a weight of a rank. step: of the update, from 0; before, after: the norm of this rank's part."""

    step: int
    name: str
    before: float
    after: float

    @property
    def factor(self) -> float:
        """Return how many times larger the norm became; infinite where it is not finite any more."""
        return self.after / self.before if math.isfinite(self.after) else math.inf

    def text(self, rank: int) -> str:
        """Return the growth as a clause for people."""
        how = f"grow {self.factor:,.0f}-fold" if math.isfinite(self.factor) else "infinite or NaN"
        norms = f"norm {self.before:.4g} to {self.after:.4g}"
        return f"the update of step {self.step + 1} made weight {self.name} of rank {rank} {how} ({norms})"


class WeightGrowth:
    """Remembers the norms of this rank's weights. Nothing is sent, and no device is waited for, until `largest` is called.

    tensors: as for `StateDigest`; those of the kind "weight" are read once an update.
    """

    def __init__(self, tensors: Callable[[], Iterable[StateTensor]]):
        self._tensors = tensors
        self._names: list[str] = []
        # (step, norms) after each update
        self._norms: deque[tuple[int, Tensor]] = deque(maxlen=_UPDATES + 1)

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Take the norms after the update of a step, counted from 0; -1 before the first."""
        weights = [(name, part) for kind, name, part in self._tensors() if kind == WEIGHT and part.numel()]
        self._names = [plain_name(name) for name, _ in weights]
        if weights:
            norms = [torch.linalg.vector_norm(part).double() for _, part in weights]
            self._norms.append((step, torch.stack(norms)))

    def forget(self) -> None:
        """Begin anew: other weights were loaded."""
        self._norms.clear()

    def largest(self) -> Growth | None:
        """Return the first of the last updates that made a weight of this rank grow LARGE_GROWTH times, and the weight that grew
        most; None where none did. Weights that were zero may become anything."""
        for (_, before), (step, after) in zip(self._norms, list(self._norms)[1:], strict=False):
            # comparisons with NaN are false
            grown = ~(after <= before * LARGE_GROWTH) & (before > 0) & before.isfinite()
            if bool(grown.any()):
                factors = torch.where(grown, (after / before).nan_to_num(math.inf, math.inf), 0.0)
                at = int(factors.argmax())
                return Growth(step, self._names[at], float(before[at]), float(after[at]))
        return None
