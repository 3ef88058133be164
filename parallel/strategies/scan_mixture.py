"""Search by simulation for the combination of document schedules that makes a scan fastest.

Documents of one segment wait for nothing, so they may fill the steps in which other documents' states move. The best schedule
for a longer document depends on the number and length of its segments, on whether its ranks share a node, and on the other
documents in the same steps. The search therefore starts with the best single schedule for all documents, and then changes the
schedule of one class of documents at a time if that makes the entire scan faster. The result is never slower than a single
schedule.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

from distattn.ir.plan import Call, Table
from distattn.parallel.strategies.scan_schedules import LAST_STEP, SCHEDULES, Chain, Schedule, alone
from distattn.parallel.strategies.scan_tables import (
    TableRows,
    chain_rows,
    concatenate_rows,
    ranks_of_chains,
    table_of_rows,
)

# the number of head groups that "sequential" pipelines from rank to rank
_SEQUENTIAL_HEAD_GROUPS = 8
# up to this number of multi-segment documents, each gets its own schedule; beyond it, similar documents share a schedule
_FEW_DOCUMENTS = 6


class DocumentSchedule(NamedTuple):
    """A way to compute a document: schedule, step of its first segment, and number of head groups (see `scan_schedules`)."""

    schedule: str
    first_whole: int = 0
    head_groups: int = 1

    def rows(self, chain: Chain, ranks: Sequence[int], direction: str) -> list[TableRows]:
        """Return the document's tasks and moves, one pair for each head group."""
        schedule: Schedule = partial(alone, step=self.first_whole) if self.schedule == "alone" else self._of_states()
        return [chain_rows(part, schedule, ranks, direction) for part in chain.in_head_groups(self.head_groups)]

    def _of_states(self) -> Schedule:
        chosen = SCHEDULES[self.schedule]
        return chosen if self.schedule == "sequential" else partial(chosen, first_whole=self.first_whole)

    def __str__(self) -> str:
        name = {"alone": "of one segment"}.get(self.schedule, self.schedule)
        if self.head_groups > 1:
            name += f" in {self.head_groups} groups of heads"
        if self.first_whole == 0:
            return name
        suffix = "" if self.schedule == "alone" else ", its first segment"
        return f"{name}{suffix} {'last' if self.first_whole == LAST_STEP else 'while states move'}"


# candidates that treat all documents alike; users can also request each of them
_SINGLE = (
    DocumentSchedule("head_sharded"),
    DocumentSchedule("head_sharded", LAST_STEP),
    DocumentSchedule("allgather_states"),
    DocumentSchedule("allgather_states", LAST_STEP),
    DocumentSchedule("tree"),
    DocumentSchedule("tree", LAST_STEP),
    DocumentSchedule("sequential"),
    DocumentSchedule("sequential", 0, _SEQUENTIAL_HEAD_GROUPS),
)
_OF_ONE_SEGMENT = (DocumentSchedule("alone"), DocumentSchedule("alone", 1), DocumentSchedule("alone", 2))
# with two segments only one state moves, so schedules differ only in what waits for it
_OF_TWO_SEGMENTS = (
    DocumentSchedule("sequential"),
    DocumentSchedule("sequential", 0, _SEQUENTIAL_HEAD_GROUPS),
    DocumentSchedule("allgather_states", 1),
    DocumentSchedule("allgather_states", LAST_STEP),
)
_OF_MORE = (
    *_SINGLE,
    DocumentSchedule("allgather_states", 1),
    DocumentSchedule("head_sharded", 1),
    DocumentSchedule("head_sharded", 2),
)


def fastest_mixture(
    call: Call,
    chains: Sequence[Chain],
    devices: int,
    direction: str,
    seconds: Callable[[Table], float],
    tokens_move: bool,
) -> Table:
    """Return the fastest table found. Its label names the schedules of its documents.

    devices: devices per node. seconds: a function that simulates a table. It is called about 200 times, regardless of the
    number of documents.
    """
    classes, ranks = _classes(chains, devices), ranks_of_chains(chains)

    @cache
    def rows_of(number: int, schedule: DocumentSchedule) -> TableRows:
        return concatenate_rows(rows for chain in classes[number] for rows in schedule.rows(chain, ranks, direction))

    def table_of(chosen: tuple[DocumentSchedule, ...]) -> Table:
        rows = [rows_of(*named) for named in enumerate(chosen)]
        return table_of_rows(call, rows, direction, _label(classes, chosen), tokens_move)

    @cache
    def seconds_of(chosen: tuple[DocumentSchedule, ...]) -> float:
        return seconds(table_of(chosen))

    best = min(((schedule,) * len(classes) for schedule in _SINGLE), key=seconds_of)
    improved = True
    while improved:
        improved = False
        for number, chains_of_class in enumerate(classes):
            for schedule in _candidates(chains_of_class[0]):
                chosen = (*best[:number], schedule, *best[number + 1 :])
                if seconds_of(chosen) < seconds_of(best):
                    best, improved = chosen, True
    return table_of(best)


def _candidates(chain: Chain) -> Sequence[DocumentSchedule]:
    return {1: _OF_ONE_SEGMENT, 2: _OF_TWO_SEGMENTS}.get(len(chain.segments), _OF_MORE)


def _classes(chains: Sequence[Chain], devices: int) -> list[list[Chain]]:
    """Group the documents that share a schedule. Groups of documents with the most segments come first."""
    num_multi_segment = sum(len(chain.segments) > 1 for chain in chains)
    classes: dict[tuple[int, ...], list[Chain]] = defaultdict(list)
    for chain in chains:
        segments = len(chain.segments)
        key: tuple[int, ...] = (segments,)
        if segments > 1:
            crosses = len({segment.rank // devices for segment in chain.segments}) > 1
            # round large numbers of segments to powers of two, and numbers of tokens to powers of four
            alike = min(segments, 2 + segments.bit_length()), crosses, (chain.t1 - chain.t0).bit_length() // 2
            key = (segments, chain.piece) if num_multi_segment <= _FEW_DOCUMENTS else alike
        classes[key].append(chain)
    return sorted(classes.values(), key=lambda alike: -len(alike[0].segments))


def _label(classes: Sequence[Sequence[Chain]], chosen: Sequence[DocumentSchedule]) -> str:
    count: Counter[str] = Counter()
    for chains, schedule in zip(classes, chosen, strict=True):
        one_segment = len(chains[0].segments) == 1 and schedule.schedule != "alone"
        count[str(DocumentSchedule("alone") if one_segment else schedule)] += len(chains)
    return "; ".join(f"{number:,} {name}" for name, number in count.items())
