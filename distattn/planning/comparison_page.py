"""The page of `distattn plan --html`: bars for all strategies, then the selected strategy's timeline. It loads no other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from distattn.ir.errors import DistattnError
from distattn.ir.plan import Plan, move_bytes
from distattn.ir.text_format import with_common_unit
from distattn.pages.render import render_page
from distattn.parallel.analysis.explain import explain
from distattn.parallel.analysis.timeline import PassTimeline, Timeline
from distattn.planning.compare_strategies import COMPARED, comparison_cells

# the maximum number of ranks whose timelines are drawn; if there are more ranks, evenly spaced ranks are drawn
_MAX_DRAWN = 128


def comparison_page(results: dict[str, Timeline | str], title: str) -> str:
    """Return the page's HTML. results: from `compare_strategies`. title: a description of the planned call."""
    timelines = [result for result in results.values() if isinstance(result, Timeline)]
    timelines.sort(key=lambda timeline: timeline.forward.seconds + timeline.backward.seconds)
    longest = max(part.seconds for timeline in timelines for part in timeline.passes) or 1.0
    cells = comparison_cells(timelines)
    rows = [_row(number, timeline, cells[number], longest) for number, timeline in enumerate(timelines)]
    data = [{part.direction: _pass_data(timeline.plan, part) for part in timeline.passes} for timeline in timelines]
    return render_page(
        "plan.html.j2",
        data,
        title="distattn plan",
        planned=title,
        compared=["strategy", *COMPARED],
        numbers=[[timeline.plan.strategy, *row] for timeline, row in zip(timelines, cells, strict=True)],
        cluster=timelines[0].cluster.name,
        ranks=timelines[0].plan.call.ranks,
        rows=rows,
        refused={name: result for name, result in results.items() if isinstance(result, str)},
    )


def write_comparison_page(path: Path, results: dict[str, Timeline | str], title: str) -> None:
    """Write the page to a file. Raise DistattnError if it cannot be written."""
    try:
        path.write_text(comparison_page(results, title), "utf-8")
    except OSError as error:
        raise DistattnError(f"--html: {path} cannot be written: {error.strerror}.") from None


def _row(number: int, timeline: Timeline, cells: list[str], longest: float) -> dict[str, Any]:
    """Return the template's values for one strategy in the summary and the table."""
    explanation = Markup(explain(timeline.plan, timeline.cluster).html())
    passes = [_bar(part, longest) for part in timeline.passes]
    return dict(index=number, strategy=timeline.plan.strategy, cells=cells, passes=passes, explanation=explanation)


def _bar(part: PassTimeline, longest: float) -> dict[str, Any]:
    """Return the bar of a pass: width, text, and percentages of kernel, waiting and idle time, averaged over ranks."""
    seconds = part.seconds or 1.0
    kernels, waiting = float(part.busy.mean()) / seconds, float(part.exposed.mean()) / seconds
    shares = dict(kernels=100 * kernels, waiting=100 * waiting, idle=100 * max(1 - kernels - waiting, 0.0))
    (length,) = with_common_unit([part.seconds], "s")
    text = f"{length}, {kernels:.0%} kernels"
    return {"width": f"{70 * part.seconds / longest:.2f}", "text": text, **{k: f"{v:.2f}" for k, v in shares.items()}}


def _pass_data(plan: Plan, part: PassTimeline) -> dict[str, Any]:
    """Return the data of a pass's timeline.

    For each step and rank, the data are the start, the ends of kernels and messages, and the numbers of tasks, messages and
    received bytes.
    """
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
