"""The barriers of a program: mbarriers, which count arrivals and bytes per phase, and named barriers, which count
threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import BarrierError
from .memory import SHARED_BASE

# the largest byte count of an mbarrier
_MOST_BYTES = (1 << 20) - 1


@dataclass
class MBarrier:
    """An mbarrier: the arrivals and bytes that its current phase still waits for, and the phase's number."""

    address: int
    count: int
    pending: int = 0
    bytes: int = 0
    phase: int = 0

    def __post_init__(self) -> None:
        self.pending = self.count

    def arrive(self, expected_bytes: int = 0) -> None:
        """Add `expected_bytes` to the bytes that the phase waits for, then count one arrival."""
        if not self.pending:
            raise BarrierError(f"{self} gets more arrivals than its {self.count}")
        self._add(expected_bytes)
        self.pending -= 1
        self._flip()

    def complete(self, size: int) -> None:
        """Count `size` bytes as landed."""
        self._add(-size)
        self._flip()

    def passed(self, parity: int) -> bool:
        """Return whether the phase with the given parity is over. It is the current phase or the previous phase."""
        return self.phase % 2 != parity

    def _add(self, size: int) -> None:
        self.bytes += size
        if abs(self.bytes) > _MOST_BYTES:
            raise BarrierError(f"{self} counts more bytes than it can hold")

    def _flip(self) -> None:
        if not self.pending and not self.bytes:
            self.phase += 1
            self.pending = self.count

    def __str__(self) -> str:
        return (
            f"the mbarrier at byte {self.address - SHARED_BASE} of shared memory (phase {self.phase}: "
            f"{self.pending} of {self.count} arrivals and {self.bytes} bytes to come)"
        )


@dataclass
class NamedBarrier:
    """One of the sixteen barriers of bar.sync: the warps that have arrived, and how often all warps have passed."""

    number: int
    warps: int = 0
    arrived: set[int] = field(default_factory=set)
    passes: int = 0

    def arrive(self, warp: int, warps: int) -> int:
        """Count the arrival of a warp. Return the number of the pass that it waits for, which takes `warps` arrivals."""
        if self.arrived and self.warps != warps:
            raise BarrierError(f"barrier {self.number} is used by {self.warps} and by {warps} warps at a time")
        if warp in self.arrived:
            raise BarrierError(f"warp {warp} arrives at barrier {self.number} twice")
        self.warps = warps
        self.arrived.add(warp)
        wanted = self.passes + 1
        if len(self.arrived) == warps:
            self.arrived.clear()
            self.passes = wanted
        return wanted

    def __str__(self) -> str:
        return f"barrier {self.number}, where {len(self.arrived)} of {self.warps} warps are"
