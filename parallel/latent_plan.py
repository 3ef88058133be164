"""Plans of multi-head latent attention: either latents move, or the keys and values expanded from them by their owners.

A latent of 512 elements and a rotary key of 64 are as large as the keys and values of about two heads. If a rank needs the keys
of many heads, sending latents therefore takes far fewer bytes. However, every rank that receives a latent expands it again, in
each direction, and strategies that distribute heads over ranks need the keys of only a few heads. Both plans are made, and the
faster plan is used.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distattn.cluster.cost import expansion_seconds
from distattn.cluster.spec import DIRECTIONS, AnyCluster, ClusterSpec, resolve_cluster
from distattn.ir.arguments import checked
from distattn.ir.errors import PlanError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.op import ATTENTION, latent_op
from distattn.ir.plan import Plan
from distattn.parallel.analysis.simulate import simulated_seconds
from distattn.parallel.attention_config import AttentionConfig
from distattn.parallel.make_plan import make_plan


@checked
def make_latent_plan(
    mask: Mask,
    layout: Layout,
    *,
    heads: int,
    head_dim: int,
    v_head_dim: int,
    rotary_dim: int,
    latent_dim: int,
    config: AttentionConfig | None = None,
    cluster: AnyCluster | str | Path | None = None,
    **settings: Any,
) -> Plan:
    """Plan one call of latent attention, either as `latent_op(rotary_dim, latent_dim)` or as attention with one KV head per
    query head.

    heads, head_dim (including the rotary part) and v_head_dim are those of queries and values. config, cluster and settings are
    those of `make_plan`. Given a ClusterSpec, return the plan that simulates faster, forward plus backward with all expansions.
    Otherwise return the plan that moves fewer bytes. If one form cannot be planned, return the plan of the other.
    `latent_attention` accepts both. Raise the errors of `make_plan`.
    """
    cluster = resolve_cluster(cluster)
    widths = partial(make_plan, mask, layout, heads=heads, head_dim=head_dim, v_head_dim=v_head_dim)
    plan = partial(widths, config=config, cluster=cluster, **settings)
    plans, refusals = [], []
    for kv_heads, op in ((1, latent_op(rotary_dim, latent_dim)), (heads, ATTENTION)):
        try:
            plans.append(plan(kv_heads=kv_heads, op=op))
        except PlanError as refusal:
            # the other form may need less memory
            refusals.append(refusal)
    if not plans:
        raise refusals[0]
    cluster = cluster if config is None else config.cluster
    if not isinstance(cluster, ClusterSpec):
        return min(plans, key=lambda plan: int(plan.bytes()["bytes"].sum()))
    return min(plans, key=lambda plan: latent_seconds(plan, cluster, rotary_dim, latent_dim))


def latent_seconds(plan: Plan, cluster: ClusterSpec, rotary_dim: int, latent_dim: int) -> float:
    """Return the simulated seconds of a plan of either form, forward plus backward, with the owners' expansions of latents."""
    call = plan.call
    total = simulated_seconds(plan, cluster)
    if call.op.kind == "latent_attention":
        # the simulated kernels of this op include the expansions
        return total
    most = np.array([max(call.layout.shard_sizes())])
    widths = latent_dim, call.head_dim - rotary_dim + call.v_head_dim
    return total + sum(
        float(expansion_seconds(cluster, name, *widths, most * call.heads, kept=True)[0]) for name in DIRECTIONS
    )
