"""`prefix_softmax`: values weighted by softmaxes over a document's preceding tokens, computed with plans; differentiable.

Let m_t be the maximum of the logits k up to token t, computed by `prefix_max`. Then both sums of a softmax are recurrences with
decays exp(m_(t-1) - m_t) and inputs exp(k_t - m_t). No exponent is positive, and the sum of exponentials is at least 1.
Sums are relative to the last maximum, as in online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). Results do not depend
on the maximum, so it needs no gradient.
"""

# T tokens on this rank, H heads, L latents of a head, V value dim, M documents

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.ir.errors import DistattnError
from distattn.ir.plan import Plan
from distattn.kernels.merge import accumulation_dtype
from distattn.ops.attention import autocast_inputs
from distattn.ops.executable import Executable
from distattn.ops.plan_argument import check_flag
from distattn.ops.prefix_max import prefix_max
from distattn.ops.recurrence import recurrence
from distattn.parallel.prefix_softmax_plans import PrefixSoftmaxPlans


class PrefixSoftmaxState(NamedTuple):
    """The state of `prefix_softmax`: sums over the preceding tokens of each document, in fp32 (fp64 for fp64).

    maximum: the maximum of logits, (M, H, L). total: sums of exp(logit - maximum), (M, H, L). weighted: sums of exp(logit -
    maximum) times values, (M, H, L, V). Without tokens, they are -inf, 0 and 0. total and weighted have gradients; the maximum
    needs no gradient.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor


# excluded from torch.compile, like `prefix_max`
@torch.compiler.disable
def prefix_softmax(
    weights_THL: Tensor,
    logits_THL: Tensor,
    v_THV: Tensor,
    plans: PrefixSoftmaxPlans,
    group: dist.ProcessGroup | None = None,
    *,
    initial_state: PrefixSoftmaxState | None = None,
    return_final_state: bool = False,
) -> Any:
    """Weight values by L softmaxes over the preceding tokens of their document, differentiable. A collective call of all ranks.

        o_t = sum_l weights_tl sum_(s <= t) exp(logits_sl) v_s / sum_(s <= t) exp(logits_sl)

    weights and logits (T, H, L) and v_THV (T, H, V) hold this rank's T tokens in the layout's local order; the result (T, H,
    V) has v's dtype. Logits must be finite; they are converted to fp32 (fp64 for fp64) first.

    - Latte (Dolga et al. 2024, arXiv 2402.17512): weights are the softmax of a token's scores over L latents, logits its scores
      as a key.
    - Aaren (Feng et al. 2024, arXiv 2405.13956): L = 1, weights are 1, logits are products of keys with one learned query.
    - Efficient Attention (Shen et al. 2018, arXiv 1812.01243), over the preceding tokens: weights are the softmax of a query over
      its L channels, logits are keys.

    initial_state: the state of all M documents, on every rank; the gradients of its sums are this rank's share, to be summed over
    ranks. With return_final_state also return the state after all documents: that of documents that end on this rank, 0 for
    others.

    plans: the result of `make_prefix_softmax_plans`, or the executables of those plans from `prepare`. For each head, a segment
    sends L values twice, and L x V values once. Raise PlanError if a plan cannot be proven or differs between ranks,
    DistattnError if the tensors do not fit the plans.
    """
    if not isinstance(plans, PrefixSoftmaxPlans):
        raise DistattnError(f"plans must be a result of make_prefix_softmax_plans, not a {type(plans).__name__}.")
    for name, tensor in (("weights", weights_THL), ("logits", logits_THL), ("v", v_THV)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 3 or not tensor.is_floating_point():
            raise DistattnError(f"{name} must be a floating-point tensor with tokens, heads and one more dim.")
    if weights_THL.shape != logits_THL.shape or logits_THL.shape[:2] != v_THV.shape[:2]:
        raise DistattnError(
            f"weights {tuple(weights_THL.shape)}, logits {tuple(logits_THL.shape)} and v {tuple(v_THV.shape)} are of different "
            "tokens or heads, or weights and logits not of the same latents."
        )
    check_flag("return_final_state", return_final_state)
    _check_plans(plans)
    _check_state(initial_state, logits_THL, v_THV)
    (v_THV,) = autocast_inputs(v_THV)
    # disable autocast, which would narrow the sums of exponentials
    with torch.autocast(v_THV.device.type, enabled=False):
        return _computed(weights_THL, logits_THL, v_THV, plans, group, initial_state, return_final_state)


def _check_plans(plans: PrefixSoftmaxPlans) -> None:
    for name, plan, op in zip(plans._fields, plans, ("prefix_max", "ssd", "gla"), strict=True):
        if not isinstance(plan, (Plan, Executable)):
            raise DistattnError(f"plans.{name} must be a result of make_plan or prepare, not a {type(plan).__name__}.")
        call = plan.call if isinstance(plan, Plan) else plan.program.call
        if call.op.name != op:
            raise DistattnError(f"plans.{name} is of {call.op.name}; make_prefix_softmax_plans makes one of {op}.")


def _check_state(state: PrefixSoftmaxState | None, logits_THL: Tensor, v_THV: Tensor) -> None:
    if state is None:
        return
    if not isinstance(state, PrefixSoftmaxState):
        raise DistattnError(f"initial_state must be a PrefixSoftmaxState, not a {type(state).__name__}.")
    documents = len(state.maximum)
    of_latents = documents, *logits_THL.shape[1:]
    for name, tensor, shape in zip(
        state._fields, state, (of_latents, of_latents, (*of_latents, v_THV.shape[2])), strict=True
    ):
        if tuple(tensor.shape) != shape:
            raise DistattnError(f"initial_state.{name} has shape {tuple(tensor.shape)}; {shape} is needed.")


def _computed(
    weights_THL: Tensor,
    logits_THL: Tensor,
    v_THV: Tensor,
    plans: PrefixSoftmaxPlans,
    group: dist.ProcessGroup | None,
    initial: PrefixSoftmaxState | None,
    return_final_state: bool,
) -> Any:
    wide, heads_and_latents = accumulation_dtype(v_THV.dtype), logits_THL.shape[1] * logits_THL.shape[2]
    logits_THL = logits_THL.to(wide)
    constant_THL = logits_THL.detach()
    maximum_MHL = total_M11 = weighted_MHLV = None
    if initial is not None:
        maximum_MHL, total_MHL, weighted_MHLV = initial
        # a maximum of -inf means that there are no earlier tokens, so the sums are 0
        none_MHL = maximum_MHL == -torch.inf
        total_M11 = total_MHL.masked_fill(none_MHL, 0.0).reshape(-1, heads_and_latents, 1, 1)
        weighted_MHLV = weighted_MHLV.masked_fill(none_MHL[..., None], 0.0)

    def with_state(call: Callable[..., Any], *tensors: Tensor, **named: Any) -> tuple[Tensor, Tensor | None]:
        result = call(*tensors, group=group, return_final_state=return_final_state, **named)
        return result if return_final_state else (result, None)

    before_THL, last_MHL = with_state(prefix_max, constant_THL, plan=plans.maximum, initial_state=maximum_MHL)
    maximum_THL = torch.maximum(before_THL, constant_THL)
    # before a document's first token, there is no sum to decay
    g_THL = (before_THL - maximum_THL).masked_fill(before_THL == -torch.inf, 0.0)
    exponential_THL = (logits_THL - maximum_THL).exp()
    ones = exponential_THL.new_ones(len(v_THV), 1, 1)
    by_latent = exponential_THL.reshape(-1, heads_and_latents, 1), g_THL.reshape(-1, heads_and_latents)
    total_T11, last_total = with_state(
        recurrence, ones, ones, by_latent[0], plan=plans.total, g=by_latent[1], initial_state=total_M11, scale=1.0
    )
    reads_THL = (weights_THL.to(wide) / total_T11.reshape(logits_THL.shape)).to(v_THV.dtype)
    keys_THL = exponential_THL.to(v_THV.dtype)
    o_THV, last_weighted = with_state(
        recurrence, reads_THL, keys_THL, v_THV, plan=plans.weighted, g=g_THL, initial_state=weighted_MHLV, scale=1.0
    )
    if last_MHL is None or last_total is None or last_weighted is None:
        return o_THV
    return o_THV, PrefixSoftmaxState(last_MHL, last_total.reshape(last_MHL.shape), last_weighted)
