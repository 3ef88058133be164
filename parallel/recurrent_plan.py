"""Plans of recurrences: either states move and tokens stay (`scan`), or tokens move and states stay (`ulysses`).

A state is smaller than the tokens of most segments, so `scan` is faster if documents have few segments. If a layout cuts
documents into many, or gives ranks unequal numbers of tokens, two all-to-alls of tokens may take less time.
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
    """Plan one call of a recurrence by `scan` or by `ulysses`, whichever is faster in simulation, forward and backward together.

    op and heads as in `make_plan`, which has the other settings; config's strategy, backward and options are attention's, and
    not used. `explain` reports both times. The plan is scan's if its options are given, if speeds are unknown, if there are
    fewer heads than ranks, and if a rank has no tokens: it may be a server, which computes attention only. Raise as
    `make_plan` does; if both strategies are refused, raise scan's error.
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
    # scan comes first among equals, because its ranks keep less for the backward pass
    timed = sorted(((simulated_seconds(plan, cluster), plan) for plan in plans), key=lambda timed_plan: timed_plan[0])
    times = ", ".join(f"{plan.strategy} {1e3 * seconds:.3f} ms" for seconds, plan in timed)
    chosen = timed[0][1]
    label = f"{chosen.forward.label or 'all tokens move'}; {times}, simulated, forward and backward"
    return replace(chosen, forward=replace(chosen.forward, label=label))
