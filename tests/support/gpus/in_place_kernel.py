"""The reference kernel with the habits of a GPU kernel: it writes, adds and merges into its output arguments."""

import torch

from distattn.kernels import reference
from distattn.kernels.merge import merge_
from distattn.kernels.reference import prepare
from distattn.kernels.spec import MOST_TURNS

__all__ = ["ACCUMULATES", "DIFFERENTIABLE_LSE", "FINISHES", "backward", "forward", "prepare", "unsupported_reason"]
ACCUMULATES = DIFFERENTIABLE_LSE = True
FINISHES = ("forward", "backward")


def unsupported_reason(requirements):
    return None


def forward(q, k, v, schedule, score, into, merge=False, final=None):
    o, lse = reference.forward(q, k, v, schedule, score)
    if merge:
        held = into if final is None else (earlier_sums(final, into[0]), into[1])
        merge_(*held, o, lse)
        o, lse = held
    into[1].copy_(lse)
    return write(into[0], o, final), into[1]


def backward(do, q, k, v, lse, delta, schedule, score, into, add, final=None):
    dq, (dk, dv) = into
    gradients = reference.backward(do, q, k, v, lse, delta, schedule, score)
    if add[0]:
        gradients = (gradients[0] + (dq if final is None else earlier_sums(final, dq)), *gradients[1:])
    write(dq, gradients[0], final)
    for target, result in zip((dk, dv), gradients[1:], strict=True):
        if add[1]:
            target += result
        else:
            target.copy_(result)
    return dq, dk, dv


def earlier_sums(final, sums):
    """Return earlier launches' sums, 0 in rows that this launch begins. In `sums`, make those rows NaN."""
    has_none = final.turns_T // MOST_TURNS == final.number
    sums[has_none] = torch.nan
    return sums.masked_fill(has_none[:, None, None], 0.0)


def write(sums, result, final):
    """Write finished rows to their tensor, and other rows to the sums; finished rows of the sums become NaN."""
    if final is None:
        return sums.copy_(result)
    is_last = final.turns_T % MOST_TURNS == final.number
    assert (final.turns_T // MOST_TURNS <= final.number).all() and (final.turns_T % MOST_TURNS >= final.number).all()
    sums.copy_(result.masked_fill(is_last[:, None, None], torch.nan))
    final.target_THD[is_last] = result[is_last].to(final.target_THD.dtype)
    return sums
