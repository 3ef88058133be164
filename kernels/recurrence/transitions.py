"""The linear effect A of a segment on a state, for ops without the delta rule: the product of its tokens' decays."""

# N segments, H heads, K key dim

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.kernels.recurrence.tokens import RecurrenceTokens

# smaller log decays are clamped to this: their exp is 0 even in fp64, and differences of their sums stay finite
_LEAST_DECAY = -1000.0


def finite_decays(g: Tensor) -> Tensor:
    """Return log decays in fp64, clamped so that they are finite. The exp of a clamped log decay is still 0."""
    return g.double().clamp(min=_LEAST_DECAY)


def diagonal_transitions(x: RecurrenceTokens, bounds_N2: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the diagonal of each segment's A for an op without the delta rule: (N, H, K), or (N, H, 1) if it is constant.

    bounds_N2: rows [begin, end) of each segment, int64, on the tokens' device.
    """
    begin_N, end_N = bounds_N2.unbind(1)
    if not x.decays_by_token:
        return constant_transition(x.g, x.heads, end_N - begin_N).to(dtype)
    assert x.g is not None
    # sum over the preceding tokens in fp64, so that differences of sums are accurate even after thousands of tokens
    before = F.pad(finite_decays(x.g).flatten(1).cumsum(0), (0, 0, 1, 0))
    return (before[end_N] - before[begin_N]).exp().to(dtype).reshape(len(bounds_N2), x.heads, -1)


def constant_transition(g_H: Tensor | None, heads: int, length_N: Tensor) -> Tensor:
    """Return each segment's A, (N, H, 1) in fp64, from its length, for an op whose tokens all share a decay g_H."""
    if g_H is None:
        return length_N.new_ones((len(length_N), heads, 1), dtype=torch.float64)
    return torch.exp(finite_decays(g_H)[None] * length_N[:, None])[..., None]
