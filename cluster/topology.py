"""The ranks that share a node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.ir.arguments import check_fields
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints

_MOST = 1 << 20


@dataclass(frozen=True)
class Cluster:
    """A cluster of `nodes` machines with `devices` ranks each; rank r is on node r // devices."""

    nodes: int
    devices: int

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("nodes", "devices"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise DistattnError(f"a cluster has 1 to {_MOST:,} {name}, not {getattr(self, name)}.")

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices

    @property
    def node(self) -> Ints:
        """The node of each rank, (ranks,)."""
        return np.arange(self.ranks) // self.devices
