"""Make plans: run a strategy from the table, and choose between its candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distattn.cluster.spec import AnyCluster, ClusterSpec, resolve_cluster
from distattn.ir.arguments import checked
from distattn.ir.errors import DistattnError, PlanError
from distattn.ir.intervals import sorted_unique
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.op import ATTENTION, Op, op_of
from distattn.ir.plan import Call, Plan, Table, dtype_name, move_bytes
from distattn.parallel.analysis.simulate import simulate_pass
from distattn.parallel.analysis.verify import verify
from distattn.parallel.attention_config import AttentionConfig
from distattn.parallel.strategy_table import STRATEGIES as STRATEGIES
from distattn.parallel.strategy_table import check_names
from distattn.parallel.strategy_table import strategies_of as strategies_of
from distattn.parallel.tables.backward import derive_backward
from distattn.parallel.tables.head_chunks import HeadChunks, in_head_chunks, possible_head_chunks
from distattn.parallel.tables.relayout import relayout_table
from distattn.parallel.tables.written_once import written_once


@checked
def make_plan(
    mask: Mask,
    layout: Layout,
    *,
    config: AttentionConfig | None = None,
    strategy: str | None = None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype: Any,
    backward: str | None = None,
    comm_dtype: Any = None,
    cluster: AnyCluster | str | Path | None = None,
    options: Mapping[str, object] | None = None,
    working_layout: Layout | None = None,
    max_buffer_bytes: int | None = None,
    op: Op | str = ATTENTION,
) -> Plan:
    """Plan one call. This is a pure host function without torch that returns the same plan on every rank.

    heads and kv_heads count the query and key/value heads on one tensor-parallel rank. dtype is that of q, k and v
    ("float16", "bfloat16", "float32", "float64", or a torch or NumPy dtype). backward is one of POLICIES; the default is the
    strategy's own. cluster determines which ranks share a node. If it is a ClusterSpec, the name of one ("h200-8x8") or a
    TOML file, it also gives the speeds of kernels and links. options are the strategy's own options, keyed by name.
    comm_dtype is the dtype in which outputs and gradients are sent: q's, or by default the accumulation dtype. If partial
    results are never added, sending in q's dtype loses no precision. working_layout is the layout on which the strategy
    works, if it differs from that of q, k, v and o; the call moves tokens there and back. max_buffer_bytes is the most bytes
    of buffers that a rank may hold at any one time (see `verify`). If a plan needs more, heads are computed in several
    chunks. The backward policy is then "keep" only if requested explicitly, because kept tensors do not shrink.

    op is the op to compute, an Op or its name: "attention", or a recurrence ("gated_delta_rule", "ssd", "gla", ...; see
    `distattn.ir.op`). For a recurrence, heads are those of values and states, kv_heads are those of queries and keys, head_dim
    and v_head_dim are the dims of a state, and the strategies are those of `strategies_of(op)`.

    config holds strategy, backward, options, comm_dtype, cluster and max_buffer_bytes in one record. If strategy is also
    given, it replaces the config's strategy, backward and options. Options given without a strategy are added to the
    config's.

    A strategy's candidates are compared by bytes or by simulated seconds (see `Strategy`), separately for forward and
    backward, or together if the backward keeps received tensors. Raise DistattnError if the call cannot be planned as
    requested, and PlanError, naming the fewest bytes possible, if no number of chunks suffices.
    """
    op = op_of(op)
    if config is not None:
        if (comm_dtype, cluster, max_buffer_bytes) != (None, None, None):
            raise DistattnError(
                "make_plan: comm_dtype, cluster and max_buffer_bytes are those of config; set them there."
            )
        if strategy is None:
            strategy, backward = config.strategy, backward or config.backward_policy
            options = {**config.strategy_options, **(options or {})}
        comm_dtype, cluster, max_buffer_bytes = config.comm_dtype, config.cluster, config.max_buffer_bytes
    if strategy is None:
        raise DistattnError('a strategy is needed, such as strategy="ring".')
    check_names(strategy, backward, options, op)
    cluster = resolve_cluster(cluster)
    if cluster is not None and cluster.ranks != layout.ranks:
        raise DistattnError(f"the cluster has {cluster.nodes} x {cluster.devices} ranks, the layout {layout.ranks}.")
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    call = Call(mask, layout, heads, kv_heads, head_dim, v_head_dim, dtype_name(dtype), dtype_name(comm_dtype), op=op)
    chosen = strategies_of(op)[strategy]
    working = call if working_layout is None else replace(call, layout=working_layout)
    if chosen.own_backward:
        working = call
    if working_layout is not None and working_layout.ranks != call.ranks:
        raise DistattnError(f"the working layout has {working_layout.ranks} ranks, the layout {call.ranks}.")

    def candidates(direction: str, policy: str) -> list[Table]:
        seconds = _seconds_of_tables(working, cluster, direction)
        candidate_tables = chosen.candidates(working, cluster, options or {}, direction, working_layout, seconds)
        if chosen.choose_by == "seconds":
            return [_fastest(working, cluster, candidate_tables, direction, policy)]
        return list(candidate_tables)

    def planned(
        policy: str, forwards: list[Table], backwards: list[Table] | None, cut: HeadChunks | None = None
    ) -> Plan:
        def tables(candidate_tables: list[Table]) -> list[Table]:
            if cut is not None:
                candidate_tables = [in_head_chunks(working, table, cut) for table in candidate_tables]
            if working is not call:
                candidate_tables = [relayout_table(call, working, table) for table in candidate_tables]
            return [_without_idle_steps(table) for table in candidate_tables]

        forwards = tables(forwards)
        derived = forwards if backwards is None else tables(backwards)
        if not op.has_gradient:
            derived = [Table.from_rows([])] * len(forwards)
        elif not chosen.own_backward:
            derived = [derive_backward(call, table, policy, cluster) for table in derived]
        chosen_tables = _fewest_bytes(call, forwards, derived, policy)
        return Plan(replace(call, written_once=written_once(call, *chosen_tables)), *chosen_tables, policy, strategy)

    policy = backward or chosen.default_backward(working, cluster, options or {})
    if config is not None and config.servers and policy == "keep":
        raise DistattnError('servers keep nothing from pass to pass; use backward "refetch-home".')
    forwards = candidates("forward", policy)
    # True if the backward pass has its own tasks
    has_backward_tasks = op.has_gradient and (chosen.own_backward or (chosen.by_direction and policy != "keep"))
    backwards = candidates("backward", policy) if has_backward_tasks else None
    plan = planned(policy, forwards, backwards)
    if max_buffer_bytes is None or (least := _most_needed(plan)) <= max_buffer_bytes:
        return plan
    chunked_policy = "refetch-home" if policy == "keep" and backward is None else policy
    # the states of a recurrence cannot be cut by heads
    cuts = [] if op.is_recurrent else possible_head_chunks(working, forwards[0])
    for cut in cuts:
        plan = planned(chunked_policy, forwards, backwards, cut)
        if (needed := _most_needed(plan)) <= max_buffer_bytes:
            return plan
        least = min(least, needed)
    raise PlanError(
        f"{strategy}: a rank needs at least {least:,} bytes of buffers, even with heads in as many chunks as possible; "
        f"max_buffer_bytes is {max_buffer_bytes:,}. Raise it, or use more ranks or another strategy."
    )


def _most_needed(plan: Plan) -> int:
    """Return the peak bytes of buffers: the maximum over ranks and passes."""
    proof = verify(plan)
    return int(max(proof.forward_peak.max(), proof.backward_peak.max()))


def _fewest_bytes(call: Call, forwards: list[Table], backwards: list[Table], policy: str) -> tuple[Table, Table]:
    """Return the forward and backward tables that move the fewest bytes. With policy "keep", both are from the same
    candidate."""
    forward_bytes, backward_bytes = (
        np.array([int(move_bytes(call, table.moves).sum()) for table in tables]) for tables in (forwards, backwards)
    )
    if policy == "keep":
        best = int((forward_bytes + backward_bytes).argmin())
        return forwards[best], backwards[best]
    return forwards[int(forward_bytes.argmin())], backwards[int(backward_bytes.argmin())]


def _fastest(call: Call, cluster: AnyCluster | None, candidates: Iterable[Table], direction: str, policy: str) -> Table:
    """Return the candidate that simulates fastest, or the first if speeds are unknown. See `Strategy`."""
    remaining = iter(candidates)
    asked_for = next(remaining)
    if not isinstance(cluster, ClusterSpec):
        return asked_for
    spec = cluster
    # candidates are generated lazily, so tables that will not be simulated are never planned
    at_home = next(remaining, None)
    if at_home is None:
        return asked_for

    def seconds(table: Table) -> float:
        # a candidate for the backward pass does not contain the moves of gradients yet
        whole = table if direction == "forward" else derive_backward(call, table, policy, spec)
        return simulate_pass(call, spec, direction, whole).seconds

    fewest_seconds, best = seconds(at_home), at_home
    if seconds(asked_for) < fewest_seconds:
        return asked_for
    for table in remaining:
        if (table_seconds := seconds(table)) < fewest_seconds:
            fewest_seconds, best = table_seconds, table
    return best


def _seconds_of_tables(call: Call, cluster: AnyCluster | None, direction: str) -> Callable[[Table], float] | None:
    """Return a function that maps a table of one direction to simulated seconds, or None if speeds are unknown."""
    if not isinstance(cluster, ClusterSpec):
        return None
    spec = cluster
    return lambda table: simulate_pass(call, spec, direction, _without_idle_steps(table)).seconds


def _without_idle_steps(table: Table) -> Table:
    """Return the table without the steps in which no rank does anything, and with the remaining steps renumbered."""
    busy = sorted_unique(np.concatenate([table.tasks["step"], table.moves["step"]]))
    tasks, moves = ({**part, "step": np.searchsorted(busy, part["step"])} for part in (table.tasks, table.moves))
    return Table(tasks, moves, table.label)
