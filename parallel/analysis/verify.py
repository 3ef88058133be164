"""The proof of a plan: every allowed cell computed once, every input present when used, every result brought home.

`verify` reads only the tables, the mask and the layout; it knows no strategy. Holding (Q, KV, dO) and accumulating
(O, dQ, dKV) payloads are one rule: accumulating is holding with time and arrows reversed. Everything is sorts, joins
and prefix sums over whole columns.

Buffers are counted in *batches*: what one rank receives of one payload, step and head range lives from arrival to the
last use of any of it; partial results that leave together live from the first of them to the leaving. The executor
allocates exactly these.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.ir.bands import K0, K1, Q0, Q1, areas, tighten
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
    BACKWARD_PAYLOADS,
    FORWARD_PAYLOADS,
    HELD_PAYLOADS,
    MOVE_COLUMNS,
    TASK_COLUMNS,
    Call,
    Columns,
    Payload,
    Plan,
    Table,
    move_bytes,
    num_rows,
    select_rows,
    task_areas,
    task_bands,
    task_token_ranges,
)
from distattn.parallel.analysis.disjoint import first_overlap

_MAX_STEP = 1 << 16
# what went wrong with a holding payload, and with an accumulating one (the same check in reversed time)
_SENTENCES = {
    False: ("comes twice, or to its holder, at", "is not at hand for", "comes too late for", "arrives unused"),
    True: ("leaves twice, or from its owner, at", "is left behind by", "has already left at", "carries nothing"),
}


@dataclass(frozen=True)
class Proof:
    """What was proven of a plan, and what it costs in memory.

    forward_peak, backward_peak: per rank, the most bytes of received tensors and of partial results for other ranks
    alive at once in one pass; `kept` bytes excluded. kept: bytes per rank that stay from forward to backward, per
    attention call (policy "keep"; they are alive during both passes).
    """

    digest: str
    forward_peak: Ints
    backward_peak: Ints
    kept: Ints


@dataclass(frozen=True)
class BufferLifetimes:
    """Lifetimes of buffers: rank, first and last step, bytes; one row per batch."""

    rank: Ints
    first: Ints
    last: Ints
    size: Ints


def verify(plan: Plan, max_buffer_bytes: int | None = None) -> Proof:
    """Prove a plan, or raise PlanError naming the first offending row (numbered within its canonical table).

    capacity: bytes of buffers a rank may need at once in one pass, beside what is kept; no limit by default.
    """
    call = plan.call
    forward = _verify_table(call, plan.forward, "forward", FORWARD_PAYLOADS, None)
    kept = _rows_of(plan.forward.moves, (Payload.Q, Payload.KV)) if plan.policy == "keep" else None
    backward = _verify_table(call, plan.backward, "backward", BACKWARD_PAYLOADS, kept)
    staying = np.zeros(call.ranks, np.int64)
    if kept is not None:
        np.add.at(staying, kept["dst"], move_bytes(call, kept))
        forward = {payload: batches for payload, batches in forward.items() if payload == Payload.O}
    proof = Proof(plan.digest, _peak(call, forward), _peak(call, backward), staying)
    if max_buffer_bytes is not None:
        check_max_buffer_bytes(proof, max_buffer_bytes)
    return proof


def check_max_buffer_bytes(proof: Proof, max_buffer_bytes: int) -> None:
    """Raise PlanError where a rank needs more bytes of buffers at once than `capacity`; the same on every rank."""
    for direction, peak in (("forward", proof.forward_peak), ("backward", proof.backward_peak)):
        if peak.max() > max_buffer_bytes:
            rank = int(peak.argmax())
            raise PlanError(
                f"{direction}: rank {rank} needs {peak[rank]:,} bytes of buffers, "
                f"more than max_buffer_bytes = {max_buffer_bytes:,}."
            )


def _verify_table(
    call: Call, table: Table, direction: str, payloads: tuple[Payload, ...], kept: Columns | None
) -> dict[Payload, BufferLifetimes]:
    _Rows(call, table, direction).check(payloads)
    _check_coverage(call, table.tasks, direction)
    lives = {}
    for payload in payloads:
        staying = (
            select_rows(kept, kept["payload"] == payload)
            if kept is not None and payload in (Payload.Q, Payload.KV)
            else None
        )
        if payload in HELD_PAYLOADS:
            lives[payload] = _check_holding(call, table, payload, f"{direction}: {payload.name}", staying)
        else:
            lives[payload] = _check_accumulating(call, table, payload, f"{direction}: {payload.name}")
    return lives


@dataclass(frozen=True)
class _Rows:
    """Are the numbers in range, before anything is computed with them?"""

    call: Call
    table: Table
    direction: str

    def check(self, payloads: tuple[Payload, ...]) -> None:
        call, tasks, moves = self.call, self.table.tasks, self.table.moves
        self._refuse(
            "task", tasks, TASK_COLUMNS, _outside(tasks["piece"], len(call.mask.pieces)), "names no piece of the mask"
        )
        self._refuse("task", tasks, TASK_COLUMNS, _outside(tasks["rank"], call.ranks), f"is at no rank of {call.ranks}")
        bad = _not_inside(tasks, "q", call.mask.n) | _not_inside(tasks, "k", call.mask.n)
        self._refuse("task", tasks, TASK_COLUMNS, bad, f"has an empty or impossible rectangle on {call.mask.n} tokens")
        bad = _not_inside(tasks, "h", call.heads) | _outside(tasks["step"], _MAX_STEP)
        self._refuse("task", tasks, TASK_COLUMNS, bad, f"has an impossible step or head range of {call.heads} heads")
        known = np.isin(moves["payload"], [int(payload) for payload in payloads])
        self._refuse(
            "move", moves, MOVE_COLUMNS, ~known, f"carries a payload that is not one of {[p.name for p in payloads]}"
        )
        bad = _outside(moves["src"], call.ranks) | _outside(moves["dst"], call.ranks) | (moves["src"] == moves["dst"])
        self._refuse("move", moves, MOVE_COLUMNS, bad, f"does not go from one to another of {call.ranks} ranks")
        heads = np.array([call.payload_heads(payload) for payload in Payload])[moves["payload"]]
        bad = _not_inside(moves, "t", call.mask.n) | _not_inside(moves, "h", heads) | _outside(moves["step"], _MAX_STEP)
        self._refuse("move", moves, MOVE_COLUMNS, bad, "has an impossible step, token or head range")

    def _refuse(self, kind: str, rows: Columns, names: tuple[str, ...], bad: np.ndarray, why: str) -> None:
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise PlanError(f"{self.direction}: {kind} {i} {_show(rows, names, i)} {why}.")


def _check_coverage(call: Call, tasks: Columns, direction: str) -> None:
    """Tasks are tight rectangles of their pieces, disjoint for every head, and their areas add up to the mask's."""
    bands = task_bands(call.mask, tasks)
    tight = tighten(bands)
    rectangle = np.stack([tasks[name] for name in ("q0", "q1", "k0", "k1")], 1)
    bad = (tight[:, [Q0, Q1, K0, K1]] != rectangle).any(1)
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise PlanError(f"{direction}: task {i} {_show(tasks, TASK_COLUMNS, i)} is not a tight rectangle of its piece.")
    of_piece = call.piece_heads[tasks["piece"]]
    bad = (tasks["h0"] < of_piece[:, 0]) | (tasks["h1"] > of_piece[:, 1])
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise PlanError(
            f"{direction}: task {i} {_show(tasks, TASK_COLUMNS, i)} has heads its piece does not belong to."
        )
    _check_disjoint(tasks, direction)
    work = task_areas(call, tasks, bands)
    done = np.zeros(len(call.mask.pieces), work.dtype)
    np.add.at(done, tasks["piece"], work)
    wanted = areas(call.mask.pieces).astype(work.dtype) * np.diff(call.piece_heads, axis=1)[:, 0]
    if (done != wanted).any():
        i = int(np.flatnonzero(done != wanted)[0])
        raise PlanError(
            f"{direction}: of piece {i}, {wanted[i]} cells x heads are allowed but tasks compute {done[i]}."
        )


def _check_disjoint(tasks: Columns, direction: str) -> None:
    limits = sorted_unique(np.concatenate([tasks["h0"], tasks["h1"]]))
    row, head = expand_ranges(np.searchsorted(limits, tasks["h0"]), np.searchsorted(limits, tasks["h1"]))
    group = tasks["piece"][row] * len(limits) + head
    q0, q1, k0, k1 = (tasks[name][row] for name in ("q0", "q1", "k0", "k1"))
    clash = first_overlap(group, (q0, q1, k0, k1))
    if clash is not None:
        a, b = sorted((int(row[clash[0]]), int(row[clash[1]])))
        raise PlanError(f"{direction}: tasks {a} and {b} compute the same cells ({_show(tasks, TASK_COLUMNS, b)}).")


def _check_holding(
    call: Call, table: Table, payload: Payload, label: str, kept: Columns | None = None, mirrored: bool = False
) -> BufferLifetimes:
    """A (token, head) is owned, kept or received at most once; held before every use; every arrival is used.

    `mirrored` reads the table with time and arrows reversed: at most one departure, after every deposit, never empty.
    """
    comes_twice, missing, late_for, unused = _SENTENCES[mirrored]
    tasks, moves = table.tasks, _rows_of(table.moves, (payload,))
    if mirrored:
        last_step = table.steps - 1
        tasks = {**tasks, "step": last_step - tasks["step"]}
        moves = {**moves, "step": last_step - moves["step"], "src": moves["dst"], "dst": moves["src"]}
    held, first_move = _holders(call, payload, moves, kept)
    used = _uses(call, tasks, payload, moves)
    limits = sorted_unique(np.concatenate([held["h0"], held["h1"], used["h0"], used["h1"]]))
    h_row, h_key0, h_key1 = _keys(call, limits, held)
    u_row, u_key0, u_key1 = _keys(call, limits, used)
    # many tasks use the same tokens: from here on a use is an interval with its first and last step
    u_order = lexicographic_argsort(u_key0, u_key1)
    u_row, u_key0, u_key1 = u_row[u_order], u_key0[u_order], u_key1[u_order]
    start = run_starts(u_key0, u_key1)
    user = np.repeat(np.arange(len(start)), np.diff(np.append(start, len(u_row))))
    u_key0, u_key1 = u_key0[start], u_key1[start]
    step = used["step"][u_row]
    u_first, u_last = (f.reduceat(step, start) if len(step) else step for f in (np.minimum, np.maximum))

    h_order = stable_argsort(h_key0)
    h_row, h_key0, h_key1 = h_row[h_order], h_key0[h_order], h_key1[h_order]
    clash = h_key0[1:] < h_key1[:-1]
    if clash.any():
        first = int(np.flatnonzero(clash)[0])
        later = max(int(h_row[first]), int(h_row[first + 1]))
        where = f"tokens [{held['t0'][later]}, {held['t1'][later]}) {comes_twice} rank {held['rank'][later]}"
        raise PlanError(f"{label} of {where}.")

    present = _covered(h_key0, h_key1, u_key0, u_key1)
    if not present.all():
        raise PlanError(f"{label} {missing} {_user(table, used, int(u_row[~present[user]].min()))}.")
    i, j = overlapping_pairs(h_key0, h_key1, u_key0, u_key1)
    # when all of an interval is there
    complete = np.full(len(start), -1)
    np.maximum.at(complete, i, held["step"][h_row[j]])
    if (complete >= u_first).any():
        raise PlanError(f"{label} {late_for} {_user(table, used, int(u_row[step <= complete[user]].min()))}.")

    _, busy0, busy1 = merge_intervals(np.zeros_like(u_key0), u_key0, u_key1)
    arrived = held["step"][h_row] >= 0
    idle = ~_covered(busy0, busy1, h_key0[arrived], h_key1[arrived])
    if idle.any():
        row = int(moves["row"][h_row[arrived][int(np.flatnonzero(idle)[0])] - first_move])
        raise PlanError(f"{label} of move {row} {_show(table.moves, MOVE_COLUMNS, row)} {unused}.")

    last = np.zeros(len(held["step"]), np.int64)
    np.maximum.at(last, h_row[j], u_last[i])
    # what is summed is held in full width until it leaves
    return _buffer_lifetimes(call, moves, last[first_move:], held=mirrored)


def _check_accumulating(call: Call, table: Table, payload: Payload, label: str) -> BufferLifetimes:
    """A (token, head) leaves a non-owner exactly once, after all deposits there: holding, seen in a mirror."""
    seen = _check_holding(call, table, payload, label, mirrored=True)
    last = table.steps - 1
    moves = _rows_of(table.moves, (payload,))
    # what arrives at a step is merged at its end: alive for that step only
    return BufferLifetimes(
        np.concatenate([seen.rank, moves["dst"]]),
        np.concatenate([last - seen.last, moves["step"]]),
        np.concatenate([last - seen.first, moves["step"]]),
        np.concatenate([seen.size, move_bytes(call, moves)]),
    )


def _rows_of(moves: Columns, payloads: tuple[Payload, ...]) -> Columns:
    """The moves of these payloads, with their row numbers."""
    row = np.flatnonzero(np.isin(moves["payload"], [int(payload) for payload in payloads]))
    return {**select_rows(moves, row), "row": row}


def _holders(call: Call, payload: Payload, moves: Columns, kept: Columns | None) -> tuple[Columns, int]:
    """Who has which (token, head) from which step on: owners and keepers from -1, then receivers (first row returned)."""
    chunks, heads = call.layout.chunks, call.payload_heads(payload)
    owners = {"rank": chunks["rank"], "t0": chunks["t0"], "t1": chunks["t1"]}
    owners |= {"h0": np.zeros_like(chunks["t0"]), "h1": np.full_like(chunks["t0"], heads)}
    parts = [{**owners, "step": np.full_like(chunks["t0"], -1)}]
    if kept is not None:
        parts.append({**kept, "rank": kept["dst"], "step": np.full_like(kept["t0"], -1)})
    first_move = sum(len(part["t0"]) for part in parts)
    parts.append({**moves, "rank": moves["dst"]})
    held = {name: np.concatenate([part[name] for part in parts]) for name in ("rank", "t0", "t1", "h0", "h1", "step")}
    return held, first_move


def _uses(call: Call, tasks: Columns, payload: Payload, moves: Columns) -> Columns:
    """Who needs which (token, head) at which step: tasks, then moves as source."""
    of_tasks = task_token_ranges(call, payload, tasks) | {"rank": tasks["rank"], "step": tasks["step"]}
    of_moves = {**moves, "rank": moves["src"]}
    used = {name: np.concatenate([of_tasks[name], of_moves[name]]) for name in ("rank", "t0", "t1", "h0", "h1", "step")}
    return {**used, "move_row": moves["row"]}


def _keys(call: Call, limits: Ints, rows: Columns) -> tuple[Ints, Ints, Ints]:
    """Rows as intervals of one line: (rank, elementary head range, token) packed. Returns (row, begin, end)."""
    row, head = expand_ranges(np.searchsorted(limits, rows["h0"]), np.searchsorted(limits, rows["h1"]))
    base = (rows["rank"][row] * len(limits) + head) * (call.mask.n + 1)
    return row, base + rows["t0"][row], base + rows["t1"][row]


def _covered(low: Ints, high: Ints, a: Ints, b: Ints) -> np.ndarray:
    """Whether the sorted disjoint intervals [low, high) cover all of [a_i, b_i)."""
    if not len(low):
        return a >= b
    before = np.append(0, np.cumsum(high - low))
    i, j = np.searchsorted(high, a, "right"), np.searchsorted(low, b, "left")
    length = before[np.maximum(j, i)] - before[i]
    length -= np.where(j > i, np.maximum(a - low[np.minimum(i, len(low) - 1)], 0), 0)
    length -= np.where(j > i, np.maximum(high[np.maximum(j - 1, 0)] - b, 0), 0)
    return length == b - a


def _buffer_lifetimes(call: Call, moves: Columns, last: Ints, held: bool) -> BufferLifetimes:
    """Join arrivals of one (rank, step, head range) of a payload: alive until the last use of any of them."""
    heads = max(call.heads, call.kv_heads) + 1
    key = ((moves["dst"] * _MAX_STEP + moves["step"]) * heads + moves["h0"]) * heads + moves["h1"]
    batch, row = np.unique(key, return_inverse=True)
    end, size = np.zeros(len(batch), np.int64), np.zeros(len(batch), np.int64)
    np.maximum.at(end, row, last)
    np.add.at(size, row, move_bytes(call, moves, held))
    rank, step = np.divmod(batch // heads**2, _MAX_STEP)
    return BufferLifetimes(rank, step, end, size)


def _peak(call: Call, lives: dict[Payload, BufferLifetimes]) -> Ints:
    """Most bytes alive at one step, per rank."""
    rank, first, last, size = (
        np.concatenate([np.zeros(0, np.int64), *(getattr(batches, name) for batches in lives.values())])
        for name in ("rank", "first", "last", "size")
    )
    peak = np.zeros(call.ranks, np.int64)
    if not len(rank):
        return peak
    # a running sum over (rank, step) events; releases count after the step they belong to
    event = np.concatenate([rank * (2 * _MAX_STEP) + first, rank * (2 * _MAX_STEP) + last + 1])
    change = np.concatenate([size, -size])
    by_event = np.lexsort((change, event))
    np.maximum.at(peak, np.concatenate([rank, rank])[by_event], np.cumsum(change[by_event]))
    return peak


def _outside(values: Ints, limit: int) -> np.ndarray:
    return (values < 0) | (values >= limit)


def _not_inside(rows: Columns, name: str, limit: int | Ints) -> np.ndarray:
    low, high = rows[name + "0"], rows[name + "1"]
    return (low < 0) | (low >= high) | (high > limit)


def _show(rows: Columns, names: tuple[str, ...], i: int) -> str:
    return "(" + ", ".join(f"{name} {rows[name][i]}" for name in names) + ")"


def _user(table: Table, used: Columns, row: int) -> str:
    tasks = num_rows(table.tasks)
    if row < tasks:
        return f"task {row} {_show(table.tasks, TASK_COLUMNS, row)}"
    move = used["move_row"][row - tasks]
    return f"move {move} {_show(table.moves, MOVE_COLUMNS, move)}"
