"""Plans of multi-head latent attention: either latents move, or the keys and values that their owners expand them to.

A latent of 512 and a rotary key of 64 have as many numbers as the keys and values of two heads. So if a rank reads the keys of
many heads, latents take far fewer bytes. But every rank that receives a latent expands it again, in each direction, and a
strategy that deals heads to ranks needs the keys of only a few heads. Both plans are made, and the faster one is taken.
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
    """Plan one call of latent attention: of `latent_op(rotary_dim, latent_dim)`, or of attention with one key head per query
    head.

    heads, head_dim (with the rotary part) and v_head_dim are those of queries and values; config, cluster and settings are
    `make_plan`'s. On a described cluster take the plan that is faster in simulation, forward and backward together with all
    expansions. Otherwise take the one that moves fewer bytes. If one cannot be planned, take the other. `latent_attention`
    takes either. Raise as `make_plan` does.
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
    """Return the simulated seconds of either plan, forward and backward, with the owners' expansion of their latents."""
    call = plan.call
    total = simulated_seconds(plan, cluster)
    if call.op.kind == "latent_attention":
        # its kernels include the expansions
        return total
    most = np.array([max(call.layout.shard_sizes())])
    widths = latent_dim, call.head_dim - rotary_dim + call.v_head_dim
    return total + sum(
        float(expansion_seconds(cluster, name, *widths, most * call.heads, kept=True)[0]) for name in DIRECTIONS
    )
