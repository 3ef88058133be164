"""What stretches of tokens do to any state that enters them, where that is no matrix: the product of their decays."""

# N stretches, H heads, K key dim

from __future__ import annotations

import torch
from torch import Tensor

from distattn.kernels.recurrence.tokens import RecurrenceTokens, Stretches

# exp of less is 0 in fp64, too; and infinite decays leave differences of their sums finite
_LEAST_DECAY = -1000.0


def finite_decays(g: Tensor) -> Tensor:
    """Logarithms of decays in fp64, infinite ones as the least that is told from 0."""
    return g.double().clamp(min=_LEAST_DECAY)


def diagonal_transitions(x: RecurrenceTokens, stretches: Stretches, dtype: torch.dtype) -> Tensor:
    """A of each stretch of an op without the delta rule: (N, H, K), or (N, H, 1) where all channels decay alike."""
    if not x.decays_by_token:
        length = torch.tensor([end - begin for begin, end in stretches], dtype=torch.float64, device=x.v.device)
        return constant_transition(x.g, x.heads, length).to(dtype)
    assert x.g is not None
    sums = [finite_decays(x.g[begin:end]).sum(0) for begin, end in stretches]
    return torch.stack(sums).exp().to(dtype).reshape(len(stretches), x.heads, -1)


def constant_transition(g_H: Tensor | None, heads: int, length_N: Tensor) -> Tensor:
    """A of stretches of so many tokens where every token decays alike, (N, H, 1) in fp64."""
    if g_H is None:
        return length_N.new_ones((len(length_N), heads, 1))
    return torch.exp(finite_decays(g_H)[None] * length_N[:, None])[..., None]
