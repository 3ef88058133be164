"""Which ranks share a node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints, as_int64


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines of `devices` ranks each; rank r is on node r // devices."""

    nodes: int
    devices: int

    def __post_init__(self) -> None:
        for name in ("nodes", "devices"):
            if int(as_int64(getattr(self, name), name)) < 1:
                raise DistattnError(f"a cluster has at least 1 of {name}, not {getattr(self, name)}.")

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices

    @property
    def node(self) -> Ints:
        """The node of each rank."""
        return np.arange(self.ranks) // self.devices
