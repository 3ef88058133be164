"""Plans of recurrences: either states move and tokens stay (`scan`), or tokens move and states stay (`ulysses`).

A state is smaller than the tokens of most segments, so `scan` is faster if documents have few segments. If a layout cuts
documents into many segments, or gives ranks unequal numbers of tokens, two all-to-alls of tokens may take less time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from distattn.cluster.spec import AnyCluster, ClusterSpec, resolve_cluster
from distattn.ir.arguments import checked
from distattn.ir.errors import PlanError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.op import Op
from distattn.ir.plan import Plan
from distattn.parallel.analysis.simulate import simulated_seconds
from distattn.parallel.attention_config import AttentionConfig
from distattn.parallel.make_plan import make_plan


@checked
def make_recurrent_plan(
    mask: Mask,
    layout: Layout,
    *,
    op: Op | str,
    heads: int,
    config: AttentionConfig | None = None,
    cluster: AnyCluster | str | Path | None = None,
    options: Mapping[str, object] | None = None,
    **settings: Any,
) -> Plan:
    """Plan one call of a recurrence with `scan` or `ulysses`, whichever simulates faster, forward plus backward.

    op, heads and settings are those of `make_plan`. config's strategy, backward and options are for attention and not used
    here. `explain` reports both times. The plan is always scan's if options for it are given, if speeds are unknown, if there
    are fewer heads than ranks, or if a rank has no tokens: such a rank may be a server, which computes attention only. Raise
    the errors of `make_plan`. If both strategies fail, the error is scan's.
    """
    cluster = resolve_cluster(cluster)
    plan = partial(make_plan, mask, layout, op=op, heads=heads, config=config, cluster=cluster, **settings)
    cluster = cluster if config is None else config.cluster
    if options or not isinstance(cluster, ClusterSpec) or heads < layout.ranks or not layout.shard_sizes().all():
        return plan(strategy="scan", options=options)
    plans, refusals = [], []
    for strategy in ("scan", "ulysses"):
        try:
            plans.append(plan(strategy=strategy))
        except PlanError as refusal:
            # the other strategy may need less memory
            refusals.append(refusal)
    if not plans:
        raise refusals[0]
    # the sort is stable: scan comes first if times are equal, because it keeps less for the backward pass
    timed = sorted(((simulated_seconds(plan, cluster), plan) for plan in plans), key=lambda timed_plan: timed_plan[0])
    times = ", ".join(f"{plan.strategy} {1e3 * seconds:.3f} ms" for seconds, plan in timed)
    chosen = timed[0][1]
    label = f"{chosen.forward.label or 'all tokens move'}; {times}, simulated, forward and backward"
    return replace(chosen, forward=replace(chosen.forward, label=label))
