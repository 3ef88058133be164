"""The faster layout of a span of recurrent layers: that of the model, or contiguous slices with a re-layout at both ends.

Contiguous slices have the fewest states: a document of m segments moves at least m - 1 in every layer. Tokens that move before
the span and back after it move once, however many layers it has.
"""

from __future__ import annotations

import numpy as np

from distattn.cluster.cost import recurrence_seconds
from distattn.cluster.spec import DIRECTIONS, ClusterSpec
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import Plan
from distattn.parallel.analysis.simulate import simulated_seconds
from distattn.parallel.make_plan import make_plan

# the name of the layout with the fewest segments
SPAN_LAYOUT = "contiguous"


def relayout_may_be_faster(here: Plan, there: Layout, *, layers: int, width: int, cluster: ClusterSpec) -> bool:
    """Return whether the other layout may be faster. No plan of it is made: none beats an equal share of the work on each rank.

    here, layers, width and cluster as in `relayout_is_faster`. Return False if both layouts are equal.
    """
    call = here.call
    if there == call.layout:
        return False
    work = np.array([call.mask.n]), np.array([call.heads]), np.array([True])
    seconds = [
        recurrence_seconds(cluster, direction, call.head_dim, call.v_head_dim, *work)[0] for direction in DIRECTIONS
    ]
    least = float(sum(seconds)) / call.ranks
    gained = layers * (simulated_seconds(here, cluster) - least)
    return relayout_seconds(call.layout, there, width, call.dtype, cluster) < gained


def relayout_is_faster(here: Plan, there: Plan, *, layers: int, width: int, cluster: ClusterSpec) -> bool:
    """Return whether a span of recurrent layers is faster in the layout of another plan, in simulation, forward and backward.

    here, there: plans of one layer in the model's layout and in the other. layers: number of layers. width: of the hidden
    states, which move in and out.
    """
    gained = layers * (simulated_seconds(here, cluster) - simulated_seconds(there, cluster))
    call = here.call
    return relayout_seconds(call.layout, there.call.layout, width, call.dtype, cluster) < gained


def relayout_seconds(here: Layout, there: Layout, width: int, dtype: str, cluster: ClusterSpec) -> float:
    """Return the simulated seconds in which rows of `width` numbers, and their gradients, move to another layout and back."""
    # a convolution of one tap moves only tokens to the ranks that compute them, and results back
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
