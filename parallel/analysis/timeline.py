"""The result of a simulation: when each rank computes and waits, as text, numbers, pictures and a Perfetto trace."""

from __future__ import annotations

import html
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from distattn.cluster.spec import ClusterSpec
from distattn.ir.cached import cached_property
from distattn.ir.intervals import Ints
from distattn.ir.plan import Plan
from distattn.ir.text_format import with_common_unit
from distattn.parallel.analysis.quality import max_over_mean
from distattn.parallel.analysis.score_matrix import svg_text
from distattn.parallel.analysis.verify import Proof

Numbers = np.ndarray
# colours of a PNG
_KERNELS, _MESSAGES = "#1f5fa8", "#e08a1e"
# maximum number of ranks in a picture
_MAX_DRAWN = 64
# sizes of a vector drawing in CSS pixels. Each rank has a line, with its kernels above its messages
_LEFT, _TOP, _WIDTH, _RIGHT, _LINE, _BAR = 40, 18, 372, 8, 14, 6
# colours of a vector drawing: our pages define them for light and dark backgrounds; the fallbacks are visible on both
_COLOURS = {"kernels": "var(--kernels,#4a86d0)", "messages": "var(--waiting,#d97a12)"}


@dataclass(frozen=True)
class PassTimeline:
    """Timeline of one direction of a plan.

    begin, computed, arrived: times in seconds, (steps, ranks), at which each step began, its kernels finished and its messages
    arrived. If a rank has no kernels or no messages in a step, that is the time at which the step began. seconds: the duration
    of the pass. flops: the floating-point operations of all ranks. intra_node_bytes, inter_node_bytes: bytes sent by each rank
    within its node and to other nodes.
    """

    direction: str
    begin: Numbers
    computed: Numbers
    arrived: Numbers
    seconds: float
    flops: float
    intra_node_bytes: Ints
    inter_node_bytes: Ints

    @property
    def busy(self) -> Numbers:
        """The seconds that each rank spends computing, (ranks,)."""
        return (self.computed - self.begin).sum(0)

    @property
    def idle(self) -> Numbers:
        """The seconds that each rank spends not computing, until the slowest rank has finished, (ranks,)."""
        return self.seconds - self.busy

    @property
    def exposed(self) -> Numbers:
        """The seconds that each rank spends only waiting for messages, computing nothing, (ranks,)."""
        return np.maximum(self.arrived - self.computed, 0).sum(0)


@dataclass(frozen=True)
class Timeline:
    """A plan simulated on a cluster. `str()` returns the text and `.as_dict()` the numbers; `.html()` and `.perfetto()`
    visualize it."""

    plan: Plan
    cluster: ClusterSpec
    proof: Proof
    forward: PassTimeline
    backward: PassTimeline

    @property
    def passes(self) -> tuple[PassTimeline, PassTimeline]:
        return self.forward, self.backward

    @cached_property
    def peak_bytes(self) -> Ints:
        """The peak bytes of each rank's buffers, including those kept for the backward pass but not its own tensors, (ranks,)."""
        return np.maximum(self.proof.forward_peak, self.proof.backward_peak) + self.proof.kept

    @property
    def balance(self) -> float:
        """The busiest rank's number of cells, divided by the mean."""
        return max_over_mean(self.plan.area_by_rank())

    def as_dict(self) -> dict[str, Any]:
        """Return every number in the text, in seconds, bytes, and TFLOP/s per device."""
        out: dict[str, Any] = {
            "simulated": True,
            "strategy": self.plan.strategy,
            "cluster": self.cluster.name,
            "ranks": self.plan.call.ranks,
            "balance": self.balance,
            "peak_bytes": int(self.peak_bytes.max()),
        }
        for timeline in self.passes:
            out[timeline.direction] = {
                "seconds": timeline.seconds,
                "tflops": timeline.flops / max(timeline.seconds, 1e-30) / self.plan.call.ranks / 1e12,
                "exposed_seconds": float(timeline.exposed.max(initial=0)),
                "idle_seconds": float(timeline.idle.mean()),
                "bytes_intra_node": int(timeline.intra_node_bytes.sum()),
                "bytes_inter_node": int(timeline.inter_node_bytes.sum()),
            }
        return out

    def __str__(self) -> str:
        facts = self.as_dict()
        lines = [f"{self.plan.strategy} on {self.cluster.name}, {self.plan.call.ranks} ranks (simulated)"]
        for timeline in self.passes:
            row = facts[timeline.direction]
            lines.append(
                f"{timeline.direction:8s} {row['seconds'] * 1e3:9.3f} ms  {row['tflops']:5.0f} TFLOP/s per device  "
                f"waiting for messages {row['exposed_seconds'] * 1e3:.3f} ms at most  idle {row['idle_seconds'] * 1e3:.3f} ms "
                f"on average  {row['bytes_intra_node'] / 1e9:.2f} GB inside nodes, {row['bytes_inter_node'] / 1e9:.2f} GB across"
            )
        lines.append(
            f"the busiest rank computes {self.balance:.2f} of the mean; buffers need {facts['peak_bytes'] / 1e9:.2f} GB at most"
        )
        return "\n".join(lines)

    def perfetto(self) -> dict[str, Any]:
        """Return both passes as trace events for ui.perfetto.dev, with a process for each rank and a thread for each stream."""
        events: list[dict[str, Any]] = []
        start = 0.0
        for timeline in self.passes:
            for stream, ends in enumerate((timeline.computed, timeline.arrived)):
                for step, rank in np.argwhere(ends > timeline.begin).tolist():
                    events.append(
                        {
                            "name": f"{timeline.direction} step {step} {('kernels', 'messages')[stream]}",
                            "ph": "X",
                            "pid": rank,
                            "tid": stream,
                            "ts": (start + float(timeline.begin[step, rank])) * 1e6,
                            "dur": float(ends[step, rank] - timeline.begin[step, rank]) * 1e6,
                        }
                    )
            start += timeline.seconds
        names = [
            {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank} (simulated)"}}
            for rank in range(self.plan.call.ranks)
        ]
        return {"traceEvents": names + events, "displayTimeUnit": "ms"}

    def html(self) -> str:
        """Return a drawing of each pass, and the text, as a self-contained HTML fragment.

        The passes are placed side by side if there is room. The drawings are vectors that scale to the available width and use
        the page's colours.
        """
        figures = "".join(
            _pass_figure(timeline, f"{self.plan.strategy} on {self.cluster.name}") for timeline in self.passes
        )
        text = f'<pre style="white-space:pre-wrap">{html.escape(str(self))}</pre>'
        return f'<div style="display:flex;flex-wrap:wrap;gap:1rem">{figures}</div>\n{text}'

    def picture(self) -> bytes:
        """Return a PNG with a line of kernels above a line of messages for each rank, forward then backward. Needs matplotlib."""
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

        ranks = _ranks_to_draw(self.plan.call.ranks)
        figure = Figure(figsize=(11, 1.6 + 0.16 * len(ranks)), layout="constrained")
        axis = figure.subplots()
        start = 0.0
        for timeline in self.passes:
            for ends, low, colour in ((timeline.computed, 0.0, _KERNELS), (timeline.arrived, 0.45, _MESSAGES)):
                begin, end, line = _busy_intervals(timeline, ends, ranks)
                x0, x1, y = (start + begin) * 1e3, (start + end) * 1e3, line + low
                boxes = np.stack([x0, y, x1, y, x1, y + 0.42, x0, y + 0.42], 1).reshape(-1, 4, 2)
                axis.add_collection(PolyCollection(list(boxes), facecolors=colour, edgecolors="white", linewidths=0.2))
            start += timeline.seconds
            axis.axvline(start * 1e3, color="#444444", linewidth=0.8)
        axis.set(xlim=(0, start * 1e3 or 1), ylim=(len(ranks), 0), xlabel="milliseconds (simulated)", ylabel="rank")
        axis.set_yticks(np.arange(len(ranks)) + 0.45, [str(rank) for rank in ranks], fontsize=7)
        drawn = f"; {len(ranks)} of {self.plan.call.ranks} ranks" if len(ranks) < self.plan.call.ranks else ""
        axis.set_title("forward, then backward" + drawn)
        # put the legend outside the axis: with few ranks it would cover their last kernels
        figure.legend(
            handles=[
                Patch(color=_KERNELS, label="kernels"),
                Patch(color=_MESSAGES, label="messages, and waiting for their other ends"),
            ],
            loc="outside lower right",
            ncols=2,
        )
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
        return out.getvalue()


def _ranks_to_draw(ranks: int) -> Ints:
    """Return the ranks that a picture shows: all, or an evenly spaced selection."""
    return np.unique(np.linspace(0, ranks - 1, min(ranks, _MAX_DRAWN)).astype(np.int64))


def _busy_intervals(timeline: PassTimeline, ends: Numbers, ranks: Ints) -> tuple[Numbers, Numbers, Ints]:
    """Return (begin, end, line) of each rank's kernels or messages in each step: times in seconds, and the rank's index in
    `ranks`.

    ends: `computed` or `arrived` of the timeline, in seconds, (steps, all ranks).
    """
    step, line = np.nonzero((ends > timeline.begin)[:, ranks])
    return timeline.begin[step, ranks[line]], ends[step, ranks[line]], line


def _pass_figure(timeline: PassTimeline, title: str) -> str:
    """Return a drawing of the times of each rank's kernels and messages, as an HTML figure with an inline SVG.

    title: a description for screen readers.
    """
    ranks = _ranks_to_draw(timeline.begin.shape[1])
    bottom, wide = _TOP + _LINE * len(ranks), _WIDTH - _LEFT - _RIGHT
    scale = wide / (timeline.seconds or 1.0)
    bars = "".join(
        f'<path style="fill:{_COLOURS[kind]}" d="{_boxes(*_busy_intervals(timeline, ends, ranks), scale, down)}"/>'
        for kind, ends, down in (("kernels", timeline.computed, 1), ("messages", timeline.arrived, 1 + _BAR))
    )
    names = "".join(svg_text(_LEFT - 6, _TOP + _LINE * line + 11, str(rank), "end") for line, rank in enumerate(ranks))
    times = zip(
        (0.0, 0.5, 1.0),
        with_common_unit([0.0, timeline.seconds / 2, timeline.seconds], "s"),
        ("start", "middle", "end"),
        strict=True,
    )
    ticks = "".join(svg_text(_LEFT + wide * share, bottom + 16, text, anchor) for share, text, anchor in times)
    keys = "".join(f'<span style="color:{colour}">\u25a0</span> {kind} ' for kind, colour in _COLOURS.items())
    shown = f"{timeline.direction}, simulated"
    some = f", {len(ranks)} of {timeline.begin.shape[1]} ranks" if len(ranks) < timeline.begin.shape[1] else ""
    label = html.escape(f"{title}, {timeline.direction}: kernels and messages of each rank in time (simulated)")
    return (
        f'<figure style="margin:0;flex:1 1 18rem;max-width:34rem"><figcaption>{shown}{some}: {keys}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {bottom + 22}" role="img" aria-label="{label}" fill="currentColor" '
        'style="width:100%;height:auto;display:block;font:12px system-ui,sans-serif">'
        f'{bars}<path d="M{_LEFT} {_TOP}h{wide}v{bottom - _TOP}h-{wide}z" fill="none" stroke="currentColor"/>'
        f"{svg_text(0, 12, 'rank', 'start')}{names}{ticks}</svg></figure>"
    )


def _boxes(begin: Numbers, end: Numbers, line: Ints, scale: float, down: int) -> str:
    """Return an SVG path of rectangles. scale: pixels per second. down: distance in pixels from the top of a rank's line."""
    x, wide, y = _LEFT + begin * scale, (end - begin) * scale, _TOP + _LINE * line + down
    return "".join(f"M{a:.2f} {c}h{b:.2f}v{_BAR - 1}h-{b:.2f}z" for a, b, c in zip(x, wide, y, strict=True))
