"""Plans of a softmax over the preceding tokens: one each for its maxima, its sums, and the weighted sums of values."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

from distattn.ir.arguments import checked
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.op import OPS, PREFIX_MAX, Op
from distattn.ir.plan import Plan, dtype_name
from distattn.parallel.make_plan import make_plan


class PrefixSoftmaxPlans(NamedTuple):
    """The plans of `prefix_softmax`, or their executables, in the order in which they run.

    maximum: a "prefix_max" over each latent's logits. total: an "ssd" with one head per latent, for the sums of exponentials.
    weighted: a "gla" for the sums of values times exponentials, with one state row per latent.
    """

    maximum: Any
    total: Any
    weighted: Any


class CallSizes(TypedDict):
    """The heads, dims, dtype and op of a call, as keyword arguments for `make_plan`."""

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    op: Op


@checked
def make_prefix_softmax_plans(
    mask: Mask,
    layout: Layout,
    *,
    heads: int,
    latents: int,
    v_head_dim: int,
    dtype: Any,
    strategy: str = "scan",
    **settings: Any,
) -> PrefixSoftmaxPlans:
    """Plan one call of `prefix_softmax` on causal documents, on the host without torch. All ranks get the same plans.

    latents: the number of softmaxes over tokens in each head. dtype: the dtype of values. strategy, settings: those of
    `make_plan` for recurrences (cluster, options, working_layout, ...), used for all three plans. Raise the errors of
    `make_plan`.
    """
    shapes = prefix_softmax_shapes(heads, latents, v_head_dim, dtype_name(dtype))
    plans: list[Plan] = [make_plan(mask, layout, strategy=strategy, **shape, **settings) for shape in shapes]
    return PrefixSoftmaxPlans(*plans)


def prefix_softmax_shapes(heads: int, latents: int, v_head_dim: int, dtype: str) -> list[CallSizes]:
    """Return the heads, dims, dtype and op of the three calls. Maxima and sums have the accumulation dtype."""
    wide = "float64" if dtype == "float64" else "float32"
    return [
        CallSizes(heads=heads, kv_heads=heads, head_dim=1, v_head_dim=latents, dtype=wide, op=PREFIX_MAX),
        # a sum is a recurrence whose queries and keys are 1 in all heads
        CallSizes(heads=heads * latents, kv_heads=1, head_dim=1, v_head_dim=1, dtype=wide, op=OPS["ssd"]),
        CallSizes(heads=heads, kv_heads=heads, head_dim=latents, v_head_dim=v_head_dim, dtype=dtype, op=OPS["gla"]),
    ]
