"""Results of a plan to which no two kernel calls add. They lose nothing if held and sent in the inputs' dtype."""

from __future__ import annotations

import numpy as np

from distattn.ir.intervals import expand_ranges, merge_intervals, numbers_of_rows, sorted_unique, stable_argsort
from distattn.ir.plan import REDUCED_PAYLOADS, Call, Columns, Payload, Table, select_rows, task_token_ranges


def written_once(call: Call, forward: Table, backward: Table) -> tuple[Payload, ...]:
    """Return the payloads in which every number comes from one kernel call, or () if inputs have the accumulation dtype."""
    if call.dtype == call.accumulation_dtype:
        return ()
    tasks = {Payload.O: forward.tasks, Payload.dQ: backward.tasks, Payload.dKV: backward.tasks}
    return tuple(payload for payload in REDUCED_PAYLOADS if _no_two_meet(call, payload, tasks[payload]))


def _no_two_meet(call: Call, payload: Payload, tasks: Columns) -> bool:
    where = task_token_ranges(call, payload, tasks)
    # tasks of a recurrence may have no results
    some = where["t0"] < where["t1"]
    tasks, where = select_rows(tasks, some), {name: column[some] for name, column in where.items()}
    # the tasks of a rank and step are one kernel call, or possibly several if their heads differ
    call_number = numbers_of_rows(*(tasks[name] for name in ("rank", "step", "h0", "h1")))
    limits = sorted_unique(np.concatenate([where["h0"], where["h1"]]))
    task, head = expand_ranges(np.searchsorted(limits, where["h0"]), np.searchsorted(limits, where["h1"]))
    # find the rows that each call writes, by elementary head range, then check for overlaps
    group = call_number[task] * len(limits) + head
    group, t0, t1 = merge_intervals(group, where["t0"][task], where["t1"][task])
    head = group % max(len(limits), 1)
    order = stable_argsort(head * (int(t1.max(initial=0)) + 1) + t0)
    head, t0, t1 = head[order], t0[order], t1[order]
    return not bool(((head[1:] == head[:-1]) & (t0[1:] < t1[:-1])).any())
