"""Whether a number is far above what was usual, by median and median absolute deviation: single outliers change neither."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

# a curve that hardly scatters is given this much of its median as deviation: what is above it is no spike but rounding, or noise
_LEAST_DEVIATION = 0.01


class SpikeDetector:
    """Watches one curve. A value is a spike above median + threshold * deviation of the last `window` finite values.

    The deviation is the median of |value - median|, or 1 % of the median where that is more. Spikes count among the last values,
    too: after half a window of them they are usual. Until the window is full there are no spikes.
    """

    def __init__(self, window: int, threshold: float):
        self.window, self.threshold = window, threshold
        self._last: deque[float] = deque(maxlen=window)

    def limit(self) -> float:
        """What a value must not exceed; infinite while too few are known."""
        if not self.window or len(self._last) < self.window:
            return math.inf
        median = statistics.median(self._last)
        deviation = statistics.median(abs(value - median) for value in self._last)
        return median + self.threshold * max(deviation, _LEAST_DEVIATION * abs(median))

    def add(self, value: float) -> None:
        """Count a value among the last ones, unless it is not finite."""
        if math.isfinite(value):
            self._last.append(value)

    def values(self) -> list[float]:
        """The last values, oldest first."""
        return list(self._last)

    def load(self, values: Sequence[float]) -> None:
        """Take these for the last values, of which the newest that the window holds are kept."""
        self._last = deque(map(float, values), maxlen=self.window)
