"""Scan: every rank runs a recurrence over its own tokens, and states move from segment to segment.

A document is a chain of segments, each on the rank that owns its tokens. The state that enters a segment sums up everything
before it. `scan_schedules` has the schedules that deliver it. Each document has its own schedule, and `scan_mixture` searches for
the fastest combination. The backward pass mirrors the forward pass: it reads the token axis from the end and moves gradients
of states. Any layout is supported.
"""

# R ranks, N tokens on the axis, H heads

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from distattn.cluster.spec import AnyCluster
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout
from distattn.ir.plan import Call, Table
from distattn.ir.renamed import current_name
from distattn.parallel.strategies.scan_mixture import DocumentSchedule, fastest_mixture
from distattn.parallel.strategies.scan_schedules import LAST_STEP, SCHEDULES
from distattn.parallel.strategies.scan_tables import layout_chains, ranks_of_chains, table_of_rows

# the default if speeds are unknown: it needs few steps, and its bytes per rank hardly depend on the number of ranks
_DEFAULT = "head_sharded"
_RENAMED_SCHEDULES = {
    "in_turn": "sequential",
    "gathered": "allgather_states",
    "by_heads": "head_sharded",
    "by_halves": "tree",
}


@dataclass(frozen=True)
class ScanOptions:
    """Options of `scan`.

    schedule: "sequential", "allgather_states", "head_sharded" or "tree" for all documents, or "auto" to choose the combination
    of schedules that simulates fastest. "auto" needs a cluster description; otherwise it means "head_sharded". state_first:
    compute the state of each document's first segment, which waits for nothing, before its outputs. head_groups: the number of
    head groups that "sequential" pipelines, with bitwise identical results on any number of ranks. When "auto" simulates, it
    ignores `state_first` and `head_groups`.
    """

    schedule: str = "auto"
    state_first: bool = False
    head_groups: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", current_name(self.schedule, _RENAMED_SCHEDULES, "schedule"))
        if self.schedule != "auto" and self.schedule not in SCHEDULES:
            raise DistattnError(f"scan's schedule must be one of auto, {', '.join(SCHEDULES)}, not {self.schedule!r}.")
        if self.head_groups < 1:
            raise DistattnError(f"head_groups must be at least 1, not {self.head_groups}.")


def scan(
    call: Call,
    cluster: AnyCluster | None = None,
    options: ScanOptions = ScanOptions(),
    direction: str = "forward",
    working_layout: Layout | None = None,
    seconds: Callable[[Table], float] | None = None,
) -> Iterable[Table]:
    """Return one candidate table for a direction, "forward" or "backward".

    working_layout: the layout in which tokens are computed, if it is not the call's; tokens are sent to it and results sent
    back. seconds: a function that simulates a table; None if speeds are unknown.
    """
    chains = layout_chains(call, working_layout or call.layout)
    if options.schedule == "auto" and seconds is not None:
        devices = call.ranks if cluster is None else cluster.devices
        return [fastest_mixture(call, chains, devices, direction, seconds, working_layout is not None)]
    name = _DEFAULT if options.schedule == "auto" else options.schedule
    first_whole = LAST_STEP if options.state_first and name != "sequential" else 0
    schedule = DocumentSchedule(name, first_whole, options.head_groups)
    ranks = ranks_of_chains(chains)
    rows = [rows for chain in chains for rows in schedule.rows(chain, ranks, direction)]
    return [table_of_rows(call, rows, direction, str(schedule), working_layout is not None)]
