"""The schedules of a scan's documents that are fastest together, by simulation.

Documents of one segment wait for nothing: they may fill the steps in which others' states move. Which schedule suits a longer
one depends on how many segments it has and how long they are, on whether its ranks share a node, and on what the other
documents do in the same steps. So the search begins with the best single schedule for all documents, and gives one class of them
after another a schedule of its own wherever that makes the whole faster: it is never slower than any single schedule.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

from distattn.ir.plan import Call, Table
from distattn.parallel.strategies.scan_schedules import LAST_STEP, SCHEDULES, Chain, Schedule, alone
from distattn.parallel.strategies.scan_tables import TableRows, chain_rows, concatenated, ranks_of_chains, table_of_rows

# groups of heads of "sequential" that follow each other from rank to rank
_SEQUENTIAL_HEAD_GROUPS = 8
# so few documents of several segments each choose for themselves; of more, those that are alike choose together
_FEW_DOCUMENTS = 6


class DocumentSchedule(NamedTuple):
    """How a document is computed: by a schedule, with its first segment in a step, in groups of heads (see `scan_schedules`)."""

    schedule: str
    first_whole: int = 0
    head_groups: int = 1

    def rows(self, chain: Chain, ranks: Sequence[int], direction: str) -> list[TableRows]:
        """The tasks and moves of a document, for each group of heads."""
        schedule: Schedule = partial(alone, step=self.first_whole) if self.schedule == "alone" else self._of_states()
        return [chain_rows(part, schedule, ranks, direction) for part in chain.in_head_groups(self.head_groups)]

    def _of_states(self) -> Schedule:
        chosen = SCHEDULES[self.schedule]
        return chosen if self.schedule == "sequential" else partial(chosen, first_whole=self.first_whole)

    def __str__(self) -> str:
        words = {"alone": "of one segment"}.get(self.schedule, self.schedule)
        if self.head_groups > 1:
            words += f" in {self.head_groups} groups of heads"
        if self.first_whole == 0:
            return words
        what = "" if self.schedule == "alone" else ", its first segment"
        return f"{words}{what} {'last' if self.first_whole == LAST_STEP else 'while states move'}"


# for all documents; what users may ask for, too
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
# with two segments one state moves, and schedules differ in what waits for it
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
    """The fastest table found, with the schedules of its documents as its label.

    devices: of a node. seconds: of a table, simulated; it is asked for some two hundred, whatever the number of documents.
    """
    classes, ranks = _classes(chains, devices), ranks_of_chains(chains)

    @cache
    def rows_of(number: int, schedule: DocumentSchedule) -> TableRows:
        return concatenated(rows for chain in classes[number] for rows in schedule.rows(chain, ranks, direction))

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
    """Documents that choose together, those of most segments first."""
    several = sum(len(chain.segments) > 1 for chain in chains)
    found: dict[tuple[int, ...], list[Chain]] = defaultdict(list)
    for chain in chains:
        segments = len(chain.segments)
        key: tuple[int, ...] = (segments,)
        if segments > 1:
            crosses = len({segment.rank // devices for segment in chain.segments}) > 1
            # many segments in powers of two, tokens in powers of four
            alike = min(segments, 2 + segments.bit_length()), crosses, (chain.t1 - chain.t0).bit_length() // 2
            key = (segments, chain.piece) if several <= _FEW_DOCUMENTS else alike
        found[key].append(chain)
    return sorted(found.values(), key=lambda alike: -len(alike[0].segments))


def _label(classes: Sequence[Sequence[Chain]], chosen: Sequence[DocumentSchedule]) -> str:
    count: Counter[str] = Counter()
    for chains, schedule in zip(classes, chosen, strict=True):
        one_segment = len(chains[0].segments) == 1 and schedule.schedule != "alone"
        count[str(DocumentSchedule("alone") if one_segment else schedule)] += len(chains)
    return "; ".join(f"{number:,} {words}" for words, number in count.items())
