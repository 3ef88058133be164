"""The schedules of `scan`: in which steps segments of a document are computed, and which states are sent meanwhile.

A document is a chain of segments, each at a rank. Either the state is passed on and ranks compute one after another
("sequential"), or every rank first computes the state of its segment alone, in a pass over its keys that is cheaper than the
whole, and states are combined while they move:

    allgather_states  every segment's state goes to all ranks that have a later one (Sun et al. 2025, arXiv 2502.07563)
    head_sharded      each rank puts together the states of a share of the heads, and sends each segment what precedes it
    tree              up and down a tree of segments (Blelloch 1990, "Prefix sums and their applications")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from distattn.parallel.tables.held_states import HeldState, HeldStates

# a step that is later than those of any chain
LAST_STEP = 1 << 30


class Segment(NamedTuple):
    """Tokens [t0, t1) of a document, computed at `rank`."""

    t0: int
    t1: int
    rank: int


class Chain(NamedTuple):
    """Who computes a document for heads [h0, h1): segments in the order in which the state passes."""

    piece: int
    t0: int
    t1: int
    h0: int
    h1: int
    segments: list[Segment]

    def mirrored(self) -> Chain:
        """The same for gradients: from the end of the document to its start."""
        return self._replace(segments=self.segments[::-1])

    def in_head_groups(self, groups: int) -> list[Chain]:
        """The same chain for each of so many groups of its heads, or for each head where they are fewer."""
        heads = self.h1 - self.h0
        groups = min(groups, heads)
        bounds = [self.h0 + group * heads // groups for group in range(groups + 1)]
        return [self._replace(h0=h0, h1=h1) for h0, h1 in pairwise(bounds)]


class Compute(NamedTuple):
    """Segment number `segment` of a chain: the whole of it, or only its state."""

    step: int
    segment: int
    whole: bool


class Send(NamedTuple):
    """The state of segments [first, end) of a chain, for heads [h0, h1)."""

    step: int
    src: int
    dst: int
    first: int
    end: int
    h0: int
    h1: int


# (chain, ranks that take part) -> what is computed and sent, in steps
Schedule = Callable[[Chain, Sequence[int]], tuple[list[Compute], list[Send]]]


def sequential(chain: Chain, ranks: Sequence[int]) -> tuple[list[Compute], list[Send]]:
    """One segment after the other: nothing is computed twice, and the states that move are the smallest.

    The state of a group of heads is a step behind that of the group before it.
    """
    segments = chain.segments
    behind = -(-chain.h0 // max(chain.h1 - chain.h0, 1))
    computes = [Compute(behind + 2 * i, i, True) for i in range(len(segments))]
    hops = [i for i in range(1, len(segments)) if segments[i].rank != segments[i - 1].rank]
    sends = [Send(behind + 2 * i - 1, segments[i - 1].rank, segments[i].rank, 0, i, chain.h0, chain.h1) for i in hops]
    return computes, sends


def alone(chain: Chain, ranks: Sequence[int], step: int = 0) -> tuple[list[Compute], list[Send]]:
    """A document of one segment, at a step in which its rank would only wait for others' states."""
    return [Compute(step, 0, True)], []


def allgather_states(chain: Chain, ranks: Sequence[int], first_whole: int = 0) -> tuple[list[Compute], list[Send]]:
    """Every segment's state goes to all ranks that have a later one; each puts together what precedes its own."""
    segments, last = chain.segments, len(chain.segments) - 1
    sends = []
    for i, segment in enumerate(segments[:-1]):
        users = sorted({later.rank for later in segments[i + 1 :]} - {segment.rank})
        sends += [Send(1, segment.rank, user, i, i + 1, chain.h0, chain.h1) for user in users]
    return _states_then_all([2] * (last + 1), first_whole), sends


def head_sharded(chain: Chain, ranks: Sequence[int], first_whole: int = 0) -> tuple[list[Compute], list[Send]]:
    """Every rank puts together all states of the document for a share of the heads, and sends each segment what precedes it."""
    segments, last = chain.segments, len(chain.segments) - 1
    if last < 2:
        return allgather_states(chain, ranks, first_whole)
    sends = []
    heads = chain.h1 - chain.h0
    for share, rank in enumerate(ranks):
        h0, h1 = (chain.h0 + part * heads // len(ranks) for part in (share, share + 1))
        if h0 == h1:
            continue
        sends += [Send(1, one.rank, rank, i, i + 1, h0, h1) for i, one in enumerate(segments[:-1]) if one.rank != rank]
        sends += [Send(2, rank, segments[i].rank, 0, i, h0, h1) for i in range(1, last + 1) if segments[i].rank != rank]
    return _states_then_all([3] * (last + 1), first_whole), sends


def tree(chain: Chain, ranks: Sequence[int], first_whole: int = 0) -> tuple[list[Compute], list[Send]]:
    """Up a tree of segments, and down again: the steps grow as the logarithm of their number."""
    segments, last = chain.segments, len(chain.segments) - 1
    sends: list[Send] = []
    arrived: dict[tuple[int, int, int], int] = {}
    received: dict[tuple[int, int], int] = {}
    begins = [0] * (last + 1)

    def send(step: int, src: int, dst: int, first: int, end: int) -> int:
        """The step at the end of which the state is at `dst`."""
        if src == dst:
            return step - 1
        if (dst, first, end) not in arrived:
            sends.append(Send(step, src, dst, first, end, chain.h0, chain.h1))
            arrived[dst, first, end] = step
        return arrived[dst, first, end]

    def up(first: int, end: int) -> int:
        if end - first == 1:
            return 0
        middle = (first + end) // 2
        left, right = up(first, middle), up(middle, end)
        received[first, end] = send(left + 1, segments[middle - 1].rank, segments[end - 1].rank, first, middle)
        return max(right, received[first, end])

    def down(first: int, end: int, ready: int) -> None:
        if end - first == 1:
            begins[first] = ready + 1
            return
        middle = (first + end) // 2
        left = send(ready + 1, segments[end - 1].rank, segments[middle - 1].rank, 0, first) if first else ready
        down(first, middle, left)
        down(middle, end, max(ready, received[first, end]))

    if last:
        up(0, last + 1)
        down(0, last + 1, -1)
    return _states_then_all(begins, first_whole), sends


SCHEDULES: dict[str, Callable[..., tuple[list[Compute], list[Send]]]] = {
    "sequential": sequential,
    "allgather_states": allgather_states,
    "head_sharded": head_sharded,
    "tree": tree,
}


def _states_then_all(begins: Sequence[int], first_whole: int) -> list[Compute]:
    """States first, then everything; begins: the step at which each segment may be computed whole.

    first_whole: the step at which what has nothing before it is computed. At step 0 it leaves its state by the way. Later, its
    state is made as all others' are: it is there earlier, for the price of another pass over its keys.
    """
    last = len(begins) - 1
    if not last:
        return [Compute(0, 0, True)]
    states = [Compute(0, i, False) for i in range(1 if first_whole == 0 else 0, last)]
    # nobody waits for it after the last step
    first = Compute(min(first_whole, max(begins)), 0, True)
    return [first, *states, *(Compute(begins[i], i, True) for i in range(1, last + 1))]


def needed_sends(chain: Chain, computes: list[Compute], sends: list[Send]) -> list[Send]:
    """Without sends of what the destination can put together itself (a rank may have several segments), or nobody needs."""
    needed: list[Send] = []
    for h0, h1 in sorted({(send.h0, send.h1) for send in sends}):
        held: dict[int, list[HeldState]] = {}
        for step, number, whole in computes:
            made = HeldState(0 if whole else number, number + 1, step, None)
            held.setdefault(chain.segments[number].rank, []).append(made)
        for send in sorted(send for send in sends if (send.h0, send.h1) == (h0, h1)):
            there = held.setdefault(send.dst, [])
            # a single segment is put together of nothing
            found = HeldStates(there).find(send.first, send.end) if send.end - send.first > 1 else None
            if found is None or found.there > send.step:
                there.append(HeldState(send.first, send.end, send.step, send))
        known_by = {rank: HeldStates(states) for rank, states in held.items()}
        uses = [(chain.segments[number].rank, 0, number) for _, number, whole in computes if whole and number]
        wanted: set[Send] = set()
        while uses:
            rank, first, end = uses.pop()
            found = known_by[rank].find(first, end)
            assert found is not None, "a schedule brings every state that is needed"
            for state in found.states:
                if isinstance(state.name, Send) and state.name not in wanted:
                    wanted.add(state.name)
                    uses.append((state.name.src, state.name.first, state.name.end))
        needed += sorted(wanted)
    return needed
