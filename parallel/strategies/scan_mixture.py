"""The schedules of a scan's documents that are fastest together, by simulation.

Documents of one stretch wait for nothing: they may fill the steps in which others' states fly. Which schedule suits a longer
one depends on how many stretches it has and how long they are, on whether its ranks share a node, and on what the other
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
from distattn.parallel.strategies.scan_tables import Rows, chain_rows, concatenated, table_of_rows

# in turn, as many groups of heads follow each other from rank to rank
_GROUPS_IN_TURN = 8
# so few documents of several stretches each choose for themselves; of more, those that are alike choose together
_FEW_DOCUMENTS = 6


class Way(NamedTuple):
    """How a document is computed: by a schedule, with its first stretch in a step, in groups of heads (see `scan_schedules`)."""

    schedule: str
    first_whole: int = 0
    head_groups: int = 1

    def rows(self, chain: Chain, ranks: int, direction: str) -> list[Rows]:
        """The tasks and moves of a document, for each group of heads."""
        schedule: Schedule = partial(alone, step=self.first_whole) if self.schedule == "alone" else self._of_states()
        return [chain_rows(part, schedule, ranks, direction) for part in chain.in_head_groups(self.head_groups)]

    def _of_states(self) -> Schedule:
        chosen = SCHEDULES[self.schedule]
        return chosen if self.schedule == "in_turn" else partial(chosen, first_whole=self.first_whole)

    def __str__(self) -> str:
        words = {"alone": "of one stretch"}.get(self.schedule, self.schedule)
        if self.head_groups > 1:
            words += f" in {self.head_groups} groups of heads"
        if self.first_whole == 0:
            return words
        what = "" if self.schedule == "alone" else ", its first stretch"
        return f"{words}{what} {'last' if self.first_whole == LAST_STEP else 'while states move'}"


# for all documents; what users may ask for, too
_SINGLE = (
    Way("by_heads"),
    Way("by_heads", LAST_STEP),
    Way("gathered"),
    Way("gathered", LAST_STEP),
    Way("by_halves"),
    Way("by_halves", LAST_STEP),
    Way("in_turn"),
    Way("in_turn", 0, _GROUPS_IN_TURN),
)
_OF_ONE_STRETCH = (Way("alone"), Way("alone", 1), Way("alone", 2))
# with two stretches one state moves, and schedules differ in what waits for it
_OF_TWO_STRETCHES = (Way("in_turn"), Way("in_turn", 0, _GROUPS_IN_TURN), Way("gathered", 1), Way("gathered", LAST_STEP))
_OF_MORE = (*_SINGLE, Way("gathered", 1), Way("by_heads", 1), Way("by_heads", 2))


def fastest_mixture(
    call: Call,
    chains: Sequence[Chain],
    devices: int,
    direction: str,
    seconds: Callable[[Table], float],
    tokens_move: bool,
) -> Table:
    """The fastest table found, with the ways of its documents as its label.

    devices: of a node. seconds: of a table, simulated. It is asked for a few dozen tables, whatever the number of documents.
    """
    classes = _classes(chains, devices)

    @cache
    def rows_of(number: int, way: Way) -> Rows:
        return concatenated(rows for chain in classes[number] for rows in way.rows(chain, call.ranks, direction))

    def table_of(ways: tuple[Way, ...]) -> Table:
        rows = [rows_of(*named) for named in enumerate(ways)]
        return table_of_rows(call, rows, direction, _label(classes, ways), tokens_move)

    @cache
    def seconds_of(ways: tuple[Way, ...]) -> float:
        return seconds(table_of(ways))

    best = min(((way,) * len(classes) for way in _SINGLE), key=seconds_of)
    improved = True
    while improved:
        improved = False
        for number, chains_of_class in enumerate(classes):
            for way in _ways_of(chains_of_class[0]):
                ways = (*best[:number], way, *best[number + 1 :])
                if seconds_of(ways) < seconds_of(best):
                    best, improved = ways, True
    return table_of(best)


def _ways_of(chain: Chain) -> Sequence[Way]:
    return {1: _OF_ONE_STRETCH, 2: _OF_TWO_STRETCHES}.get(len(chain.stretches), _OF_MORE)


def _classes(chains: Sequence[Chain], devices: int) -> list[list[Chain]]:
    """Documents that choose together, those of most stretches first."""
    several = sum(len(chain.stretches) > 1 for chain in chains)
    found: dict[tuple[int, ...], list[Chain]] = defaultdict(list)
    for chain in chains:
        stretches = len(chain.stretches)
        key: tuple[int, ...] = (stretches,)
        if stretches > 1:
            crosses = len({stretch.rank // devices for stretch in chain.stretches}) > 1
            # stretches in powers of two from 4 on, tokens in powers of four
            alike = min(stretches, 2 + stretches.bit_length()), crosses, (chain.t1 - chain.t0).bit_length() // 2
            key = (stretches, chain.piece) if several <= _FEW_DOCUMENTS else alike
        found[key].append(chain)
    return sorted(found.values(), key=lambda alike: -len(alike[0].stretches))


def _label(classes: Sequence[Sequence[Chain]], ways: Sequence[Way]) -> str:
    count: Counter[str] = Counter()
    for chains, way in zip(classes, ways, strict=True):
        one_stretch = len(chains[0].stretches) == 1 and way.schedule != "alone"
        count[str(Way("alone") if one_stretch else way)] += len(chains)
    return "; ".join(f"{number:,} {words}" for words, number in count.items())
