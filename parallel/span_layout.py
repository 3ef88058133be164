"""The choice of layout for a span of recurrent layers: the model's, or contiguous slices with a re-layout at both ends.

Contiguous slices have the fewest states to move: a document of m segments moves at least m - 1 states in every layer. Tokens
move only once to the span's layout and once back, no matter how many layers the span has.
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

# the layout with the fewest segments
SPAN_LAYOUT = "contiguous"


def relayout_may_be_faster(here: Plan, there: Layout, *, layers: int, width: int, cluster: ClusterSpec) -> bool:
    """Return False if layout `there` cannot be faster even with an equal share of the work on each rank. No plan is made.

    The other arguments are those of `relayout_is_faster`. Also return False if both layouts are equal.
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
    """Return whether a span of recurrent layers simulates faster in the layout of plan `there`, forward plus backward.

    here, there: plans for one layer, in the model's layout and in the span's. layers: the number of layers in the span.
    width: the width of the hidden states, which move to the span's layout and back.
    """
    gained = layers * (simulated_seconds(here, cluster) - simulated_seconds(there, cluster))
    call = here.call
    return relayout_seconds(call.layout, there.call.layout, width, call.dtype, cluster) < gained


def relayout_seconds(here: Layout, there: Layout, width: int, dtype: str, cluster: ClusterSpec) -> float:
    """Return the simulated seconds for moving rows of `width` elements, and their gradients, to layout `there` and back."""
    # plan a one-tap convolution, which only moves tokens to the ranks that compute them and results back
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
