"""A rank's work on the states of a recurrence, step by step: the states it computes, sends, receives, combines and frees."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from distattn.ir.intervals import Ints
from distattn.ir.plan import STATE_PAYLOADS, Call, Payload, Plan
from distattn.parallel.analysis.states import StateOrigin, StateTrace, begun_with_state, state_lifetimes, trace_states
from distattn.parallel.runtime.lowering.memory import ALIGNMENT


class StateKey(NamedTuple):
    """A state that a rank holds: its payload (S or dS) and its origin."""

    payload: Payload
    name: StateOrigin


class StatePart(NamedTuple):
    """Heads [h0, h1) of a state, combined from the states `tiles` in the order in which the recurrence passes through them."""

    h0: int
    h1: int
    tiles: tuple[StateKey, ...]


class StateMessage(NamedTuple):
    """Heads [h0, h1) of a state of `tokens` tokens, which the sender combines from `parts` and the receiver stores as `key`.

    is_prefix: the state depends on no earlier state, so its transition is not sent.
    """

    peer: int
    key: StateKey
    h0: int
    h1: int
    tokens: int
    is_prefix: bool
    parts: tuple[StatePart, ...] = ()


class SegmentStates(NamedTuple):
    """The states of one task.

    before: the parts of the state before the segment. after: the parts of the gradient state after it. Either may be empty.
    initial, final: the index of the document that starts (ends) with the segment, or -1. leaves: the key of the state that the
    task leaves behind, if that state is used. is_prefix: that state has no transition. begun: the index, among the states kept
    for the backward pass, of the state that the task starts from, or -1.
    """

    before: tuple[StatePart, ...]
    after: tuple[StatePart, ...]
    initial: int
    final: int
    leaves: StateKey | None
    is_prefix: bool
    begun: int


class KeptState(NamedTuple):
    """The state, for heads [h0, h1), that a forward task starts from, under the key that the backward pass uses."""

    key: StateKey
    h0: int
    h1: int


@dataclass
class StateStep:
    """The states that a rank sends, receives and frees in one step."""

    sends: list[StateMessage] = field(default_factory=list)
    receives: list[StateMessage] = field(default_factory=list)
    release: list[StateKey] = field(default_factory=list)


@dataclass(frozen=True)
class StateProgram:
    """The states of one table on one rank, for each step and for each task index.

    kept: the states that forward tasks start from, kept for the backward pass. kept_bytes: their total size. peak_bytes: the
    peak size of all other states. message_bytes: bytes in the arena for the states that one step sends and receives.
    """

    steps: list[StateStep]
    tasks: dict[int, SegmentStates]
    kept: list[KeptState]
    kept_bytes: int
    peak_bytes: int
    message_bytes: int


def lower_states(plan: Plan, rank: int, direction: str) -> StateProgram:
    """Lower the states in one table of a recurrent call for one rank."""
    call, table = plan.call, plan.forward if direction == "forward" else plan.backward
    payloads = [payload for payload in call.payloads(direction) if payload in STATE_PAYLOADS]
    traces = {payload: trace_states(plan, direction, payload, rank) for payload in payloads}
    parts = {payload: _parts(payload, trace) for payload, trace in traces.items()}
    used = {StateKey(payload, life.name) for payload, trace in traces.items() for life in trace.lives}
    # a table without rows has no steps
    steps = [StateStep() for _ in range(table.steps)]
    _add_moves(plan, rank, direction, steps, parts)
    for payload, trace in traces.items():
        for life in trace.lives:
            steps[life.last].release.append(StateKey(payload, life.name))
    stays = begun_with_state(plan.forward.tasks) & (plan.forward.tasks["rank"] == rank) & call.op.has_gradient
    kept = {int(row): number for number, row in enumerate(stays.nonzero()[0])}
    starts, ends = ({int(t): i for i, t in enumerate(call.documents[:, side])} for side in (0, 1))
    tasks = {}
    columns = {name: column.tolist() for name, column in table.tasks.items()}
    for row in (table.tasks["rank"] == rank).nonzero()[0].tolist():
        q0, q1, k0, k1 = (columns[name][row] for name in ("q0", "q1", "k0", "k1"))
        only_state, name = q0 == q1, StateOrigin("task", row)
        # a task leaves behind the state of its keys or, in a backward table, the gradient state of its rows
        leaves = StateKey(Payload.S if only_state or direction == "forward" else Payload.dS, name)
        tasks[row] = SegmentStates(
            parts[Payload.S].get(name, ()) if k0 < q0 else (),
            parts[Payload.dS].get(name, ()) if k1 < q1 else (),
            starts.get(q0, -1) if k0 == q0 else -1,
            ends.get(k1, -1) if q1 == k1 else -1,
            leaves if leaves in used else None,
            (k0 in starts) if leaves.payload == Payload.S else (q1 in ends),
            kept.get(row, -1) if direction == "forward" else -1,
        )
    h0, h1 = plan.forward.tasks["h0"], plan.forward.tasks["h1"]
    begun = [KeptState(StateKey(Payload.S, StateOrigin("kept", row)), int(h0[row]), int(h1[row])) for row in kept]
    kept_bytes = sum(state.h1 - state.h0 for state in begun) * call.state_bytes(True)
    lives = [state_lifetimes(call, payload, trace.lives) for payload, trace in traces.items()]
    alive = np.zeros(table.steps + 1, np.int64)
    for some in lives:
        np.add.at(alive, some.first, some.size)
        np.add.at(alive, some.last + 1, -some.size)
    peak_bytes = int(np.cumsum(alive).max(initial=0))
    message_bytes = max(
        (sum(_message_bytes(call, message) for message in (*step.sends, *step.receives)) for step in steps), default=0
    )
    return StateProgram(steps, tasks, begun, kept_bytes, peak_bytes, message_bytes)


def _message_bytes(call: Call, message: StateMessage) -> int:
    """Return the bytes of a message's tensors in the arena (B and possibly A), with enough room to align each of them."""
    size = (message.h1 - message.h0) * call.state_bytes(message.is_prefix)
    return -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT


def _add_moves(
    plan: Plan,
    rank: int,
    direction: str,
    steps: list[StateStep],
    parts: dict[Payload, dict[StateOrigin, tuple[StatePart, ...]]],
) -> None:
    call, moves = plan.call, (plan.forward if direction == "forward" else plan.backward).moves
    for payload in parts:
        rows: Ints = (moves["payload"] == payload).nonzero()[0]
        prefix = call.is_prefix(payload, moves["t0"][rows], moves["t1"][rows]).tolist()
        for row, is_prefix in zip(rows.tolist(), prefix, strict=True):
            step, src, dst, t0, t1, h0, h1 = (
                int(moves[name][row]) for name in ("step", "src", "dst", "t0", "t1", "h0", "h1")
            )
            name = StateOrigin("move", row)
            message = StateMessage(dst, StateKey(payload, name), h0, h1, t1 - t0, is_prefix)
            if src == rank:
                steps[step].sends.append(message._replace(parts=parts[payload][name]))
            elif dst == rank:
                steps[step].receives.append(message._replace(peer=src))


def _parts(payload: Payload, trace: StateTrace) -> dict[StateOrigin, tuple[StatePart, ...]]:
    """Return the states that each task reads and each move sends, for each head range. Adjacent ranges with the same states
    are joined."""
    parts_by_user: dict[StateOrigin, list[StatePart]] = defaultdict(list)
    for use in sorted(trace.uses, key=lambda use: (use.user, use.h0)):
        tiles = tuple(StateKey(payload, name) for state in use.tiles if isinstance(name := state.name, StateOrigin))
        parts = parts_by_user[use.user]
        if parts and parts[-1].h1 == use.h0 and parts[-1].tiles == tiles:
            parts[-1] = parts[-1]._replace(h1=use.h1)
        else:
            parts.append(StatePart(use.h0, use.h1, tiles))
    return {user: tuple(parts) for user, parts in parts_by_user.items()}
