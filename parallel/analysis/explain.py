"""A plan shown to a person: who computes what, what moves, how even it is, and a picture of the score matrix."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from distattn.cluster.spec import AnyCluster
from distattn.cluster.topology import Cluster
from distattn.ir.arguments import checked
from distattn.ir.bands import Q0, Q1, row_key_ranges
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints
from distattn.ir.plan import (
    Call,
    Columns,
    Payload,
    Plan,
    Table,
    has_rows_and_keys,
    move_bytes,
    num_rows,
    select_rows,
    task_areas,
    task_bands,
)
from distattn.parallel.analysis import quality
from distattn.parallel.analysis.columns import aligned, plural, readable_bytes
from distattn.parallel.analysis.lower_bounds import lower_bound, plain_ring_traffic, plan_traffic
from distattn.parallel.analysis.verify import Proof, verify

# ranks listed one by one before only the extremes are shown
_LISTED_RANKS = 16
# most head ranges that are drawn side by side
_PANELS = 4
# most rows at which the outline of a task is drawn
_OUTLINE_ROWS = 48


@dataclass(frozen=True)
class Explanation:
    """`str()` is the text; `.html()` a page fragment with the picture; `.as_dict()` the same facts for programs."""

    plan: Plan
    proof: Proof
    cluster: AnyCluster

    def as_dict(self) -> dict[str, Any]:
        """Every number of the text, in bytes, tokens and cells x query heads."""
        call, moved = self.plan.call, self.plan.bytes()
        payloads = [p for p in Payload if p in (*call.payloads("forward"), *call.payloads("backward"))]
        yardsticks = {
            "plan": plan_traffic(self.plan, self.cluster),
            "lower_bound": lower_bound(self.plan, self.cluster),
        }
        if not call.op.is_recurrent:
            yardsticks["plain_ring"] = plain_ring_traffic(call, self.cluster)
        area = self.plan.area_by_rank()
        return {
            "strategy": self.plan.strategy,
            "op": call.op.name,
            "backward": self.plan.policy,
            "digest": self.plan.digest,
            "tokens": call.mask.n,
            "documents": len(call.layout.ends),
            "heads": [call.heads, call.kv_heads],
            "head_dims": [call.head_dim, call.v_head_dim],
            "dtype": call.dtype,
            "max_over_mean": _max_over_mean(area),
            "steps": {"forward": self.plan.forward.steps, "backward": self.plan.backward.steps},
            "schedules": {"forward": self.plan.forward.label, "backward": self.plan.backward.label},
            "bytes_by_payload": {p.name: int(moved["bytes"][moved["payload"] == p].sum()) for p in payloads},
            "nodes": self.cluster.nodes,
            "quality": quality.as_dict(quality.quality(self.plan, self.cluster)),
            "traffic": {name: value._asdict() for name, value in yardsticks.items()},
            "ranks": [
                {
                    "rank": rank,
                    "tokens": int(tokens),
                    "tasks": int((self.plan.forward.tasks["rank"] == rank).sum()),
                    "cells_x_heads": int(area[rank]),
                    "sent_bytes": int(moved["bytes"][moved["src"] == rank].sum()),
                    "received_bytes": int(moved["bytes"][moved["dst"] == rank].sum()),
                    "peak_forward_bytes": int(self.proof.forward_peak[rank]),
                    "peak_backward_bytes": int(self.proof.backward_peak[rank]),
                    "kept_bytes": int(self.proof.kept[rank]),
                }
                for rank, tokens in enumerate(call.layout.shard_sizes())
            ],
        }

    def __str__(self) -> str:
        facts = self.as_dict()
        call = self.plan.call
        lines = [
            f"{self.plan.strategy} on {call.ranks} ranks: {call.mask.n:,} tokens in {plural(facts['documents'], 'document')}, "
            f"{_heads(call)}, {call.dtype}, backward {self.plan.policy}",
            f"work: {int(self.plan.area_by_rank().sum()):,} {_work_unit(call)}, the busiest rank has "
            f"{facts['max_over_mean']:.2f} of the mean",
            f"proven: {_what_is_proven(call)}, digest {self.plan.digest}",
            "",
            _rank_table(facts["ranks"]),
            "",
            f"moved, one call of {self.plan.call.op.name}: "
            + (
                ", ".join(f"{name} {readable_bytes(size)}" for name, size in facts["bytes_by_payload"].items() if size)
                or "nothing"
            ),
            *_traffic_lines(facts["traffic"], self.cluster),
            *(f"  {name}: {stats}" for name, stats in quality.quality(self.plan, self.cluster).items()),
        ]
        for direction, table in (("forward", self.plan.forward), ("backward", self.plan.backward)):
            lines += ["", _step_table(self.plan, direction, table)]
        return "\n".join(lines)

    def html(self) -> str:
        """The picture and the text, as an HTML fragment that needs nothing else. Needs matplotlib."""
        picture = base64.b64encode(self.picture()).decode()
        title = f"score matrix of {self.plan.strategy} on {self.plan.call.ranks} ranks, coloured by rank and by step"
        return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{picture}">\n<pre>{html.escape(str(self))}</pre>'

    def picture(self) -> bytes:
        """A PNG of the score matrix: who computes each cell, and in which step (forward). Needs matplotlib."""
        return draw_score_matrix(self.plan)


@checked
def explain(plan: Plan, cluster: AnyCluster | None = None) -> Explanation:
    """Prove a plan and show it; `cluster` says which ranks share a node, all of them by default.

    Raises PlanError when it cannot be proven, DistattnError when the cluster has another number of ranks.
    """
    cluster = Cluster(1, plan.call.ranks) if cluster is None else cluster
    if cluster.ranks != plan.call.ranks:
        raise DistattnError(f"the cluster has {cluster.nodes} x {cluster.devices} ranks, the plan {plan.call.ranks}.")
    return Explanation(plan, verify(plan), cluster)


def _heads(call: Call) -> str:
    if call.op.is_maximum:
        return f"{call.op.name}, {call.heads} states of {call.v_head_dim} maxima"
    if call.op.is_recurrent:
        return (
            f"{call.op.name}, {call.heads} states of {call.head_dim} x {call.v_head_dim} and {call.kv_heads} key heads"
        )
    return f"{call.heads} query and {call.kv_heads} key/value heads of {call.head_dim}"


def _work_unit(call: Call) -> str:
    return "tokens x heads" if call.op.is_recurrent else "cells x heads"


def _what_is_proven(call: Call) -> str:
    if call.op.is_recurrent:
        return "every token once, from all of its document before it in order"
    return "every allowed cell once"


def _traffic_lines(facts: dict[str, dict[str, int]], cluster: AnyCluster) -> list[str]:
    names = {"plan": "this plan", "lower_bound": "the least for these tasks", "plain_ring": "a plain ring"}
    lines = []
    for name, label in ((name, label) for name, label in names.items() if name in facts):
        crossing = (
            f", {readable_bytes(facts[name]['inter_node_bytes'])} of it between nodes" if cluster.nodes > 1 else ""
        )
        lines.append(f"  {label + ':':26s} {readable_bytes(facts[name]['total_bytes'])}{crossing}")
    return lines


def _rank_table(ranks: list[dict[str, int]]) -> str:
    shown = ranks
    if len(ranks) > _LISTED_RANKS:
        order = sorted(ranks, key=lambda row: row["cells_x_heads"])
        shown = [*order[: _LISTED_RANKS // 2], *order[-_LISTED_RANKS // 2 :]]
    mean = sum(row["cells_x_heads"] for row in ranks) / len(ranks) or 1.0
    sizes = ("sent_bytes", "received_bytes", "peak_forward_bytes", "peak_backward_bytes", "kept_bytes")
    head = ["rank", "tokens", "tasks", "work/mean", "sent", "received", "peak fwd", "peak bwd", "kept"]
    rows = [
        [str(row["rank"]), f"{row['tokens']:,d}", f"{row['tasks']:,d}", f"{row['cells_x_heads'] / mean:.2f}"]
        + [readable_bytes(row[name]) for name in sizes]
        for row in shown
    ]
    lines = aligned([head, *rows], left=0)
    if len(shown) < len(ranks):
        lines.append(f"     (the least and the most loaded of {len(ranks)} ranks)")
    return "\n".join(lines)


def _step_table(plan: Plan, direction: str, table: Table) -> str:
    work = task_areas(plan.call, table.tasks)
    rows = [[direction, "tasks", _work_unit(plan.call), "moves", "bytes"]]
    payloads = ["payloads"]
    schedules = [f"{direction} schedules: {table.label}"] if table.label else []
    for step in range(table.steps):
        tasks, moves = table.tasks["step"] == step, select_rows(table.moves, table.moves["step"] == step)
        size = readable_bytes(int(move_bytes(plan.call, moves).sum()))
        rows.append([f"step {step}", f"{tasks.sum():,d}", f"{work[tasks].sum():,d}", f"{num_rows(moves):,d}", size])
        payloads.append(", ".join(Payload(p).name for p in np.unique(moves["payload"])))
    steps = [f"{line}   {names}".rstrip() for line, names in zip(aligned(rows), payloads, strict=True)]
    return "\n".join([*schedules, *steps])


def draw_score_matrix(plan: Plan) -> bytes:
    """Draw the score matrix as a PNG: who computes each cell, and in which step (forward). Needs matplotlib."""
    from matplotlib.figure import Figure

    tasks = _drawn_tasks(plan)
    limits = np.unique(np.concatenate([tasks["h0"], tasks["h1"]]))
    # a mask without cells has no tasks: one empty panel
    ranges = list(pairwise(limits.tolist())) or [(0, plan.call.heads)]
    shown = ranges[:_PANELS]
    figure = Figure(figsize=(4.2 * (len(shown) + 1), 3.4), layout="constrained")
    axes = figure.subplots(1, len(shown) + 1, squeeze=False)[0]
    for axis, (h0, h1) in zip(axes, shown, strict=False):
        more = f" (of {len(ranges)} ranges)" if len(ranges) > len(shown) else ""
        _draw(figure, axis, plan, h0, "rank", plan.call.ranks, f"rank, heads {h0} to {h1 - 1}{more}")
    _draw(figure, axes[-1], plan, shown[0][0], "step", plan.forward.steps, "step")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def _draw(figure: Any, axis: Any, plan: Plan, head: int, colour_by: str, colours: int, label: str) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import BoundaryNorm

    tasks = _drawn_tasks(plan)
    here = select_rows(tasks, (tasks["h0"] <= head) & (head < tasks["h1"]))
    colours = max(colours, 1)
    norm = BoundaryNorm(np.arange(colours + 1) - 0.5, 256)
    scale = ScalarMappable(norm, colormaps[{"rank": "turbo", "step": "viridis"}[colour_by]])
    paint = scale.to_rgba(here[colour_by])
    # edges in the face's colour close the hairlines between neighbours
    axis.add_collection(PolyCollection(_outlines(plan, here), facecolors=paint, edgecolors=paint, linewidths=0.4))
    n = plan.call.mask.n
    axis.set(
        xlim=(0, n),
        ylim=(n, 0),
        xlabel="key (token)",
        ylabel="query (token)",
        aspect="equal",
        title=f"coloured by {label}",
    )
    ticks = np.unique(np.linspace(0, colours - 1, min(colours, 8)).round().astype(int))
    figure.colorbar(scale, ax=axis, label=colour_by, ticks=ticks, shrink=0.7)


def _drawn_tasks(plan: Plan) -> Columns:
    """The forward tasks; of a recurrence those with outputs, each with all cells that pass through its stretch."""
    tasks = plan.forward.tasks
    return select_rows(tasks, has_rows_and_keys(tasks)) if plan.call.op.is_recurrent else tasks


def _outlines(plan: Plan, tasks: Columns) -> list[np.ndarray]:
    """The outline of each task's allowed cells as a polygon of (key, query) corners."""
    out = []
    for band in task_bands(plan.call.mask, tasks):
        q: Ints = np.unique(np.linspace(band[Q0], band[Q1] - 1, _OUTLINE_ROWS).astype(np.int64))
        begin, end = row_key_ranges(np.broadcast_to(band, (len(q), len(band))), q)
        # a row is one token high: its corners at q and q + 1
        left = np.stack([np.repeat(begin, 2), np.stack([q, q + 1], 1).ravel()], 1)
        right = np.stack([np.repeat(end, 2), np.stack([q, q + 1], 1).ravel()], 1)
        out.append(np.concatenate([left, right[::-1]]))
    return out


def _max_over_mean(values: Ints) -> float:
    return float(values.max() / values.mean()) if values.any() else 1.0
