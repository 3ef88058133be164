"""The kernel launches of a recurrence's tasks on one rank: tasks with the same step, kind and head range share a launch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import numpy as np

from distattn.ir.intervals import Ints, lexicographic_argsort
from distattn.ir.plan import Call, Columns, Payload, has_rows_and_keys, select_rows
from distattn.kernels.recurrence.tokens import Segments
from distattn.parallel.runtime.lowering.launches import TokenIntervals
from distattn.parallel.runtime.lowering.views import ViewParts


class SegmentKind(Enum):
    """What a launch computes: outputs or gradients (WHOLE), states of keys, or gradient states of rows."""

    WHOLE = "whole"
    STATE = "state"
    GRADIENT_STATE = "gradient state"


# maximum number of segments per launch: each needs memory for a state, so packs of short documents take several launches
_MOST_SEGMENTS = 64
_OPERANDS = {
    SegmentKind.WHOLE: (Payload.Q, Payload.KV, Payload.dO),
    SegmentKind.STATE: (Payload.Q, Payload.KV),
    SegmentKind.GRADIENT_STATE: (Payload.Q, Payload.KV, Payload.dO),
}


class SegmentLaunches(NamedTuple):
    """All launches of a table on one rank, sorted by step.

    steps, kinds, heads: one entry per launch. tasks: sorted by launch and token; column `row` is the task's index in the
    table. launch: the index of each task's launch. tokens, shared: the tokens of each launch, once with its value heads and
    once with its query and key heads.
    """

    steps: list[int]
    kinds: list[SegmentKind]
    heads: list[tuple[int, int]]
    tasks: Columns
    launch: Ints
    tokens: TokenIntervals
    shared: TokenIntervals
    shared_payloads: tuple[str, ...]

    @staticmethod
    def of(call: Call, tasks: Columns) -> SegmentLaunches:
        """Group one rank's tasks into launches."""
        kind = np.where(has_rows_and_keys(tasks), 0, np.where(tasks["q0"] == tasks["q1"], 1, 2))
        tasks = {**tasks, "kind": kind}
        by = ("step", "kind", "h0", "h1")
        tasks = select_rows(tasks, lexicographic_argsort(*(tasks[name] for name in (*by, "q0", "k1"))))
        labels = np.stack([tasks[name] for name in by], 1)
        is_first = np.ones(len(labels), bool)
        is_first[1:] = (labels[1:] != labels[:-1]).any(1)
        place = np.arange(len(labels))
        is_first |= (place - np.maximum.accumulate(np.where(is_first, place, 0))) % _MOST_SEGMENTS == 0
        launch, first = np.cumsum(is_first) - 1, np.flatnonzero(is_first)
        h0, h1, group = tasks["h0"], tasks["h1"], call.gqa_group_size
        tokens = TokenIntervals.of(launch, tasks["q0"], tasks["k1"], h0, h1)
        shared = TokenIntervals.of(launch, tasks["q0"], tasks["k1"], h0 // group, -(-h1 // group))
        kinds = [list(SegmentKind)[number] for number in kind_of(tasks, first)]
        heads = list(zip(h0[first].tolist(), h1[first].tolist(), strict=True))
        steps = tasks["step"][first].tolist()
        return SegmentLaunches(steps, kinds, heads, tasks, launch, tokens, shared, call.op.shared_payloads)

    def parts(self, payload: Payload) -> ViewParts:
        """Return one view of a payload for each launch, as parts."""
        return (self.shared if payload.name in self.shared_payloads else self.tokens).parts(payload)

    def uses(self, number: int, payload: Payload) -> bool:
        """Return whether a launch reads or produces a payload."""
        kind = self.kinds[number]
        return payload in _OPERANDS[kind] or (
            kind is SegmentKind.WHOLE and payload in (Payload.O, Payload.dQ, Payload.dKV)
        )

    def schedules(self, prepare: Callable[[Segments], Any]) -> list[SegmentSchedule]:
        """Return the schedule of each launch. prepare: turns segments, given as row ranges of the launch's tensors, into the
        kernel's lists."""
        shift = self.tokens.to_row(self.launch, self.tasks["q0"])
        begin, end = (self.tasks[name] + shift for name in ("q0", "k1"))
        rows = list(zip(begin.tolist(), end.tolist(), strict=True))
        bounds = np.searchsorted(self.launch, np.arange(len(self.steps) + 1)).tolist()
        numbers = self.tasks["row"].tolist()
        return [
            SegmentSchedule(kind, tuple(numbers[a:b]), prepare(tuple(rows[a:b])))
            for kind, (a, b) in zip(self.kinds, itertools.pairwise(bounds), strict=True)
        ]


class SegmentSchedule(NamedTuple):
    """The work of a launch: its kind, the indices of its tasks in the table, and the kernel's schedule for their segments."""

    kind: SegmentKind
    tasks: tuple[int, ...]
    segments: Any


def kind_of(tasks: Columns, first: Ints) -> list[int]:
    """Return the kinds, as integers, of the launches whose first tasks are at indices `first`."""
    return [int(number) for number in tasks["kind"][first]]
