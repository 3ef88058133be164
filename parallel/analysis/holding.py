"""The proof that every token is held where it is used, and that every partial result leaves once. One check covers both.

A payload is *held* (Q, KV, dO) or *reduced* (O, dQ, dKV). A (token, head) of a held payload arrives at a rank at most once,
before all of its uses, and is used. A (token, head) of a reduced payload leaves a rank at most once, after all contributions to
it, of which there is at least one. The second rule is the first with time and moves reversed, so one routine checks both.

Buffers are counted as the executor allocates them. Tokens of one payload and head range that a rank receives in one step live
from their arrival to the last use of any of them. Partial results that leave together live from the first contribution to any of
them until they leave.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from distattn.ir.cached import cached_property
from distattn.ir.errors import PlanError
from distattn.ir.intervals import (
    Ints,
    expand_ranges,
    lexicographic_argsort,
    merge_intervals,
    overlapping_pairs,
    run_starts,
    sorted_unique,
    stable_argsort,
)
from distattn.ir.plan import (
    HELD_PAYLOADS,
    MOVE_COLUMNS,
    TASK_COLUMNS,
    Call,
    Columns,
    Payload,
    Table,
    move_bytes,
    num_rows,
    select_rows,
    task_token_ranges,
)

MAX_STEP = 1 << 16
_EXTENT = ("rank", "t0", "t1", "h0", "h1", "step")


class _Sentences(NamedTuple):
    """The phrases used in errors."""

    arrives_twice: str
    missing: str
    late: str
    unused: str


_HELD = _Sentences(
    "arrives more than once, or is already held, on", "is missing for", "arrives too late for", "arrives unused"
)
_REDUCED = _Sentences(
    "is sent twice, or by its owner, from", "is never sent after", "was already sent before", "carries nothing"
)


@dataclass(frozen=True)
class BufferLifetimes:
    """The lifetimes of buffers, one row per buffer: its rank, the first and last step in which it is alive, and its bytes."""

    rank: Ints
    first: Ints
    last: Ints
    size: Ints


def check_payload(
    call: Call, table: Table, payload: Payload, direction: str, kept: Columns | None = None
) -> BufferLifetimes:
    """Check the moves and uses of one payload in one table. Return its buffers. Raise PlanError naming the first bad row.

    kept: the moves of the forward table whose tokens the ranks still hold.
    """
    label = f"{direction}: {payload.name}"
    if payload in HELD_PAYLOADS:
        return _HoldingCheck(call, table, payload, label, kept).run()
    mirrored = _HoldingCheck(call, table, payload, label, mirrored=True).run()
    last = table.steps - 1
    moves = moves_of_payloads(table.moves, (payload,))
    # results that arrive in a step are merged at its end, so they live for that step only
    return BufferLifetimes(
        np.concatenate([mirrored.rank, moves["dst"]]),
        np.concatenate([last - mirrored.last, moves["step"]]),
        np.concatenate([last - mirrored.first, moves["step"]]),
        np.concatenate([mirrored.size, move_bytes(call, moves)]),
    )


def moves_of_payloads(moves: Columns, payloads: tuple[Payload, ...]) -> Columns:
    """Return the moves of `payloads`, with their row indices in column `row`."""
    row = np.flatnonzero(np.isin(moves["payload"], [int(payload) for payload in payloads]))
    return {**select_rows(moves, row), "row": row}


def describe_row(rows: Columns, names: tuple[str, ...], i: int) -> str:
    """Format row i for an error message."""
    return "(" + ", ".join(f"{name} {rows[name][i]}" for name in names) + ")"


class _Held(NamedTuple):
    """The held intervals, sorted: [begin, end) on the line defined by `_HoldingCheck.to_line`, and the row of each in
    `holders`."""

    row: Ints
    begin: Ints
    end: Ints


class _Used(NamedTuple):
    """The distinct used intervals, sorted, with the first and last step in which each is used, and every individual use.

    row, step, interval: for each individual use, its row in `uses`, its step, and the index of its interval.
    """

    begin: Ints
    end: Ints
    first: Ints
    last: Ints
    row: Ints
    step: Ints
    interval: Ints


@dataclass(frozen=True)
class _HoldingCheck:
    """A check that each (token, head) is owned, kept or received only once, is held before every use, and is used if it
    arrives.

    mirrored: read the table with time and moves reversed. The check is then that each (token, head) leaves at most once,
    after all contributions to it, and never without a contribution.
    """

    call: Call
    table: Table
    payload: Payload
    label: str
    kept: Columns | None = None
    mirrored: bool = False

    def run(self) -> BufferLifetimes:
        """Run all checks. Return the lifetimes of the buffers for arrivals, with steps counted in the reading direction."""
        held, used = self._held(), self._used()
        self._refuse_second_arrivals(held)
        self._refuse_missing(held, used)
        # match each used interval with the held intervals that it overlaps
        use, holder = overlapping_pairs(held.begin, held.end, used.begin, used.end)
        self._refuse_late(held, used, use, holder)
        self._refuse_unused(held, used)
        last = np.zeros(len(self.holders["step"]), np.int64)
        np.maximum.at(last, held.row[holder], used.last[use])
        return self._lifetimes(last[self.first_move :])

    @property
    def sentences(self) -> _Sentences:
        return _REDUCED if self.mirrored else _HELD

    @cached_property
    def moves(self) -> Columns:
        """The moves of the payload in the reading direction, with their row indices."""
        moves = moves_of_payloads(self.table.moves, (self.payload,))
        if not self.mirrored:
            return moves
        last = self.table.steps - 1
        return {**moves, "step": last - moves["step"], "src": moves["dst"], "dst": moves["src"]}

    @cached_property
    def holders(self) -> Columns:
        """The holders of each (token, head): owners and keepers with step -1, then receivers, from row `first_move` on."""
        chunks, heads = self.call.layout.chunks, self.call.payload_heads(self.payload)
        before = np.full_like(chunks["t0"], -1)
        owners = {"rank": chunks["rank"], "t0": chunks["t0"], "t1": chunks["t1"], "step": before}
        parts = [owners | {"h0": np.zeros_like(before), "h1": np.full_like(before, heads)}]
        if self.kept is not None:
            parts.append({**self.kept, "rank": self.kept["dst"], "step": np.full_like(self.kept["t0"], -1)})
        parts.append({**self.moves, "rank": self.moves["dst"]})
        return {name: np.concatenate([part[name] for part in parts]) for name in _EXTENT}

    @property
    def first_move(self) -> int:
        """The index of the first row of `holders` that is a move."""
        return len(self.holders["rank"]) - len(self.moves["row"])

    @cached_property
    def uses(self) -> Columns:
        """The users of each (token, head), with their steps: tasks first, then moves at their source."""
        tasks = self.table.tasks
        step = self.table.steps - 1 - tasks["step"] if self.mirrored else tasks["step"]
        of_tasks = task_token_ranges(self.call, self.payload, tasks) | {"rank": tasks["rank"], "step": step}
        of_moves = {**self.moves, "rank": self.moves["src"]}
        return {name: np.concatenate([of_tasks[name], of_moves[name]]) for name in _EXTENT}

    @cached_property
    def head_limits(self) -> Ints:
        """The ends of all head ranges, sorted. Holders and users are constant between two adjacent ends."""
        return sorted_unique(
            np.concatenate([rows[name] for rows in (self.holders, self.uses) for name in ("h0", "h1")])
        )

    def to_line(self, rows: Columns) -> tuple[Ints, Ints, Ints]:
        """Map rows to intervals (row, begin, end) on one line that encodes (rank, elementary head range, token)."""
        limits = self.head_limits
        row, head = expand_ranges(np.searchsorted(limits, rows["h0"]), np.searchsorted(limits, rows["h1"]))
        base = (rows["rank"][row] * len(limits) + head) * (self.call.mask.n + 1)
        return row, base + rows["t0"][row], base + rows["t1"][row]

    def _held(self) -> _Held:
        row, begin, end = self.to_line(self.holders)
        order = stable_argsort(begin)
        return _Held(row[order], begin[order], end[order])

    def _used(self) -> _Used:
        # many tasks use the same tokens: reduce the uses to distinct intervals with their first and last step
        row, begin, end = self.to_line(self.uses)
        order = lexicographic_argsort(begin, end)
        row, begin, end = row[order], begin[order], end[order]
        start = run_starts(begin, end)
        interval = np.repeat(np.arange(len(start)), np.diff(np.append(start, len(row))))
        step = self.uses["step"][row]
        first, last = (f.reduceat(step, start) if len(step) else step for f in (np.minimum, np.maximum))
        return _Used(begin[start], end[start], first, last, row, step, interval)

    def _refuse_second_arrivals(self, held: _Held) -> None:
        clash = held.begin[1:] < held.end[:-1]
        if clash.any():
            first = int(np.flatnonzero(clash)[0])
            row = max(int(held.row[first]), int(held.row[first + 1]))
            tokens = f"tokens [{self.holders['t0'][row]}, {self.holders['t1'][row]})"
            raise PlanError(
                f"{self.label} of {tokens} {self.sentences.arrives_twice} rank {self.holders['rank'][row]}."
            )

    def _refuse_missing(self, held: _Held, used: _Used) -> None:
        present = _covered(held.begin, held.end, used.begin, used.end)
        if not present.all():
            row = int(used.row[~present[used.interval]].min())
            raise PlanError(f"{self.label} {self.sentences.missing} {self._user(row)}.")

    def _refuse_late(self, held: _Held, used: _Used, use: Ints, holder: Ints) -> None:
        # the step at the end of which each used interval is completely held
        complete = np.full(len(used.begin), -1)
        np.maximum.at(complete, use, self.holders["step"][held.row[holder]])
        if (complete >= used.first).any():
            row = int(used.row[used.step <= complete[used.interval]].min())
            raise PlanError(f"{self.label} {self.sentences.late} {self._user(row)}.")

    def _refuse_unused(self, held: _Held, used: _Used) -> None:
        _, begin, end = merge_intervals(np.zeros_like(used.begin), used.begin, used.end)
        arrived = self.holders["step"][held.row] >= 0
        unused = ~_covered(begin, end, held.begin[arrived], held.end[arrived])
        if unused.any():
            first = int(np.flatnonzero(unused)[0])
            row = int(self.moves["row"][held.row[arrived][first] - self.first_move])
            shown = describe_row(self.table.moves, MOVE_COLUMNS, row)
            raise PlanError(f"{self.label} of move {row} {shown} {self.sentences.unused}.")

    def _lifetimes(self, last: Ints) -> BufferLifetimes:
        """Join the arrivals for one (rank, step, head range) into one buffer, which lives until the last use of any of them."""
        moves, heads = self.moves, max(self.call.heads, self.call.kv_heads) + 1
        key = ((moves["dst"] * MAX_STEP + moves["step"]) * heads + moves["h0"]) * heads + moves["h1"]
        buffer, row = np.unique(key, return_inverse=True)
        end, size = np.zeros(len(buffer), np.int64), np.zeros(len(buffer), np.int64)
        np.maximum.at(end, row, last)
        # partial results are held at full precision until they leave
        np.add.at(size, row, move_bytes(self.call, moves, in_memory=self.mirrored))
        rank, step = np.divmod(buffer // heads**2, MAX_STEP)
        return BufferLifetimes(rank, step, end, size)

    def _user(self, row: int) -> str:
        """Format the task or move of a row of `uses` for an error."""
        tasks = num_rows(self.table.tasks)
        if row < tasks:
            return f"task {row} {describe_row(self.table.tasks, TASK_COLUMNS, row)}"
        move = self.moves["row"][row - tasks]
        return f"move {move} {describe_row(self.table.moves, MOVE_COLUMNS, move)}"


def _covered(low: Ints, high: Ints, a: Ints, b: Ints) -> np.ndarray:
    """Return whether the sorted, disjoint intervals [low, high) cover each [a_i, b_i) completely, bool."""
    if not len(low):
        return a >= b
    before = np.append(0, np.cumsum(high - low))
    i, j = np.searchsorted(high, a, "right"), np.searchsorted(low, b, "left")
    length = before[np.maximum(j, i)] - before[i]
    length -= np.where(j > i, np.maximum(a - low[np.minimum(i, len(low) - 1)], 0), 0)
    length -= np.where(j > i, np.maximum(high[np.maximum(j - 1, 0)] - b, 0), 0)
    return length == b - a
