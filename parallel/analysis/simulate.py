"""Time a plan on a described cluster without running it: kernels, messages, waiting and memory. All numbers are simulated.

The simulation models our executor (parallel.runtime.execution). On every rank, a step starts when the rank's previous step has
ended, that is, when its kernels are done and its messages have arrived. One launch then computes the step's tasks on the
compute stream, while the step's messages travel on the communication stream. A message starts when both of its ends have
started the step, and it shares links with the other messages of the step. Packing before sending and merging after arrival
count as copies on the device. A step cannot start before the host has issued it.

All values are arrays over ranks and messages. The only loop is over steps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distattn.cluster.cost import (
    attention_speed,
    copy_seconds,
    expansion_seconds,
    flops_per_cell,
    launch_seconds,
    message_seconds,
    recurrence_flops_per_token,
    recurrence_seconds,
    tiled_area,
)
from distattn.cluster.spec import DIRECTIONS, AnyCluster, ClusterSpec, resolve_cluster
from distattn.ir.arguments import checked
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import expand_ranges, merge_intervals, sorted_unique
from distattn.ir.plan import (
    DTYPE_BYTES,
    REDUCED_PAYLOADS,
    Call,
    Plan,
    Table,
    has_rows_and_keys,
    move_bytes,
    num_rows,
    task_areas,
    task_bands,
)
from distattn.parallel.analysis.timeline import PassTimeline, Timeline
from distattn.parallel.analysis.verify import Proof, verify

Numbers = np.ndarray


@checked
def simulate(plan: Plan, cluster: AnyCluster | str | Path, proof: Proof | None = None) -> Timeline:
    """Time one call, forward and backward, on a ClusterSpec or anything else that `distattn.cluster.spec.load` accepts.

    proof: the result of `verify` for this plan; if None, the plan is proven here. Raise PlanError if the plan cannot be
    proven. Raise DistattnError if the cluster has no speeds, or does not have exactly one device per rank of the plan.
    """
    spec = resolve_cluster(cluster)
    if not isinstance(spec, ClusterSpec):
        raise DistattnError('simulate needs speeds: pass a ClusterSpec, its name such as "h200-8x8", or its TOML file.')
    if spec.ranks != plan.call.ranks:
        raise DistattnError(f"the plan has {plan.call.ranks} ranks, {spec.name} {spec.nodes} x {spec.devices} devices.")
    if proof is None:
        proof = verify(plan)
    elif proof.digest != plan.digest:
        raise DistattnError("the proof belongs to another plan; pass the result of verify for this plan.")
    passes = [simulate_pass(plan.call, spec, name, getattr(plan, name)) for name in DIRECTIONS]
    return Timeline(plan, spec, proof, *passes)


def simulated_seconds(plan: Plan, cluster: ClusterSpec) -> float:
    """Return the simulated seconds of a plan, forward plus backward, for choosing between plans. The plan need not be proven."""
    return sum(simulate_pass(plan.call, cluster, name, getattr(plan, name)).seconds for name in DIRECTIONS)


def simulate_pass(call: Call, cluster: ClusterSpec, direction: str, table: Table) -> PassTimeline:
    """Simulate one direction of a call. The table need not be proven."""
    ranks, steps = call.ranks, table.steps
    kernel_seconds = _kernel_seconds(call, cluster, direction, table)
    moves = table.moves
    # all moves from one rank to another in one step form one message
    key = (moves["step"] * ranks + moves["src"]) * ranks + moves["dst"]
    size = move_bytes(call, moves)
    # the rows of a table are sorted by step, source and destination
    first = np.flatnonzero(np.diff(key, prepend=-1))
    sizes, merged = np.zeros(0), np.zeros(0)
    if len(first):
        sizes = np.add.reduceat(size, first).astype(float)
        merged = np.add.reduceat(size * np.isin(moves["payload"], REDUCED_PAYLOADS), first).astype(float)
    pair, dst = np.divmod(key[first], ranks)
    step_of, src = np.divmod(pair, ranks)
    bounds = np.searchsorted(step_of, np.arange(steps + 1))
    begin, computed, arrived = (np.zeros((steps, ranks)) for _ in range(3))
    ready = np.zeros(ranks)
    host = cluster.device.host_us * 1e-6
    for step in range(steps):
        step_messages = slice(bounds[step], bounds[step + 1])
        start = np.maximum(ready, host * (step + 1))
        s, d, n = src[step_messages], dst[step_messages], sizes[step_messages]
        # a message waits for both ends, and for its sender to pack it
        packed = start + copy_seconds(cluster, np.bincount(s, n, ranks))
        delivered = np.maximum(packed[s], start[d]) + message_seconds(cluster, s, d, n)
        done = start.copy()
        np.maximum.at(done, d, delivered)
        np.maximum.at(done, s, delivered)
        # adding a partial result reads two tensors and writes one: 1.5 times the memory traffic of a copy
        done += copy_seconds(cluster, 1.5 * np.bincount(d, merged[step_messages], ranks))
        begin[step], computed[step], arrived[step] = start, start + kernel_seconds[step], done
        ready = np.maximum(computed[step], done)
    crossing = src // cluster.devices != dst // cluster.devices
    work = float(task_areas(call, table.tasks).astype(float).sum())
    if call.op.is_recurrent:
        per_unit = recurrence_flops_per_token(direction, call.head_dim, call.v_head_dim)
    else:
        per_unit = flops_per_cell(direction, call.head_dim, call.v_head_dim)
    return PassTimeline(
        direction,
        begin,
        computed,
        arrived,
        float(ready.max(initial=0.0)),
        work * per_unit,
        np.bincount(src, sizes * ~crossing, ranks).astype(np.int64),
        np.bincount(src, sizes * crossing, ranks).astype(np.int64),
    )


def _kernel_seconds(call: Call, cluster: ClusterSpec, direction: str, table: Table) -> Numbers:
    """Return the kernel seconds of each step on each rank, (steps, ranks)."""
    tasks = table.tasks
    out = np.zeros((table.steps, call.ranks))
    if not num_rows(tasks):
        return out
    if call.op.is_recurrent:
        return _recurrence_seconds(call, cluster, direction, table)
    if call.op.kind == "convolution":
        return _convolution_seconds(call, cluster, direction, table)
    bands = task_bands(call.mask, tasks)
    speed = attention_speed(cluster, direction, call.head_dim, tasks["q1"] - tasks["q0"], tasks["k1"] - tasks["k0"])
    cells, widest = tiled_area(bands, cluster.device.tile)
    launch = tasks["step"] * call.ranks + tasks["rank"]
    per_cell = flops_per_cell(direction, call.head_dim, call.v_head_dim)
    heads = tasks["h1"] - tasks["h0"]
    launches, seconds = launch_seconds(cluster, cells, widest, heads, speed, per_cell, launch)
    out.ravel()[launches] = seconds
    return out + _expansion_seconds(call, cluster, direction, table) if call.op.kind == "latent_attention" else out


def _expansion_seconds(call: Call, cluster: ClusterSpec, direction: str, table: Table) -> Numbers:
    """Return the seconds that latent attention spends on expanding latents, (steps, ranks).

    Within a launch, each latent is expanded only once for each head that reads it."""
    tasks = table.tasks
    launch = tasks["step"] * call.ranks + tasks["rank"]
    limits = sorted_unique(np.concatenate([tasks["h0"], tasks["h1"]]))
    i, head = expand_ranges(np.searchsorted(limits, tasks["h0"]), np.searchsorted(limits, tasks["h1"]))
    part, k0, k1 = merge_intervals(launch[i] * len(limits) + head, tasks["k0"][i], tasks["k1"][i])
    of_launch, head = np.divmod(part, len(limits))
    expanded = (k1 - k0) * (limits[head + 1] - limits[head])
    widths = call.op.latent_dim, call.head_dim - call.op.rotary_dim + call.v_head_dim
    seconds = expansion_seconds(cluster, direction, *widths, expanded)
    return np.bincount(of_launch, seconds, table.steps * call.ranks).reshape(table.steps, call.ranks)


def _recurrence_seconds(call: Call, cluster: ClusterSpec, direction: str, table: Table) -> Numbers:
    """Estimate the kernel seconds of a recurrence, (steps, ranks), from tokens x heads and fixed costs per launch and task."""
    tasks, device = table.tasks, cluster.device
    tokens, heads = tasks["k1"] - tasks["q0"], tasks["h1"] - tasks["h0"]
    shape = call.head_dim, call.v_head_dim
    seconds = recurrence_seconds(cluster, direction, *shape, tokens, heads, has_rows_and_keys(tasks))
    launch = tasks["step"] * call.ranks + tasks["rank"]
    size = table.steps * call.ranks
    # count one launch per step: only tasks of different kinds need several launches, and they rarely share a step
    launches = np.bincount(launch, minlength=size) > 0
    total = np.bincount(launch, seconds + device.task_us * 1e-6, size) + launches * device.launch_us * 1e-6
    return total.reshape(table.steps, call.ranks)


def _convolution_seconds(call: Call, cluster: ClusterSpec, direction: str, table: Table) -> Numbers:
    """Return the kernel seconds of a convolution, (steps, ranks). Only memory traffic counts: its kernels are memory-bound."""
    tasks, device = table.tasks, cluster.device
    tensors = 2 if direction == "forward" else 4
    cells = (tasks["q1"] - tasks["q0"]) * (tasks["h1"] - tasks["h0"])
    size = tensors * cells * call.v_head_dim * DTYPE_BYTES[call.dtype]
    launch, steps = tasks["step"] * call.ranks + tasks["rank"], table.steps
    launches = np.bincount(launch, minlength=steps * call.ranks) > 0
    total = np.bincount(launch, copy_seconds(cluster, size.astype(float)), steps * call.ranks)
    return (total + launches * device.launch_us * 1e-6).reshape(steps, call.ranks)
