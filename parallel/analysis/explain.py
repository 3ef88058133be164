"""Explain a plan to users: the work and messages of each rank, the balance, and a picture of the score matrix."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import numpy as np

from distattn.cluster.spec import AnyCluster
from distattn.cluster.topology import Cluster
from distattn.ir.arguments import checked
from distattn.ir.errors import DistattnError
from distattn.ir.plan import Call, Payload, Plan, Table, move_bytes, num_rows, select_rows, task_areas
from distattn.ir.text_format import align_columns, plural, readable_bytes
from distattn.parallel.analysis import quality
from distattn.parallel.analysis.lower_bounds import lower_bound, plain_ring_traffic, plan_traffic
from distattn.parallel.analysis.score_matrix import draw_score_matrix, score_matrix_html
from distattn.parallel.analysis.verify import Proof, verify

# largest number of ranks listed; if there are more, only the least and most loaded are shown
_LISTED_RANKS = 16


@dataclass(frozen=True)
class Explanation:
    """Explanation of a plan.

    `str()` is the text, `.html()` an HTML fragment with the picture, `.as_dict()` the facts as a dict.
    """

    plan: Plan
    proof: Proof
    cluster: AnyCluster

    def as_dict(self) -> dict[str, Any]:
        """Return every number in the text, in bytes, tokens and cells x query heads."""
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
            "max_over_mean": quality.max_over_mean(area),
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
        """Return the picture and the text as a self-contained HTML fragment. Needs matplotlib."""
        return f"{score_matrix_html(self.plan)}\n<pre>{html.escape(str(self))}</pre>"

    def picture(self) -> bytes:
        """Return a PNG of the forward score matrix, coloured by rank and by step. Needs matplotlib."""
        return draw_score_matrix(self.plan)


@checked
def explain(plan: Plan, cluster: AnyCluster | None = None) -> Explanation:
    """Prove and explain a plan. cluster: determines which ranks share a node; by default, all do.

    Raise PlanError if the plan cannot be proven, DistattnError if the cluster has a different number of ranks.
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
    lines = align_columns([head, *rows], left=0)
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
    steps = [f"{line}   {names}".rstrip() for line, names in zip(align_columns(rows), payloads, strict=True)]
    return "\n".join([*schedules, *steps])
