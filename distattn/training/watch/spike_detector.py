"""Detects numbers far above their usual values, by median and median absolute deviation; single outliers change
neither.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

# minimum deviation, as a share of the median: on a curve that hardly scatters, smaller excesses are rounding or noise
_LEAST_DEVIATION = 0.01


class SpikeDetector:
    """Detector for one curve. A value is a spike above median + threshold * deviation of the last `window` finite
    values.

    The deviation is the median of |value - median|, or 1 % of the median where that is more. Spikes count among the
    last values, too: after half a window of them they are usual. With n values, fewer than a window, the deviation is
    at least 0.01 + early / n of the median, since the first values of a curve do not show how far it scatters. The
    first value is never a spike.
    """

    def __init__(self, window: int, threshold: float, early: float = 1.0):
        self.window, self.threshold, self._early = window, threshold, early
        self._last: deque[float] = deque(maxlen=window)

    def limit(self) -> float:
        """Return the limit that a value must not exceed; infinite before the first value, or without a window."""
        count = len(self._last)
        if not count:
            return math.inf
        median = statistics.median(self._last)
        deviation = statistics.median(abs(value - median) for value in self._last)
        least = _LEAST_DEVIATION + (self._early / count if count < self.window else 0.0)
        return median + self.threshold * max(deviation, least * abs(median))

    def add(self, value: float) -> None:
        """Count a value among the last ones, unless it is not finite."""
        if math.isfinite(value):
            self._last.append(value)

    def values(self) -> list[float]:
        """Return the last values, oldest first."""
        return list(self._last)

    def load(self, values: Sequence[float]) -> None:
        """Replace the last values by these; the newest ones that fit into the window are kept."""
        self._last = deque(map(float, values), maxlen=self.window)
