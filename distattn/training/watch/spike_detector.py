"""Detects values far above recent values, by median and median absolute deviation, which single outliers do not move."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

# minimum deviation, as a share of the median: on a smooth curve, smaller deviations are rounding or noise
_LEAST_DEVIATION = 0.01


class SpikeDetector:
    """Detector for one curve. A value is a spike if it exceeds median + threshold * deviation of the last finite values.

    The deviation is the median of |value - median| over the last `window` values, and at least 1 % of the median. Spikes also
    join the window, so a new level counts as usual after half a window. With only n < window values, the deviation is at least
    (0.01 + early / n) times the median, since few values do not show how far a curve scatters. The first value is never a spike.
    """

    def __init__(self, window: int, threshold: float, early: float = 1.0):
        self.window, self.threshold, self._early = window, threshold, early
        self._last: deque[float] = deque(maxlen=window)

    def limit(self) -> float:
        """Return the largest value that is not a spike; infinite before the first value or if window is 0."""
        count = len(self._last)
        if not count:
            return math.inf
        median = statistics.median(self._last)
        deviation = statistics.median(abs(value - median) for value in self._last)
        least = _LEAST_DEVIATION + (self._early / count if count < self.window else 0.0)
        return median + self.threshold * max(deviation, least * abs(median))

    def add(self, value: float) -> None:
        """Add a value to the window unless it is not finite."""
        if math.isfinite(value):
            self._last.append(value)

    def values(self) -> list[float]:
        """Return the values in the window, oldest first."""
        return list(self._last)

    def load(self, values: Sequence[float]) -> None:
        """Replace the window's values with the newest of `values` that fit."""
        self._last = deque(map(float, values), maxlen=self.window)
