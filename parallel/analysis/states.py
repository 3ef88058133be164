"""The proof that every state read in a recurrence is available, sums up exactly its tokens, and arrives only once.

A task computes the state of the tokens that it has read, and a move copies a state. The state is available from the end of that
step on, or from the start if the forward pass has kept it because a task started from it. The state of an interval may be read
if other states tile the interval: they are adjacent, in order, and all available before the step. By induction, each state sums
up its tokens once and in order. The check of coverage (`verify`) forces the keys of every task with outputs to begin where its
document does, so the state that enters a segment sums up all earlier tokens of its document and no others.

The same holds for gradients of states, with the token axis read from its end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from distattn.ir.errors import PlanError
from distattn.ir.intervals import expand_ranges, sorted_unique
from distattn.ir.plan import (
    MOVE_COLUMNS,
    TASK_COLUMNS,
    Call,
    Columns,
    Payload,
    Plan,
    Table,
    has_rows_and_keys,
    num_rows,
    select_rows,
)
from distattn.parallel.analysis.holding import BufferLifetimes, describe_row
from distattn.parallel.tables.held_states import HeldState, HeldStates


class StateOrigin(NamedTuple):
    """The origin of a state: a "task" or "move" of the table, or a task of the forward pass ("kept"), and its row index."""

    kind: str
    row: int


class StateUse(NamedTuple):
    """The states, for heads [h0, h1), that a task reads or a move sends.

    tiles: the states that together tile the interval read, in the order in which the recurrence passes through them.
    """

    user: StateOrigin
    h0: int
    h1: int
    tiles: list[HeldState]


class StateLife(NamedTuple):
    """A state's lifetime on a rank, for tokens [t0, t1) and `heads` heads: from the end of step `there` to step `last`."""

    rank: int
    name: StateOrigin
    heads: int
    t0: int
    t1: int
    there: int
    last: int


class StateTrace(NamedTuple):
    """The uses of one payload's states (empty if all ranks are traced), and the lifetimes of the states used."""

    uses: list[StateUse]
    lives: list[StateLife]


def begun_with_state(tasks: Columns) -> np.ndarray:
    """Return which tasks compute outputs or gradients starting from a state of earlier tokens, bool."""
    return has_rows_and_keys(tasks) & (tasks["k0"] < tasks["q0"])


def trace_states(plan: Plan, direction: str, payload: Payload, rank: int | None = None) -> StateTrace:
    """Find the origin and the uses of every state of a payload, on `rank`, or on all ranks if it is None.

    The uses are returned only for a single rank. Raise PlanError if a state is missing when it is read, arrives twice, or is
    never used.
    """
    table = plan.forward if direction == "forward" else plan.backward
    kept = None
    if direction == "backward" and payload == Payload.S:
        kept = _numbered(plan.forward.tasks, begun_with_state(plan.forward.tasks))
    return _Tracing(plan.call, table, payload, direction, kept, rank).run()


def state_lifetimes(call: Call, payload: Payload, lives: list[StateLife]) -> BufferLifetimes:
    """Convert the lifetimes of states to those of buffers, leaving out the states kept by the forward pass."""
    received = [life for life in lives if life.name.kind != "kept"]
    rank, heads, t0, t1, there, last = (
        np.array([getattr(life, name) for life in received], np.int64)
        for name in ("rank", "heads", "t0", "t1", "there", "last")
    )
    prefix = call.is_prefix(payload, t0, t1)
    size = heads * np.where(prefix, call.state_bytes(True), call.state_bytes(False, in_memory=True))
    return BufferLifetimes(rank, there, last, size)


class _Tracing:
    """A search for one payload's states in one table. For gradients of states, tokens are counted from the end of the axis."""

    def __init__(
        self, call: Call, table: Table, payload: Payload, direction: str, kept: Columns | None, rank: int | None
    ):
        self.call, self.table, self.direction = call, table, direction
        self.label = f"{direction}: {payload.name}"
        self.mirrored = payload == Payload.dS
        tasks = _numbered(table.tasks, np.ones(num_rows(table.tasks), bool))
        moves = _numbered(table.moves, table.moves["payload"] == payload)
        if rank is not None:
            tasks = select_rows(tasks, tasks["rank"] == rank)
            moves = select_rows(moves, (moves["src"] == rank) | (moves["dst"] == rank))
            kept = None if kept is None else select_rows(kept, kept["rank"] == rank)
        if self.mirrored:
            tasks |= self._mirror(tasks, ("q0", "k1"), ("q1", "k0"))
            moves |= self._mirror(moves, ("t0", "t1"))
        self.tasks, self.moves, self.kept, self.rank = tasks, moves, kept, rank
        rows = [tasks, moves, *([] if kept is None else [kept])]
        self.limits = sorted_unique(np.concatenate([part[name] for part in rows for name in ("h0", "h1")]))
        self.held: dict[tuple[int, int], dict[tuple[int, int], HeldState]] = defaultdict(dict)
        # states computed or sent, for which no use has been found yet
        self.unused: dict[tuple[int, int, Hashable], None] = {}

    def run(self) -> StateTrace:
        self._collect()
        held_states = {place: HeldStates(states.values()) for place, states in self.held.items()}
        uses = []
        # maps (rank, head range), then first token, then end token to the last step that uses the interval
        last_uses: dict[tuple[int, int], dict[int, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
        for user, part, rank, t0, t1, step in self._wanted():
            there = held_states[rank, part].there(t0, t1) if (rank, part) in held_states else None
            if there is None:
                raise PlanError(f"{self.label} of {self._tokens(t0, t1)} is missing for {self._show(user)}.")
            if there >= step:
                raise PlanError(f"{self.label} of {self._tokens(t0, t1)} arrives too late for {self._show(user)}.")
            ends = last_uses[rank, part][t0]
            ends[t1] = max(ends.get(t1, -1), step)
            if self.rank is not None:
                tiling = held_states[rank, part].find(t0, t1)
                assert tiling is not None
                uses.append(StateUse(user, int(self.limits[part]), int(self.limits[part + 1]), tiling.states))
        # for each (rank, state): the number of its heads that are used, and the step of their last use
        lives: dict[tuple[int, HeldState], tuple[int, int]] = {}
        for (rank, part), starts in last_uses.items():
            width = int(self.limits[part + 1] - self.limits[part])
            used: dict[HeldState, int] = {}
            for t0, ends in starts.items():
                for state, step in held_states[rank, part].last_uses(t0, ends).items():
                    used[state] = max(used.get(state, -1), step)
            for state, step in used.items():
                self.unused.pop((rank, part, state.name), None)
                heads, before = lives.get((rank, state), (0, -1))
                lives[rank, state] = heads + width, max(before, step)
        for _, _, name in sorted(self.unused, key=lambda place: str(place[2])):
            raise PlanError(f"{self.label} of {self._show(name)} is never used.")
        return StateTrace(uses, [self._life(*place, *life) for place, life in lives.items()])

    def _life(self, rank: int, state: HeldState, heads: int, last: int) -> StateLife:
        assert isinstance(state.name, StateOrigin)
        if state.name.kind == "task":
            # a computed state is held with all of its heads, even if only some are used; all heads of a received state are used
            tasks, row = self.table.tasks, state.name.row
            heads = int(tasks["h1"][row] - tasks["h0"][row])
        return StateLife(rank, state.name, heads, *self._unmirrored(state.t0, state.t1), state.there, last)

    def _collect(self) -> None:
        """Collect all states that ranks ever hold. Ignore a state computed on a rank that already holds it."""
        if self.kept is not None:
            for i, part in self._by_heads(self.kept):
                row, rank, t0, t1 = _ints(self.kept, i, "row", "rank", "k0", "q0")
                self.held[rank, part].setdefault((t0, t1), HeldState(t0, t1, -1, StateOrigin("kept", row)))
        tasks, moves = self.tasks, self.moves
        makes, only_state = self._makes(), tasks["q0"] == tasks["q1"]
        for i, part in self._by_heads(tasks):
            if makes[i]:
                row, rank, t0, t1, step = _ints(tasks, i, "row", "rank", "k0", "k1", "step")
                name = StateOrigin("task", row)
                self.held[rank, part].setdefault((t0, t1), HeldState(t0, t1, step, name))
                if only_state[i]:
                    self.unused[rank, part, name] = None
        for i, part in self._by_heads(moves):
            row, rank, t0, t1, step = _ints(moves, i, "row", "dst", "t0", "t1", "step")
            if self.rank not in (None, rank):
                continue
            name = StateOrigin("move", row)
            if (t0, t1) in self.held[rank, part]:
                raise PlanError(
                    f"{self.label} of {self._show(name)} arrives more than once, or at the rank that computes it."
                )
            self.held[rank, part][t0, t1] = HeldState(t0, t1, step, name)
            self.unused[rank, part, name] = None

    def _makes(self) -> np.ndarray:
        """Return which tasks compute a state of this payload, bool."""
        tasks = self.tasks
        # mirroring a table turns tasks without keys into tasks without rows
        makes = tasks["q0"] == tasks["q1"]
        if self.mirrored or self.direction == "forward":
            makes = makes | has_rows_and_keys(tasks)
        return makes

    def _wanted(self) -> list[tuple[StateOrigin, int, int, int, int, int]]:
        """Return (user, head range, rank, t0, t1, step) for every state that is read."""
        tasks, moves = self.tasks, self.moves
        reads = tasks["k0"] < tasks["q0"]
        out = []
        for i, part in self._by_heads(tasks):
            if reads[i]:
                row, rank, t0, t1, step = _ints(tasks, i, "row", "rank", "k0", "q0", "step")
                out.append((StateOrigin("task", row), part, rank, t0, t1, step))
        for i, part in self._by_heads(moves):
            row, rank, t0, t1, step = _ints(moves, i, "row", "src", "t0", "t1", "step")
            if self.rank in (None, rank):
                out.append((StateOrigin("move", row), part, rank, t0, t1, step))
        return out

    def _by_heads(self, rows: Columns) -> list[tuple[int, int]]:
        """Cut rows at the ends of all head ranges. Return (row, index of the head range) for each part."""
        i, part = expand_ranges(np.searchsorted(self.limits, rows["h0"]), np.searchsorted(self.limits, rows["h1"]))
        return list(zip(i.tolist(), part.tolist(), strict=True))

    def _mirror(self, rows: Columns, *pairs: tuple[str, str]) -> Columns:
        n = self.call.mask.n
        out: Columns = {}
        for a, b in pairs:
            out |= {a: n - rows[b], b: n - rows[a]}
        return out

    def _unmirrored(self, t0: int, t1: int) -> tuple[int, int]:
        n = self.call.mask.n
        return (n - t1, n - t0) if self.mirrored else (t0, t1)

    def _tokens(self, t0: int, t1: int) -> str:
        a, b = self._unmirrored(t0, t1)
        return f"tokens [{a}, {b})"

    def _show(self, name: Hashable) -> str:
        assert isinstance(name, StateOrigin)
        rows, columns = (self.table.moves, MOVE_COLUMNS) if name.kind == "move" else (self.table.tasks, TASK_COLUMNS)
        return f"{name.kind} {name.row} {describe_row(rows, columns, name.row)}"


def _numbered(rows: Columns, chosen: np.ndarray) -> Columns:
    return {**select_rows(rows, chosen), "row": np.flatnonzero(chosen)}


def _ints(rows: Columns, i: int, *names: str) -> tuple[int, ...]:
    return tuple(int(rows[name][i]) for name in names)
