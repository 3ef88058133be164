"""The linear part of the effect of segments on states, for ops where it is no matrix: the product of the tokens' decays."""

# N segments, H heads, K key dim

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.kernels.recurrence.tokens import RecurrenceTokens

# exp of less is 0 in fp64, too; and differences of sums stay finite
_LEAST_DECAY = -1000.0


def finite_decays(g: Tensor) -> Tensor:
    """Return logarithms of decays in fp64. Infinite ones become finite, but small enough for a decay of 0."""
    return g.double().clamp(min=_LEAST_DECAY)


def diagonal_transitions(x: RecurrenceTokens, bounds_N2: Tensor, dtype: torch.dtype) -> Tensor:
    """Return A of each segment for an op without the delta rule: (N, H, K), or (N, H, 1) if all channels decay alike.

    bounds_N2: the rows [begin, end) of each segment, int64, on the device of the tokens.
    """
    begin_N, end_N = bounds_N2.unbind(1)
    if not x.decays_by_token:
        return constant_transition(x.g, x.heads, end_N - begin_N).to(dtype)
    assert x.g is not None
    # sums over preceding tokens, in double precision: their differences are exact enough for thousands of tokens
    before = F.pad(finite_decays(x.g).flatten(1).cumsum(0), (0, 0, 1, 0))
    return (before[end_N] - before[begin_N]).exp().to(dtype).reshape(len(bounds_N2), x.heads, -1)


def constant_transition(g_H: Tensor | None, heads: int, length_N: Tensor) -> Tensor:
    """Return A of segments with these numbers of tokens if every token decays alike, (N, H, 1) in fp64."""
    if g_H is None:
        return length_N.new_ones((len(length_N), heads, 1), dtype=torch.float64)
    return torch.exp(finite_decays(g_H)[None] * length_N[:, None])[..., None]
