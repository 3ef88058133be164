"""A plan timed on a described cluster, without running it: kernels, messages, waiting, memory. All numbers are simulated.

What is simulated is our executor (parallel/execute.py). On every rank a step begins when the rank's own last step has ended:
its kernels are done and its messages are there. Then one launch computes the step's tasks on the compute stream while the
step's messages travel on the communication stream; a message begins when both of its ends have begun the step, and shares
links with the other messages of the step. Packing before sending and merging of what arrives are copies on the device. A
step cannot begin before the host has issued it.

Everything is arrays over ranks and messages; the only loop is over steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from distattn.cluster import describe
from distattn.cluster.cost import (
    attention_speed,
    copy_seconds,
    flops_of,
    launch_seconds,
    message_seconds,
    tiled_area,
)
from distattn.cluster.describe import Description
from distattn.errors import DistattnError
from distattn.intervals import Ints
from distattn.parallel.verify import Proof, verify
from distattn.plan import ACCUMULATING, Plan, Table, areas_of_tasks, bytes_of_moves, count, task_bands

Numbers = np.ndarray


@dataclass(frozen=True)
class Pass:
    """One direction of a plan in time; seconds, (steps, ranks): when each step began, its kernels and its messages ended.

    Kernels or messages that a rank does not have in a step end when the step begins. inside, across: bytes sent by each
    rank within its node and to other nodes.
    """

    direction: str
    begin: Numbers
    computed: Numbers
    arrived: Numbers
    seconds: float
    flops: float
    inside: Ints
    across: Ints

    @property
    def busy(self) -> Numbers:
        """Seconds each rank computes."""
        return (self.computed - self.begin).sum(0)

    @property
    def idle(self) -> Numbers:
        """Seconds each rank does not compute until the slowest has ended."""
        return self.seconds - self.busy

    @property
    def exposed(self) -> Numbers:
        """Seconds each rank waits for messages after its kernels, or without any."""
        return np.maximum(self.arrived - self.computed, 0).sum(0)


@dataclass(frozen=True)
class Timeline:
    """A plan on a cluster, simulated. `str()` is the text, `.as_dict()` the numbers, `.perfetto()` a trace."""

    plan: Plan
    description: Description
    proof: Proof
    forward: Pass
    backward: Pass

    @property
    def passes(self) -> tuple[Pass, Pass]:
        return self.forward, self.backward

    @cached_property
    def peak_bytes(self) -> Ints:
        """Bytes of buffers each rank needs at once beside its own tensors, with what it keeps for the backward."""
        return np.maximum(self.proof.forward_peak, self.proof.backward_peak) + self.proof.kept

    @property
    def balance(self) -> float:
        """Cells of the busiest rank over the mean."""
        area = self.plan.area_by_rank().astype(float)
        return float(area.max() / area.mean()) if area.any() else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Every number of the text; seconds, bytes, 10^12 operations per second and device."""
        out: dict[str, Any] = {
            "simulated": True,
            "strategy": self.plan.strategy,
            "cluster": self.description.name,
            "ranks": self.plan.call.ranks,
            "balance": self.balance,
            "peak_bytes": int(self.peak_bytes.max()),
        }
        for one in self.passes:
            out[one.direction] = {
                "seconds": one.seconds,
                "tflops": one.flops / max(one.seconds, 1e-30) / self.plan.call.ranks / 1e12,
                "exposed_seconds": float(one.exposed.max(initial=0)),
                "idle_seconds": float(one.idle.mean()),
                "bytes_inside": int(one.inside.sum()),
                "bytes_across": int(one.across.sum()),
            }
        return out

    def __str__(self) -> str:
        facts = self.as_dict()
        lines = [f"{self.plan.strategy} on {self.description.name}, {self.plan.call.ranks} ranks (simulated)"]
        for one in self.passes:
            row = facts[one.direction]
            lines.append(
                f"{one.direction:8s} {row['seconds'] * 1e3:9.3f} ms  {row['tflops']:5.0f} TFLOP/s per device  "
                f"waiting for messages {row['exposed_seconds'] * 1e3:.3f} ms at most  idle {row['idle_seconds'] * 1e3:.3f} ms "
                f"on average  {row['bytes_inside'] / 1e9:.2f} GB inside nodes, {row['bytes_across'] / 1e9:.2f} GB across"
            )
        lines.append(
            f"the busiest rank computes {self.balance:.2f} of the mean; buffers need {facts['peak_bytes'] / 1e9:.2f} GB at most"
        )
        return "\n".join(lines)

    def perfetto(self) -> dict[str, Any]:
        """Both passes as trace events for ui.perfetto.dev: a process for each rank, a thread for each stream."""
        events: list[dict[str, Any]] = []
        start = 0.0
        for one in self.passes:
            for stream, ends in enumerate((one.computed, one.arrived)):
                for step, rank in np.argwhere(ends > one.begin).tolist():
                    events.append(
                        {
                            "name": f"{one.direction} step {step} {('kernels', 'messages')[stream]}",
                            "ph": "X",
                            "pid": rank,
                            "tid": stream,
                            "ts": (start + float(one.begin[step, rank])) * 1e6,
                            "dur": float(ends[step, rank] - one.begin[step, rank]) * 1e6,
                        }
                    )
            start += one.seconds
        names = [
            {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank} (simulated)"}}
            for rank in range(self.plan.call.ranks)
        ]
        return {"traceEvents": names + events, "displayTimeUnit": "ms"}


def simulate(plan: Plan, cluster: Description | str | Path) -> Timeline:
    """Time one attention call, forward and backward, on a cluster: a description, or what `describe.load` takes.

    Raises PlanError when the plan cannot be proven, DistattnError when the cluster has not as many devices as it has ranks.
    """
    description = cluster if isinstance(cluster, Description) else describe.load(cluster)
    if description.ranks != plan.call.ranks:
        raise DistattnError(
            f"the plan has {plan.call.ranks} ranks, {description.name} {description.nodes} x {description.devices} devices."
        )
    proof = verify(plan)
    passes = [_pass(plan, description, name, getattr(plan, name)) for name in describe.DIRECTIONS]
    return Timeline(plan, description, proof, *passes)


def _pass(plan: Plan, description: Description, direction: str, table: Table) -> Pass:
    call, ranks, steps = plan.call, plan.call.ranks, table.steps
    kernels = _kernels(plan, description, direction, table)
    moves = table.moves
    # messages: the moves of one step between two ranks
    key = (moves["step"] * ranks + moves["src"]) * ranks + moves["dst"]
    size = bytes_of_moves(call, moves)
    adding = np.isin(moves["payload"], ACCUMULATING)
    messages, index = np.unique(key, return_inverse=True)
    sizes = np.bincount(index, size, len(messages))
    merged = np.bincount(index, size * adding, len(messages))
    pair, dst = np.divmod(messages, ranks)
    step_of, src = np.divmod(pair, ranks)
    bounds = np.searchsorted(step_of, np.arange(steps + 1))
    begin, computed, arrived = (np.zeros((steps, ranks)) for _ in range(3))
    ready = np.zeros(ranks)
    host = description.device.host_us * 1e-6
    for step in range(steps):
        here = slice(bounds[step], bounds[step + 1])
        start = np.maximum(ready, host * (step + 1))
        s, d, n = src[here], dst[here], sizes[here]
        # a message waits for both ends, and for what its sender has to pack
        packed = start + copy_seconds(description, np.bincount(s, n, ranks))
        there = np.maximum(packed[s], start[d]) + message_seconds(description, s, d, n)
        landed = start.copy()
        np.maximum.at(landed, d, there)
        np.maximum.at(landed, s, there)
        # what is added is read twice and written once
        landed += copy_seconds(description, 1.5 * np.bincount(d, merged[here], ranks))
        begin[step], computed[step], arrived[step] = start, start + kernels[step], landed
        ready = np.maximum(computed[step], landed)
    crossing = src // description.devices != dst // description.devices
    work = float(areas_of_tasks(call, table.tasks).astype(float).sum())
    return Pass(
        direction,
        begin,
        computed,
        arrived,
        float(ready.max(initial=0.0)),
        work * flops_of(direction, call.head_dim, call.v_head_dim),
        np.bincount(src, sizes * ~crossing, ranks).astype(np.int64),
        np.bincount(src, sizes * crossing, ranks).astype(np.int64),
    )


def _kernels(plan: Plan, description: Description, direction: str, table: Table) -> Numbers:
    """Seconds of each step's launch on each rank, (steps, ranks)."""
    call, tasks = plan.call, table.tasks
    out = np.zeros((table.steps, call.ranks))
    if not count(tasks):
        return out
    bands = task_bands(call.mask, tasks)
    speed = attention_speed(description, direction, call.head_dim, tasks["q1"] - tasks["q0"], tasks["k1"] - tasks["k0"])
    cells, widest = tiled_area(bands, description.device.tile)
    launch = tasks["step"] * call.ranks + tasks["rank"]
    per_cell = flops_of(direction, call.head_dim, call.v_head_dim)
    heads = tasks["h1"] - tasks["h0"]
    launches, seconds = launch_seconds(description, cells, widest, heads, speed, per_cell, launch)
    out.ravel()[launches] = seconds
    return out
