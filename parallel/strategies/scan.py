"""Scan: every rank reads its own tokens of a recurrence, and states move from stretch to stretch.

A document is a chain of stretches, each at the rank that owns its tokens. The state that enters a stretch sums up all before it.
Either the state is handed on and ranks compute one after the other ("in_turn"), or every rank first makes the state of its
stretch alone, in a pass over its keys that is cheaper than the whole, and states are put together while they move:

    gathered    every stretch's state goes to all ranks that have a later one (Sun et al. 2025, arXiv 2502.07563)
    by_heads    each rank puts together the states of a share of the heads, and sends each stretch what precedes it
    by_halves   up and down a tree of stretches (Blelloch 1990, "Prefix sums and their applications")

The backward pass is the same in a mirror: the token axis from its end, and gradients of states. The layout may be any.
"""

# R ranks, N tokens on the axis, H heads

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from distattn.cluster.spec import AnyCluster
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout
from distattn.ir.plan import (
    MOVE_COLUMNS,
    Call,
    Columns,
    Payload,
    Table,
    concat_rows,
    has_rows_and_keys,
    select_rows,
)
from distattn.parallel.tables.held_states import HeldState, HeldStates
from distattn.parallel.tables.routes import remote_users, reversed_moves, send_direct

# in turn, as many groups of heads follow each other from rank to rank
_GROUPS_IN_TURN = 8
# a document that is read in turn while others' states are put together has at most so many
_FEW_STRETCHES = 3


@dataclass(frozen=True)
class ScanOptions:
    """schedule: "in_turn", "gathered", "by_heads", "by_halves", or "auto": the fastest in simulation, else by heads.

    state_first: whether the first stretch of a document, which waits for nothing, gives its state before it is computed whole.
    head_groups: in turn, so many groups of heads follow each other; with equal bits on any number of ranks.
    """

    schedule: str = "auto"
    state_first: bool = False
    head_groups: int = 1

    def __post_init__(self) -> None:
        if self.schedule != "auto" and self.schedule not in SCHEDULES:
            raise DistattnError(f"scan's schedule is one of auto, {', '.join(SCHEDULES)}, not {self.schedule!r}.")
        if self.head_groups < 1:
            raise DistattnError(f"head_groups is at least 1, not {self.head_groups}.")


class Stretch(NamedTuple):
    """Tokens [t0, t1) of a document, computed at `rank`."""

    t0: int
    t1: int
    rank: int


class Chain(NamedTuple):
    """Who computes a document for heads [h0, h1): stretches in the order in which the state passes."""

    piece: int
    t0: int
    t1: int
    h0: int
    h1: int
    stretches: list[Stretch]

    def mirrored(self) -> Chain:
        """The same for gradients: from the end of the document to its start."""
        return self._replace(stretches=self.stretches[::-1])


class Compute(NamedTuple):
    """Stretch number `stretch` of a chain: the whole of it, or only its state."""

    step: int
    stretch: int
    whole: bool


class Send(NamedTuple):
    """The state of stretches [first, end) of a chain, for heads [h0, h1)."""

    step: int
    src: int
    dst: int
    first: int
    end: int
    h0: int
    h1: int


# (chain, ranks) -> what is computed and sent, in steps
Schedule = Callable[[Chain, int], tuple[list[Compute], list[Send]]]


def scan(
    call: Call,
    cluster: AnyCluster | None = None,
    options: ScanOptions = ScanOptions(),
    direction: str = "forward",
    working_layout: Layout | None = None,
) -> Iterable[Table]:
    """Tables of one direction, the backward's too; one for each schedule that may be the fastest.

    working_layout: tokens are computed where it has them; they are sent there and results come back.
    """
    layout = working_layout or call.layout
    if options.schedule != "auto":
        yield scan_table(call, layout_chains(call, layout, options.head_groups), _schedule(options), direction)
        return
    chains = layout_chains(call, layout)
    yield scan_table(call, chains, _schedule(options, "by_heads"), direction)
    for name in ("gathered", "by_halves"):
        yield scan_table(call, chains, _schedule(options, name), direction)
    yield scan_table(call, chains, partial(by_heads, state_first=True), direction)
    # documents of few stretches in turn, in the time that the long ones take
    mixed = [in_turn if len(chain.stretches) <= _FEW_STRETCHES else by_heads for chain in chains]
    if in_turn in mixed and by_heads in mixed:
        yield scan_table(call, chains, mixed, direction)
    for groups in sorted({1, min(_GROUPS_IN_TURN, call.heads)}):
        yield scan_table(call, layout_chains(call, layout, groups), in_turn, direction)


def scan_table(call: Call, chains: Sequence[Chain], schedule: Schedule | Sequence[Schedule], direction: str) -> Table:
    """The table of chains, each by the schedule or by its own."""
    back = direction == "backward"
    payload = Payload.dS if back else Payload.S
    tasks, moves = [], []
    schedules = [schedule] * len(chains) if callable(schedule) else schedule
    for chain, plan_chain in zip(chains, schedules, strict=True):
        path = chain.mirrored() if back else chain
        computes, sends = plan_chain(path, call.ranks)
        for step, number, whole in computes:
            t0, t1, rank = path.stretches[number]
            if whole:
                box = (t0, chain.t1 if back else t1, chain.t0, t1)
            else:
                box = (t0, t1, t1, t1) if back else (t0, t0, t0, t1)
            # a step before the first is left for tokens that move
            tasks.append((step + 1, rank, chain.piece, *box, chain.h0, chain.h1))
        for step, src, dst, first, end, h0, h1 in _needed(path, computes, sends):
            edges = path.stretches[first], path.stretches[end - 1]
            interval = min(edge.t0 for edge in edges), max(edge.t1 for edge in edges)
            moves.append((step + 1, src, dst, int(payload), *interval, h0, h1))
    table = Table.from_rows(tasks, moves)
    return Table(table.tasks, concat_rows(MOVE_COLUMNS, [table.moves, *_token_moves(call, table, back)]))


def layout_chains(call: Call, layout: Layout, head_groups: int = 1) -> list[Chain]:
    """Every rank computes the tokens that a layout gives it; chains of all groups of heads, a document's one after another."""
    chunks = layout.chunks
    groups = min(head_groups, call.heads)
    bounds = list(pairwise(group * call.heads // groups for group in range(groups + 1)))
    chains = []
    for piece, (t0, t1) in enumerate(call.documents.tolist()):
        inside = (chunks["t0"] < t1) & (chunks["t1"] > t0)
        rows = zip(*(chunks[name][inside].tolist() for name in ("t0", "t1", "rank")), strict=True)
        stretches = [Stretch(max(a, t0), min(b, t1), rank) for a, b, rank in sorted(rows)]
        chains += [Chain(piece, t0, t1, h0, h1, stretches) for h0, h1 in bounds]
    return chains


def in_turn(chain: Chain, ranks: int) -> tuple[list[Compute], list[Send]]:
    """One stretch after the other: nothing is computed twice, and the states that move are the smallest.

    The state of a group of heads is a step behind that of the group before it.
    """
    stretches = chain.stretches
    behind = -(-chain.h0 // max(chain.h1 - chain.h0, 1))
    computes = [Compute(behind + 2 * i, i, True) for i in range(len(stretches))]
    hops = [i for i in range(1, len(stretches)) if stretches[i].rank != stretches[i - 1].rank]
    sends = [Send(behind + 2 * i - 1, stretches[i - 1].rank, stretches[i].rank, 0, i, chain.h0, chain.h1) for i in hops]
    return computes, sends


def gathered(chain: Chain, ranks: int, state_first: bool = False) -> tuple[list[Compute], list[Send]]:
    """Every stretch's state goes to all ranks that have a later one; each puts together what precedes its own."""
    stretches, last = chain.stretches, len(chain.stretches) - 1
    sends = []
    for i, stretch in enumerate(stretches[:-1]):
        users = sorted({later.rank for later in stretches[i + 1 :]} - {stretch.rank})
        sends += [Send(1, stretch.rank, user, i, i + 1, chain.h0, chain.h1) for user in users]
    return _states_then_all([2] * (last + 1), state_first), sends


def by_heads(chain: Chain, ranks: int, state_first: bool = False) -> tuple[list[Compute], list[Send]]:
    """Every rank puts together all states of the document for a share of the heads, and sends each stretch what precedes it."""
    stretches, last = chain.stretches, len(chain.stretches) - 1
    if last < 2:
        return gathered(chain, ranks, state_first)
    sends = []
    heads = chain.h1 - chain.h0
    for rank in range(ranks):
        h0, h1 = (chain.h0 + part * heads // ranks for part in (rank, rank + 1))
        if h0 == h1:
            continue
        sends += [Send(1, one.rank, rank, i, i + 1, h0, h1) for i, one in enumerate(stretches[:-1]) if one.rank != rank]
        sends += [
            Send(2, rank, stretches[i].rank, 0, i, h0, h1) for i in range(1, last + 1) if stretches[i].rank != rank
        ]
    return _states_then_all([3] * (last + 1), state_first), sends


def by_halves(chain: Chain, ranks: int, state_first: bool = False) -> tuple[list[Compute], list[Send]]:
    """Up a tree of stretches, and down again: the steps grow as the logarithm of their number."""
    stretches, last = chain.stretches, len(chain.stretches) - 1
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
        received[first, end] = send(left + 1, stretches[middle - 1].rank, stretches[end - 1].rank, first, middle)
        return max(right, received[first, end])

    def down(first: int, end: int, ready: int) -> None:
        if end - first == 1:
            begins[first] = ready + 1
            return
        middle = (first + end) // 2
        left = send(ready + 1, stretches[end - 1].rank, stretches[middle - 1].rank, 0, first) if first else ready
        down(first, middle, left)
        down(middle, end, max(ready, received[first, end]))

    if last:
        up(0, last + 1)
        down(0, last + 1, -1)
    return _states_then_all(begins, state_first), sends


SCHEDULES: dict[str, Callable[..., tuple[list[Compute], list[Send]]]] = {
    "in_turn": in_turn,
    "gathered": gathered,
    "by_heads": by_heads,
    "by_halves": by_halves,
}


def _schedule(options: ScanOptions, name: str | None = None) -> Schedule:
    name = name or options.schedule
    return in_turn if name == "in_turn" else partial(SCHEDULES[name], state_first=options.state_first)


def _states_then_all(begins: Sequence[int], state_first: bool) -> list[Compute]:
    """States first, then everything; begins: the step at which each stretch may be computed whole.

    What has nothing before it is computed at once and leaves its state by the way, or with `state_first` as all others do: its
    state is there earlier, for the price of another pass over its keys.
    """
    last = len(begins) - 1
    if not last:
        return [Compute(0, 0, True)]
    states = [Compute(0, i, False) for i in range(0 if state_first else 1, last)]
    # with state_first among the last, since nobody waits for it
    first = Compute(max(begins) if state_first else 0, 0, True)
    return [first, *states, *(Compute(begins[i], i, True) for i in range(1, last + 1))]


def _needed(chain: Chain, computes: list[Compute], sends: list[Send]) -> list[Send]:
    """Without sends of what the destination can put together itself (a rank may have several stretches), or nobody needs."""
    needed: list[Send] = []
    for h0, h1 in sorted({(send.h0, send.h1) for send in sends}):
        held: dict[int, list[HeldState]] = {}
        for step, number, whole in computes:
            made = HeldState(0 if whole else number, number + 1, step, None)
            held.setdefault(chain.stretches[number].rank, []).append(made)
        for send in sorted(send for send in sends if (send.h0, send.h1) == (h0, h1)):
            there = held.setdefault(send.dst, [])
            # a single stretch is put together of nothing
            found = HeldStates(there).find(send.first, send.end) if send.end - send.first > 1 else None
            if found is None or found.there > send.step:
                there.append(HeldState(send.first, send.end, send.step, send))
        known_by = {rank: HeldStates(states) for rank, states in held.items()}
        uses = [(chain.stretches[number].rank, 0, number) for _, number, whole in computes if whole and number]
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


def _token_moves(call: Call, table: Table, back: bool) -> list[Columns]:
    """Tokens to where they are computed and results home, where that is not at their owner."""
    tasks, last = table.tasks, table.steps
    whole = select_rows(tasks, has_rows_and_keys(tasks))

    def outward(payload: Payload, some: Columns) -> Columns:
        return send_direct(payload, remote_users(call, payload, some), 0)

    if back:
        home = [reversed_moves(outward(payload, whole), payload, last) for payload in (Payload.dQ, Payload.dKV)]
        return [outward(Payload.dO, tasks), *home]
    inputs = [outward(payload, tasks) for payload in (Payload.Q, Payload.KV)]
    return [*inputs, reversed_moves(outward(Payload.O, whole), Payload.O, last)]
