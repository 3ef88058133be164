"""The page of `distattn plan --html`: bars of all strategies, then one strategy at a time in time. It needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from distattn.ir.errors import DistattnError
from distattn.ir.plan import Plan, move_bytes
from distattn.pages.render import render_page
from distattn.parallel.analysis.columns import in_one_unit
from distattn.parallel.analysis.explain import explain
from distattn.parallel.analysis.timeline import PassTimeline, Timeline
from distattn.planning.compare_strategies import COMPARED, comparison_cells

# most ranks whose time is drawn, evenly spread
_MAX_DRAWN = 128


def comparison_page(found: dict[str, Timeline | str], title: str) -> str:
    """One HTML file, offline: `found` is what `compare_strategies` returned, `title` what was planned."""
    timelines = [one for one in found.values() if isinstance(one, Timeline)]
    timelines.sort(key=lambda one: one.forward.seconds + one.backward.seconds)
    longest = max(part.seconds for one in timelines for part in one.passes) or 1.0
    cells = comparison_cells(timelines)
    rows = [_row(number, one, cells[number], longest) for number, one in enumerate(timelines)]
    data = [{part.direction: _pass_data(one.plan, part) for part in one.passes} for one in timelines]
    return render_page(
        "plan.html.j2",
        data,
        title="distattn plan",
        planned=title,
        compared=["strategy", *COMPARED],
        numbers=[[one.plan.strategy, *row] for one, row in zip(timelines, cells, strict=True)],
        cluster=timelines[0].cluster.name,
        ranks=timelines[0].plan.call.ranks,
        rows=rows,
        refused={name: one for name, one in found.items() if isinstance(one, str)},
    )


def write_comparison_page(path: Path, found: dict[str, Timeline | str], title: str) -> None:
    """Write the page. Raises DistattnError where it cannot be written."""
    try:
        path.write_text(comparison_page(found, title), "utf-8")
    except OSError as error:
        raise DistattnError(f"--html: {path} cannot be written: {error.strerror}.") from None


def _row(number: int, one: Timeline, cells: list[str], longest: float) -> dict[str, Any]:
    """What the summary and the table say of a strategy."""
    explanation = Markup(explain(one.plan, one.cluster).html())
    passes = [_bar(part, longest) for part in one.passes]
    return dict(index=number, strategy=one.plan.strategy, cells=cells, passes=passes, explanation=explanation)


def _bar(part: PassTimeline, longest: float) -> dict[str, Any]:
    """The share of each kind of time in a pass, means over ranks, in per cent; its width in per cent of the page's longest."""
    seconds = part.seconds or 1.0
    kernels, waiting = float(part.busy.mean()) / seconds, float(part.exposed.mean()) / seconds
    shares = dict(kernels=100 * kernels, waiting=100 * waiting, idle=100 * max(1 - kernels - waiting, 0.0))
    (length,) = in_one_unit([part.seconds], "s")
    text = f"{length}, {kernels:.0%} kernels"
    return {"width": f"{70 * part.seconds / longest:.2f}", "text": text, **{k: f"{v:.2f}" for k, v in shares.items()}}


def _pass_data(plan: Plan, part: PassTimeline) -> dict[str, Any]:
    """Begin, end of kernels and end of messages of each step, by rank; its tasks, messages and bytes received."""
    ranks = np.unique(np.linspace(0, plan.call.ranks - 1, min(plan.call.ranks, _MAX_DRAWN)).astype(int))
    table = plan.forward if part.direction == "forward" else plan.backward
    shape = part.begin.shape
    tasks, messages, received = (np.zeros(shape, np.int64) for _ in range(3))
    np.add.at(tasks, (table.tasks["step"], table.tasks["rank"]), 1)
    where = table.moves["step"], table.moves["dst"]
    np.add.at(messages, where, 1)
    np.add.at(received, where, move_bytes(plan.call, table.moves))
    columns = dict(begin=part.begin, computed=part.computed, arrived=part.arrived)
    whole = dict(tasks=tasks, messages=messages, received=received)
    steps = [
        {name: [float(f"{x:.7g}") for x in values[step, ranks]] for name, values in columns.items()}
        | {name: values[step, ranks].tolist() for name, values in whole.items()}
        for step in range(shape[0])
    ]
    return {"seconds": part.seconds, "ranks": ranks.tolist(), "steps": steps}
