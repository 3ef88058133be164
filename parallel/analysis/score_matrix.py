"""Pictures of a plan's score matrix, coloured by the rank and by the step that computes each cell. Needs matplotlib."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from distattn.ir.bands import Q0, Q1, row_key_ranges
from distattn.ir.intervals import Ints
from distattn.ir.plan import Columns, Plan, has_rows_and_keys, select_rows, task_bands

Numbers = np.ndarray
# maximum number of head ranges to draw side by side
_PANELS = 4
# a task's outline is exact up to this many rows
_OUTLINE_ROWS = 48
# limits of relative luminance within which colours are visible on light and dark pages (a contrast of at least 2.2 with both)
_DARKEST, _LIGHTEST = 0.11, 0.42
# the range of a palette to use: its ends are nearly black
_COLOUR_RANGE = (0.06, 0.96)
_PALETTES = {"rank": "turbo", "step": "viridis"}
# weights of red, green and blue in relative luminance (WCAG 2)
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
_MOST_TICKS = 8
# a panel on a page, in CSS pixels at natural size; the matrix is a square with side _SIDE at (_LEFT, _TOP)
_LEFT, _TOP, _SIDE, _WIDTH, _HEIGHT = 72, 22, 240, 372, 302


class Panel(NamedTuple):
    """One picture of the score matrix. tasks: the tasks to draw. colours: the number of colours, one per rank or step."""

    title: str
    colour_by: str
    colours: int
    tasks: Columns


def draw_score_matrix(plan: Plan) -> bytes:
    """Return a PNG of the score matrix on a white background, with all panels side by side."""
    from matplotlib.figure import Figure

    panels = list(_panels(plan))
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _fill(axis, plan, panel)
        axis.set(xlabel="key (token)", ylabel="query (token)", aspect="equal", title=f"coloured by {panel.title}")
        figure.colorbar(_scale(panel), ax=axis, label=panel.colour_by, ticks=_ticks(panel.colours), shrink=0.7)
    return _png(figure, dpi=130)


def score_matrix_html(plan: Plan) -> str:
    """Return the panels as a self-contained HTML fragment.

    The panels are placed side by side if there is room. Their text has the page's text colour and a fixed size.
    """
    figures = "".join(_figure_html(plan, panel) for panel in _panels(plan))
    return f'<div class="matrices" style="display:flex;flex-wrap:wrap;gap:1rem">{figures}</div>'


def legible_colours(name: str, count: int) -> Numbers:
    """Return `count` colours of a matplotlib palette, (count, 3) in [0, 1], none of them too light or too dark to see."""
    from matplotlib import colormaps

    srgb = colormaps[name](np.linspace(*_COLOUR_RANGE, max(count, 1)))[:, :3]
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    luminance = (linear @ _LUMINANCE)[:, None]
    linear *= np.minimum(1, _LIGHTEST / luminance)
    # mix dark colours with white, which keeps their hue
    white = np.clip((_DARKEST - luminance) / (1 - luminance), 0, 1)
    linear += (1 - linear) * white
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def _panels(plan: Plan) -> Iterator[Panel]:
    """Yield panels coloured by rank, one for each head range (at most _PANELS), and one panel coloured by step."""
    tasks = _drawn_tasks(plan)
    limits = np.unique(np.concatenate([tasks["h0"], tasks["h1"]]))
    # a mask without cells has no tasks: draw one empty panel
    ranges = list(pairwise(limits.tolist())) or [(0, plan.call.heads)]
    shown = ranges[:_PANELS]
    more = f" (of {len(ranges)} ranges)" if len(ranges) > len(shown) else ""
    for h0, h1 in shown:
        yield Panel(f"rank, heads {h0} to {h1 - 1}{more}", "rank", plan.call.ranks, _of_head(tasks, h0))
    yield Panel("step", "step", max(plan.forward.steps, 1), _of_head(tasks, shown[0][0]))


def _of_head(tasks: Columns, head: int) -> Columns:
    return select_rows(tasks, (tasks["h0"] <= head) & (head < tasks["h1"]))


def _drawn_tasks(plan: Plan) -> Columns:
    """Return the forward tasks. For a recurrence, return only tasks with outputs; their cells pair the segment's queries with
    all keys that they depend on."""
    tasks = plan.forward.tasks
    return select_rows(tasks, has_rows_and_keys(tasks)) if plan.call.op.is_recurrent else tasks


def _fill(axis: Any, plan: Plan, panel: Panel) -> None:
    """Draw the tasks of a panel, with keys from left to right and queries from top to bottom."""
    from matplotlib.collections import PolyCollection

    paint = _scale(panel).to_rgba(panel.tasks[panel.colour_by])
    # draw edges in the face colour to close hairline gaps between neighbours
    axis.add_collection(
        PolyCollection(task_outlines(plan, panel.tasks), facecolors=paint, edgecolors=paint, linewidths=0.4)
    )
    axis.set(xlim=(0, plan.call.mask.n), ylim=(plan.call.mask.n, 0))


def _scale(panel: Panel) -> Any:
    """Return matplotlib's mapping from a rank or a step to its colour."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colours = legible_colours(_PALETTES[panel.colour_by], panel.colours)
    return ScalarMappable(BoundaryNorm(np.arange(panel.colours + 1) - 0.5, panel.colours), ListedColormap(colours))


def _ticks(colours: int) -> Ints:
    """Return the ranks or steps labelled on a colour bar."""
    return np.unique(np.linspace(0, colours - 1, min(colours, _MOST_TICKS)).round().astype(int))


def task_outlines(plan: Plan, tasks: Columns) -> list[np.ndarray]:
    """Return the outline of each task's allowed cells as a polygon of (key, query) corners, exact up to _OUTLINE_ROWS rows."""
    out = []
    for band in task_bands(plan.call.mask, tasks):
        q: Ints = np.unique(np.linspace(band[Q0], band[Q1] - 1, _OUTLINE_ROWS).astype(np.int64))
        begin, end = row_key_ranges(np.broadcast_to(band, (len(q), len(band))), q)
        # a row is one token high, with corners at q and q + 1
        left = np.stack([np.repeat(begin, 2), np.stack([q, q + 1], 1).ravel()], 1)
        right = np.stack([np.repeat(end, 2), np.stack([q, q + 1], 1).ravel()], 1)
        out.append(np.concatenate([left, right[::-1]]))
    return out


def _figure_html(plan: Plan, panel: Panel) -> str:
    """Return one panel as HTML: the cells as a transparent picture, the axes and the colour bar as vectors and text."""
    n, bottom, bar = plan.call.mask.n, _TOP + _SIDE, _LEFT + _SIDE + 14
    x_axis = "".join(
        svg_text(_LEFT + _SIDE * share, bottom + 16, f"{round(n * share):,}", anchor)
        for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    )
    y_axis = "".join(
        svg_text(_LEFT - 6, _TOP + _SIDE * share + down, f"{round(n * share):,}", "end")
        for share, down in ((0.0, 10), (0.5, 4), (1.0, 0))
    )
    height = _SIDE / panel.colours
    bar_ticks = "".join(
        svg_text(bar + 20, min(_TOP + (tick + 0.5) * height + 4, bottom), str(tick), "start")
        for tick in _ticks(panel.colours)
    )
    title = html.escape(f"score matrix of {plan.strategy} on {plan.call.ranks} ranks, coloured by {panel.title}")
    return (
        f'<figure style="margin:0;flex:1 1 18rem;max-width:26rem"><figcaption>coloured by {html.escape(panel.title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}" fill="currentColor" '
        'style="width:100%;height:auto;display:block;font:12px system-ui,sans-serif">'
        f"{_image(_cells_png(plan, panel), _LEFT, _TOP, _SIDE)}{_image(_bar_png(panel), bar, _TOP, 14)}"
        f'<path d="M{_LEFT} {_TOP}h{_SIDE}v{_SIDE}h-{_SIDE}z" fill="none" stroke="currentColor"/>'
        f"{svg_text(0, 12, 'query (token)', 'start')}{svg_text(bar, 12, panel.colour_by, 'start')}"
        f"{y_axis}{x_axis}{svg_text(_LEFT + _SIDE / 2, bottom + 34, 'key (token)', 'middle')}{bar_ticks}</svg></figure>"
    )


def svg_text(x: float, y: float, text: str, anchor: str) -> str:
    """Return an SVG text element. x, y: position in pixels. anchor: "start", "middle" or "end"."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>'


def _image(png: bytes, x: float, y: float, width: float) -> str:
    data = base64.b64encode(png).decode()
    place = f'x="{x}" y="{y}" width="{width}" height="{_SIDE}" preserveAspectRatio="none"'
    return f'<image {place} style="image-rendering:auto" href="data:image/png;base64,{data}"/>'


def _cells_png(plan: Plan, panel: Panel) -> bytes:
    """Return a PNG of only the cells of a panel, on a transparent background."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), facecolor="none")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    _fill(axis, plan, panel)
    return _png(figure, dpi=130)


def _bar_png(panel: Panel) -> bytes:
    """Return a PNG of a panel's colours, the first at the top. It is one pixel wide and tall enough for sharp edges."""
    from matplotlib.image import imsave

    colours = legible_colours(_PALETTES[panel.colour_by], panel.colours)
    out = io.BytesIO()
    imsave(out, np.repeat(colours, max(1, 2 * _SIDE // panel.colours), 0)[:, None], format="png")
    return out.getvalue()


def _png(figure: Any, dpi: int) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()
