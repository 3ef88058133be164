"""A vector drawing of one pass of a simulated plan, with the times of each rank's kernels and messages."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np

from distattn.ir.intervals import Ints
from distattn.ir.text_format import with_common_unit

if TYPE_CHECKING:
    from distattn.parallel.analysis.timeline import Numbers, PassTimeline

# largest number of ranks in a picture
_MAX_DRAWN = 64
# in CSS pixels at natural size, as for score matrices; each rank has a line with its kernels above its messages
_LEFT, _TOP, _WIDTH, _RIGHT, _LINE, _BAR = 40, 18, 372, 8, 14, 6
# our pages define these colours for light and dark backgrounds; the fallbacks are visible on both
_COLOURS = {"kernels": "var(--kernels,#4a86d0)", "messages": "var(--waiting,#d97a12)"}


def ranks_to_draw(ranks: int) -> Ints:
    """Return the ranks that a picture shows: all, or an evenly spaced selection."""
    return np.unique(np.linspace(0, ranks - 1, min(ranks, _MAX_DRAWN)).astype(np.int64))


def busy_intervals(timeline: PassTimeline, ends: Numbers, ranks: Ints) -> tuple[Numbers, Numbers, Ints]:
    """Return (begin, end, line) of each rank's kernels or messages by step: times in seconds, and the rank's index in `ranks`.

    ends: `computed` or `arrived` of the timeline, in seconds, (steps, all ranks).
    """
    step, line = np.nonzero((ends > timeline.begin)[:, ranks])
    return timeline.begin[step, ranks[line]], ends[step, ranks[line]], line


def pass_figure(timeline: PassTimeline, title: str) -> str:
    """Return the drawing as an HTML figure with an inline SVG. title: a description for screen readers."""
    ranks = ranks_to_draw(timeline.begin.shape[1])
    bottom, wide = _TOP + _LINE * len(ranks), _WIDTH - _LEFT - _RIGHT
    scale = wide / (timeline.seconds or 1.0)
    bars = "".join(
        f'<path style="fill:{_COLOURS[kind]}" d="{_boxes(*busy_intervals(timeline, ends, ranks), scale, down)}"/>'
        for kind, ends, down in (("kernels", timeline.computed, 1), ("messages", timeline.arrived, 1 + _BAR))
    )
    names = "".join(_text(_LEFT - 6, _TOP + _LINE * line + 11, str(rank), "end") for line, rank in enumerate(ranks))
    times = zip(
        (0.0, 0.5, 1.0),
        with_common_unit([0.0, timeline.seconds / 2, timeline.seconds], "s"),
        ("start", "middle", "end"),
        strict=True,
    )
    ticks = "".join(_text(_LEFT + wide * share, bottom + 16, text, anchor) for share, text, anchor in times)
    keys = "".join(f'<span style="color:{colour}">\u25a0</span> {kind} ' for kind, colour in _COLOURS.items())
    shown = f"{timeline.direction}, simulated"
    some = f", {len(ranks)} of {timeline.begin.shape[1]} ranks" if len(ranks) < timeline.begin.shape[1] else ""
    label = html.escape(f"{title}, {timeline.direction}: kernels and messages of each rank in time (simulated)")
    return (
        f'<figure style="margin:0;flex:1 1 18rem;max-width:34rem"><figcaption>{shown}{some}: {keys}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {bottom + 22}" role="img" aria-label="{label}" fill="currentColor" '
        'style="width:100%;height:auto;display:block;font:12px system-ui,sans-serif">'
        f'{bars}<path d="M{_LEFT} {_TOP}h{wide}v{bottom - _TOP}h-{wide}z" fill="none" stroke="currentColor"/>'
        f"{_text(0, 12, 'rank', 'start')}{names}{ticks}</svg></figure>"
    )


def _boxes(begin: Numbers, end: Numbers, line: Ints, scale: float, down: int) -> str:
    """Return an SVG path of rectangles. scale: pixels per second. down: distance in pixels from the top of a rank's line."""
    x, wide, y = _LEFT + begin * scale, (end - begin) * scale, _TOP + _LINE * line + down
    return "".join(f"M{a:.2f} {c}h{b:.2f}v{_BAR - 1}h-{b:.2f}z" for a, b, c in zip(x, wide, y, strict=True))


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>'
