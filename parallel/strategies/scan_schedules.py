"""The schedules of `scan`: the step in which each segment of a document is computed, and the states sent in between.

A document is a chain of segments, each on one rank. Either ranks compute one after another and pass the state on
("sequential"), or every rank first computes only the state of its segment, in a pass over its keys that is cheaper than the
full computation, and states are combined on the way:

    allgather_states  every segment's state goes to all ranks with a later segment (Sun et al. 2025, arXiv 2502.07563)
    head_sharded      each rank combines all states for its share of the heads, and sends each segment the state before it
    tree              states move up and down a tree of segments (Blelloch 1990, "Prefix sums and their applications")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from distattn.parallel.tables.held_states import HeldState, HeldStates

# a step later than any step of a chain
LAST_STEP = 1 << 30


class Segment(NamedTuple):
    """Tokens [t0, t1) of a document, computed on `rank`."""

    t0: int
    t1: int
    rank: int


class Chain(NamedTuple):
    """The segments of a document for heads [h0, h1), in the order in which the state passes through them."""

    piece: int
    t0: int
    t1: int
    h0: int
    h1: int
    segments: list[Segment]

    def mirrored(self) -> Chain:
        """Return the chain for gradients, from the end of the document to its start."""
        return self._replace(segments=self.segments[::-1])

    def in_head_groups(self, groups: int) -> list[Chain]:
        """Split the heads into `groups` groups, or into one per head if there are fewer heads, and return a chain for each
        group."""
        heads = self.h1 - self.h0
        groups = min(groups, heads)
        bounds = [self.h0 + group * heads // groups for group in range(groups + 1)]
        return [self._replace(h0=h0, h1=h1) for h0, h1 in pairwise(bounds)]


class Compute(NamedTuple):
    """The computation of the segment with index `segment` of a chain: in full if `whole`, otherwise only its state."""

    step: int
    segment: int
    whole: bool


class Send(NamedTuple):
    """A message with the state of segments [first, end) of a chain, for heads [h0, h1)."""

    step: int
    src: int
    dst: int
    first: int
    end: int
    h0: int
    h1: int


# maps (chain, participating ranks) to computations and messages
Schedule = Callable[[Chain, Sequence[int]], tuple[list[Compute], list[Send]]]


def sequential(chain: Chain, ranks: Sequence[int]) -> tuple[list[Compute], list[Send]]:
    """Compute one segment after another. Nothing is computed twice, and as few bytes as possible move.

    The state of each head group is one step behind that of the previous group.
    """
    segments = chain.segments
    delay = -(-chain.h0 // max(chain.h1 - chain.h0, 1))
    computes = [Compute(delay + 2 * i, i, True) for i in range(len(segments))]
    hops = [i for i in range(1, len(segments)) if segments[i].rank != segments[i - 1].rank]
    sends = [Send(delay + 2 * i - 1, segments[i - 1].rank, segments[i].rank, 0, i, chain.h0, chain.h1) for i in hops]
    return computes, sends


def alone(chain: Chain, ranks: Sequence[int], step: int = 0) -> tuple[list[Compute], list[Send]]:
    """Compute a single-segment document in `step`, in which its rank may otherwise only wait for other documents' states."""
    return [Compute(step, 0, True)], []


def allgather_states(chain: Chain, ranks: Sequence[int], first_whole: int = 0) -> tuple[list[Compute], list[Send]]:
    """Send every segment's state to all ranks with a later segment. Each rank combines the states before its own."""
    segments, last = chain.segments, len(chain.segments) - 1
    sends = []
    for i, segment in enumerate(segments[:-1]):
        users = sorted({later.rank for later in segments[i + 1 :]} - {segment.rank})
        sends += [Send(1, segment.rank, user, i, i + 1, chain.h0, chain.h1) for user in users]
    return _states_then_all([2] * (last + 1), first_whole), sends


def head_sharded(chain: Chain, ranks: Sequence[int], first_whole: int = 0) -> tuple[list[Compute], list[Send]]:
    """Let every rank combine all states for its share of the heads, and send each segment the state before it."""
    segments, last = chain.segments, len(chain.segments) - 1
    if last < 2:
        return allgather_states(chain, ranks, first_whole)
    sends = []
    heads = chain.h1 - chain.h0
    for share, rank in enumerate(ranks):
        h0, h1 = (chain.h0 + part * heads // len(ranks) for part in (share, share + 1))
        if h0 == h1:
            continue
        sends += [
            Send(1, segment.rank, rank, i, i + 1, h0, h1)
            for i, segment in enumerate(segments[:-1])
            if segment.rank != rank
        ]
        sends += [Send(2, rank, segments[i].rank, 0, i, h0, h1) for i in range(1, last + 1) if segments[i].rank != rank]
    return _states_then_all([3] * (last + 1), first_whole), sends


def tree(chain: Chain, ranks: Sequence[int], first_whole: int = 0) -> tuple[list[Compute], list[Send]]:
    """Combine states up a tree of segments and back down, in a logarithmic number of steps."""
    segments, last = chain.segments, len(chain.segments) - 1
    sends: list[Send] = []
    arrived: dict[tuple[int, int, int], int] = {}
    received: dict[tuple[int, int], int] = {}
    begins = [0] * (last + 1)

    def send(step: int, src: int, dst: int, first: int, end: int) -> int:
        """Send a state, and return the step at the end of which `dst` has it."""
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
    """Return the computations of a chain: states first, then complete segments.

    begins: the first step in which each segment may be computed in full. first_whole: the step in which the first segment is
    computed in full. In step 0, this also gives the segment's state. If the step is later, the state is computed separately,
    like all others, and so is available earlier, at the cost of another pass over the segment's keys.
    """
    last = len(begins) - 1
    if not last:
        return [Compute(0, 0, True)]
    states = [Compute(0, i, False) for i in range(1 if first_whole == 0 else 0, last)]
    # compute the first segment in the last step at the latest, since no rank waits for it
    first = Compute(min(first_whole, max(begins)), 0, True)
    return [first, *states, *(Compute(begins[i], i, True) for i in range(1, last + 1))]


def needed_sends(chain: Chain, computes: list[Compute], sends: list[Send]) -> list[Send]:
    """Drop messages with a state that no rank needs, or that a destination with several segments can combine itself."""
    needed: list[Send] = []
    for h0, h1 in sorted({(send.h0, send.h1) for send in sends}):
        held: dict[int, list[HeldState]] = {}
        for step, number, whole in computes:
            held_state = HeldState(0 if whole else number, number + 1, step, None)
            held.setdefault(chain.segments[number].rank, []).append(held_state)
        for send in sorted(send for send in sends if (send.h0, send.h1) == (h0, h1)):
            held_there = held.setdefault(send.dst, [])
            # a single segment's state cannot be combined from other states
            tiling = HeldStates(held_there).find(send.first, send.end) if send.end - send.first > 1 else None
            if tiling is None or tiling.there > send.step:
                held_there.append(HeldState(send.first, send.end, send.step, send))
        known_by = {rank: HeldStates(states) for rank, states in held.items()}
        uses = [(chain.segments[number].rank, 0, number) for _, number, whole in computes if whole and number]
        used: set[Send] = set()
        while uses:
            rank, first, end = uses.pop()
            tiling = known_by[rank].find(first, end)
            assert tiling is not None, "a schedule brings every state that is needed"
            for state in tiling.states:
                if isinstance(state.name, Send) and state.name not in used:
                    used.add(state.name)
                    uses.append((state.name.src, state.name.first, state.name.end))
        needed += sorted(used)
    return needed
