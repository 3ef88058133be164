"""The proof of a plan: every allowed cell is computed once, inputs are present when used, and results reach their owners.

`verify` reads only the tables, the mask and the layout, and does not depend on the strategy. All computations are sorts, joins
and prefix sums over whole columns. The rules for moves are checked in `distattn.parallel.analysis.holding`, those for states of
recurrences in `distattn.parallel.analysis.states`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.ir.arguments import checked
from distattn.ir.bands import K0, K1, Q0, Q1, areas, tighten
from distattn.ir.errors import PlanError
from distattn.ir.intervals import Ints, expand_ranges, sorted_unique
from distattn.ir.plan import (
    MOVE_COLUMNS,
    STATE_PAYLOADS,
    TASK_COLUMNS,
    Call,
    Columns,
    Payload,
    Plan,
    cell_counts,
    has_rows_and_keys,
    move_bytes,
    num_rows,
    select_rows,
    task_bands,
)
from distattn.parallel.analysis.disjoint import first_overlap
from distattn.parallel.analysis.holding import MAX_STEP, BufferLifetimes, check_payload, describe_row, moves_of_payloads
from distattn.parallel.analysis.states import begun_with_state, state_lifetimes, trace_states
from distattn.parallel.tables.written_once import written_once


@dataclass(frozen=True)
class Proof:
    """The result of a proof, with the memory that the plan needs.

    forward_peak, backward_peak: for each rank, the peak bytes of received tensors and of partial results for other ranks in one
    pass, not counting `kept`. kept: for each rank, the bytes kept from forward to backward in one call, which are alive during
    both passes.
    """

    digest: str
    forward_peak: Ints
    backward_peak: Ints
    kept: Ints


@checked
def verify(plan: Plan, max_buffer_bytes: int | None = None) -> Proof:
    """Prove a plan, or raise PlanError naming the first wrong row (numbered within its canonical table).

    max_buffer_bytes: the most bytes of buffers that a rank may hold at any one time in a pass, not counting kept tensors. By
    default there is no limit.
    """
    call = plan.call
    forward = _verify_table(plan, "forward", None)
    kept = moves_of_payloads(plan.forward.moves, (Payload.Q, Payload.KV)) if plan.keeps_inputs else None
    backward = _verify_table(plan, "backward", kept)
    if call.written_once:
        for payload in set(call.written_once) - set(written_once(call, plan.forward, plan.backward)):
            raise PlanError(f"two kernel calls add to {payload.name}, which the plan says is written once.")
    kept_bytes = np.zeros(call.ranks, np.int64)
    if kept is not None:
        np.add.at(kept_bytes, kept["dst"], move_bytes(call, kept))
        # kept tensors are counted separately
        forward = {p: buffers for p, buffers in forward.items() if p not in (Payload.Q, Payload.KV)}
    if call.op.is_recurrent and call.op.has_gradient:
        # the states that tasks started from are kept for the backward pass
        reads = select_rows(plan.forward.tasks, begun_with_state(plan.forward.tasks))
        np.add.at(kept_bytes, reads["rank"], (reads["h1"] - reads["h0"]) * call.state_bytes(True))
    proof = Proof(plan.digest, _peak(call, forward), _peak(call, backward), kept_bytes)
    if max_buffer_bytes is not None:
        check_max_buffer_bytes(proof, max_buffer_bytes)
    return proof


def check_max_buffer_bytes(proof: Proof, max_buffer_bytes: int) -> None:
    """Raise PlanError if any rank would ever hold more than max_buffer_bytes of buffers. All ranks raise the same error."""
    for direction, peak in (("forward", proof.forward_peak), ("backward", proof.backward_peak)):
        if peak.max() > max_buffer_bytes:
            rank = int(peak.argmax())
            raise PlanError(
                f"{direction}: rank {rank} needs {peak[rank]:,} bytes of buffers, "
                f"more than max_buffer_bytes = {max_buffer_bytes:,}."
            )


def _verify_table(plan: Plan, direction: str, kept: Columns | None) -> dict[Payload, BufferLifetimes]:
    """Verify one table and return the buffers of each payload."""
    call, table = plan.call, plan.forward if direction == "forward" else plan.backward
    payloads = call.payloads(direction)
    if direction == "backward" and not call.op.has_gradient:
        rows = num_rows(table.tasks) + num_rows(table.moves)
        if rows:
            text = f"{call.op.name} has no gradient, so its table must be empty, but it has {rows} rows."
            raise PlanError(f"{direction}: {text}")
        return {}
    _check_task_numbers(call, table.tasks, direction)
    _check_move_numbers(call, table.moves, direction, payloads)
    if call.op.is_recurrent:
        _check_segments(call, table.tasks, direction)
    else:
        _check_coverage(call, table.tasks, direction)
    buffers = {}
    for payload in payloads:
        if payload in STATE_PAYLOADS:
            buffers[payload] = state_lifetimes(call, payload, trace_states(plan, direction, payload).lives)
            continue
        still_there = None
        if kept is not None and payload in (Payload.Q, Payload.KV):
            still_there = select_rows(kept, kept["payload"] == payload)
        buffers[payload] = check_payload(call, table, payload, direction, still_there)
    return buffers


def _check_task_numbers(call: Call, tasks: Columns, direction: str) -> None:
    """Check that all integers of the tasks are in range before anything is computed from them."""
    _refuse_task(
        _outside(tasks["piece"], len(call.mask.pieces)), tasks, direction, "names a piece that the mask does not have"
    )
    _refuse_task(
        _outside(tasks["rank"], call.ranks), tasks, direction, f"runs on a rank outside the group of {call.ranks}"
    )
    bad = _not_inside(tasks, "q", call.mask.n) | _not_inside(tasks, "k", call.mask.n)
    if call.op.is_recurrent:
        # empty ranges are allowed here and checked by `_check_segments`
        names = ("q0", "q1", "k0", "k1")
        bad = np.logical_or.reduce([(tasks[name] < 0) | (tasks[name] > call.mask.n) for name in names])
    _refuse_task(bad, tasks, direction, f"has an empty or impossible rectangle on {call.mask.n} tokens")
    bad = _not_inside(tasks, "h", call.heads) | _outside(tasks["step"], MAX_STEP)
    _refuse_task(bad, tasks, direction, f"has an impossible step or head range of {call.heads} heads")


def _check_move_numbers(call: Call, moves: Columns, direction: str, payloads: tuple[Payload, ...]) -> None:
    is_valid = np.isin(moves["payload"], [int(payload) for payload in payloads])
    names = [payload.name for payload in payloads]
    _refuse_move(~is_valid, moves, direction, f"carries a payload that is not one of {names}")
    bad = _outside(moves["src"], call.ranks) | _outside(moves["dst"], call.ranks) | (moves["src"] == moves["dst"])
    _refuse_move(bad, moves, direction, f"does not go from one rank to another in the group of {call.ranks}")
    heads = np.array([call.payload_heads(payload) for payload in Payload])[moves["payload"]]
    bad = _not_inside(moves, "t", call.mask.n) | _not_inside(moves, "h", heads) | _outside(moves["step"], MAX_STEP)
    _refuse_move(bad, moves, direction, "has an impossible step, token or head range")


def _check_segments(call: Call, tasks: Columns, direction: str) -> None:
    """Check that every task is a segment of its document, and that every output and gradient is computed once, from all its
    inputs."""
    q0, q1, k0, k1 = (tasks[name] for name in ("q0", "q1", "k0", "k1"))
    backward = direction == "backward"
    whole = has_rows_and_keys(tasks)
    only_state = (q0 == q1) & (k0 <= q0) & (q0 < k1)
    only_gradient = (k0 == k1) & (q0 < k1) & (k1 <= q1) & backward
    good = only_state | only_gradient | (whole & (k0 <= q0) & (q0 < k1) & ((k1 <= q1) if backward else (k1 == q1)))
    document = call.documents[tasks["piece"]]
    inside = (np.minimum(q0, k0) >= document[:, 0]) & (np.maximum(q1, k1) <= document[:, 1])
    _refuse_task(~(good & inside), tasks, direction, "is not a segment of its document with what passes through it")
    complete = select_rows(tasks, whole)
    # outputs depend on all earlier keys; gradients of keys also depend on all later rows
    _check_coverage(call, {**complete, "q1": complete["k1"]}, direction)
    if backward:
        _check_coverage(call, {**complete, "k0": complete["q0"]}, direction)


def _check_coverage(call: Call, tasks: Columns, direction: str) -> None:
    """Check that tasks are tight rectangles of their pieces, do not overlap for any head, and together cover the entire mask."""
    bands = task_bands(call.mask, tasks)
    tight = tighten(bands)
    rectangle = np.stack([tasks[name] for name in ("q0", "q1", "k0", "k1")], 1)
    bad = (tight[:, [Q0, Q1, K0, K1]] != rectangle).any(1)
    _refuse_task(bad, tasks, direction, "is not a tight rectangle of its piece")
    of_piece = call.piece_heads[tasks["piece"]]
    bad = (tasks["h0"] < of_piece[:, 0]) | (tasks["h1"] > of_piece[:, 1])
    _refuse_task(bad, tasks, direction, "has heads that its piece does not apply to")
    _check_disjoint(tasks, direction)
    work = cell_counts(call, tasks, bands)
    done = np.zeros(len(call.mask.pieces), work.dtype)
    np.add.at(done, tasks["piece"], work)
    expected = areas(call.mask.pieces).astype(work.dtype) * np.diff(call.piece_heads, axis=1)[:, 0]
    if (done != expected).any():
        i = int(np.flatnonzero(done != expected)[0])
        raise PlanError(
            f"{direction}: of piece {i}, {expected[i]} cells x heads are allowed but tasks compute {done[i]}."
        )


def _check_disjoint(tasks: Columns, direction: str) -> None:
    limits = sorted_unique(np.concatenate([tasks["h0"], tasks["h1"]]))
    row, head = expand_ranges(np.searchsorted(limits, tasks["h0"]), np.searchsorted(limits, tasks["h1"]))
    group = tasks["piece"][row] * len(limits) + head
    q0, q1, k0, k1 = (tasks[name][row] for name in ("q0", "q1", "k0", "k1"))
    overlap = first_overlap(group, (q0, q1, k0, k1))
    if overlap is not None:
        a, b = sorted((int(row[overlap[0]]), int(row[overlap[1]])))
        raise PlanError(
            f"{direction}: tasks {a} and {b} compute the same cells ({describe_row(tasks, TASK_COLUMNS, b)})."
        )


def _peak(call: Call, buffers: dict[Payload, BufferLifetimes]) -> Ints:
    """Return the most bytes that are alive on each rank in any step, (ranks,)."""
    rank, first, last, size = (
        np.concatenate([np.zeros(0, np.int64), *(getattr(lifetimes, name) for lifetimes in buffers.values())])
        for name in ("rank", "first", "last", "size")
    )
    peak = np.zeros(call.ranks, np.int64)
    if not len(rank):
        return peak
    # a running sum over (rank, step) events; memory is released one step after its last use
    event = np.concatenate([rank * (2 * MAX_STEP) + first, rank * (2 * MAX_STEP) + last + 1])
    change = np.concatenate([size, -size])
    by_event = np.lexsort((change, event))
    np.maximum.at(peak, np.concatenate([rank, rank])[by_event], np.cumsum(change[by_event]))
    return peak


def _refuse_task(bad: np.ndarray, tasks: Columns, direction: str, why: str) -> None:
    _refuse("task", bad, tasks, TASK_COLUMNS, direction, why)


def _refuse_move(bad: np.ndarray, moves: Columns, direction: str, why: str) -> None:
    _refuse("move", bad, moves, MOVE_COLUMNS, direction, why)


def _refuse(kind: str, bad: np.ndarray, rows: Columns, names: tuple[str, ...], direction: str, why: str) -> None:
    """Raise PlanError if `bad` marks any row, naming the first of them."""
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise PlanError(f"{direction}: {kind} {i} {describe_row(rows, names, i)} {why}.")


def _outside(values: Ints, limit: int) -> np.ndarray:
    return (values < 0) | (values >= limit)


def _not_inside(rows: Columns, name: str, limit: int | Ints) -> np.ndarray:
    low, high = rows[name + "0"], rows[name + "1"]
    return (low < 0) | (low >= high) | (high > limit)
