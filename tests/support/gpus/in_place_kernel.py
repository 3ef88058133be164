"""The reference kernel with the habits of a GPU kernel: it writes, adds and merges into its output arguments."""

from distattn.kernels import reference
from distattn.kernels.merge import merge_
from distattn.kernels.reference import prepare

__all__ = ["ACCUMULATES", "DIFFERENTIABLE_LSE", "backward", "forward", "prepare", "unsupported_reason"]
ACCUMULATES = DIFFERENTIABLE_LSE = True


def unsupported_reason(requirements):
    return None


def forward(q, k, v, schedule, score, into, merge=False):
    o, lse = reference.forward(q, k, v, schedule, score)
    if merge:
        merge_(*into, o, lse)
    else:
        into[0].copy_(o)
        into[1].copy_(lse)
    return into


def backward(do, q, k, v, lse, delta, schedule, score, into, add):
    dq, (dk, dv) = into
    gradients = reference.backward(do, q, k, v, lse, delta, schedule, score)
    for target, result, adds in zip((dq, dk, dv), gradients, (add[0], add[1], add[1]), strict=True):
        if adds:
            target += result
        else:
            target.copy_(result)
    return dq, dk, dv
