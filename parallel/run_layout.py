"""Where a run of recurrent layers wants its tokens: where they are, or on contiguous slices, with two re-layouts around the run.

Contiguous slices have the fewest states: a document of m stretches moves at least m - 1 in every layer. Tokens that move before
the run and back after it move once, however many layers it has.
"""

from __future__ import annotations

from typing import Any

from distattn.cluster.spec import ClusterSpec
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.parallel.analysis.simulate import simulated_seconds
from distattn.parallel.make_plan import make_plan

# the layout of fewest stretches, by its name
RUN_LAYOUT = "contiguous"


def wants_relayout(layout: Layout, *, layers: int, width: int, cluster: ClusterSpec, dtype: str, **shape: Any) -> bool:
    """Whether `layers` recurrent layers in a row are faster on contiguous slices, in simulation, forward and backward.

    width: of hidden states, which move in and out. shape: op, heads, kv_heads, head_dim and v_head_dim, as in `make_plan`.
    """
    there = Layout.contiguous(layout.lengths, layout.ranks)
    mask = Mask.documents(layout.lengths)

    def of_layers(where: Layout) -> float:
        plan = make_plan(mask, where, strategy="scan", cluster=cluster, dtype=dtype, **shape)
        return layers * simulated_seconds(plan, cluster)

    return of_layers(there) + relayout_seconds(layout, there, width, dtype, cluster) < of_layers(layout)


def relayout_seconds(here: Layout, there: Layout, width: int, dtype: str, cluster: ClusterSpec) -> float:
    """Simulated seconds in which rows of `width` numbers go to another layout and come back, and so do their gradients."""
    # a convolution of one tap moves nothing but tokens to where it is computed, and results home
    plan = make_plan(
        Mask.documents(here.lengths, (0, 0)),
        here,
        strategy="allgather",
        op="convolution",
        heads=1,
        kv_heads=1,
        head_dim=1,
        v_head_dim=width,
        dtype=dtype,
        comm_dtype=dtype,
        working_layout=there,
    )
    return simulated_seconds(plan, cluster)
