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
from distattn.parallel.analysis.pass_figure import busy_intervals, pass_figure, ranks_to_draw
from distattn.parallel.analysis.verify import Proof

Numbers = np.ndarray
_KERNELS, _MESSAGES = "#1f5fa8", "#e08a1e"


@dataclass(frozen=True)
class PassTimeline:
    """Timeline of one direction of a plan.

    begin, computed, arrived: times in seconds, (steps, ranks), at which each step began, its kernels ended and its messages
    ended. For a step without kernels or messages, it is the time at which the step began. seconds: duration of the pass.
    flops: floating-point operations of all ranks. intra_node_bytes, inter_node_bytes: bytes sent by each rank within its node
    and to other nodes.
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
        """The seconds for which each rank computes, (ranks,)."""
        return (self.computed - self.begin).sum(0)

    @property
    def idle(self) -> Numbers:
        """The seconds for which each rank does not compute before the slowest rank has finished, (ranks,)."""
        return self.seconds - self.busy

    @property
    def exposed(self) -> Numbers:
        """The seconds for which each rank waits for messages without computing, (ranks,)."""
        return np.maximum(self.arrived - self.computed, 0).sum(0)


@dataclass(frozen=True)
class Timeline:
    """A plan simulated on a cluster. `str()` is the text, `.as_dict()` the numbers, `.html()` and `.perfetto()` show it."""

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
        """Peak bytes of each rank's buffers besides its own tensors, including kept buffers, (ranks,)."""
        return np.maximum(self.proof.forward_peak, self.proof.backward_peak) + self.proof.kept

    @property
    def balance(self) -> float:
        """The cells of the busiest rank over the mean."""
        area = self.plan.area_by_rank().astype(float)
        return float(area.max() / area.mean()) if area.any() else 1.0

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
            pass_figure(timeline, f"{self.plan.strategy} on {self.cluster.name}") for timeline in self.passes
        )
        text = f'<pre style="white-space:pre-wrap">{html.escape(str(self))}</pre>'
        return f'<div style="display:flex;flex-wrap:wrap;gap:1rem">{figures}</div>\n{text}'

    def picture(self) -> bytes:
        """Return a PNG with a line of kernels above a line of messages for each rank, forward then backward. Needs matplotlib."""
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

        ranks = ranks_to_draw(self.plan.call.ranks)
        figure = Figure(figsize=(11, 1.6 + 0.16 * len(ranks)), layout="constrained")
        axis = figure.subplots()
        start = 0.0
        for timeline in self.passes:
            for ends, low, colour in ((timeline.computed, 0.0, _KERNELS), (timeline.arrived, 0.45, _MESSAGES)):
                begin, end, line = busy_intervals(timeline, ends, ranks)
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
