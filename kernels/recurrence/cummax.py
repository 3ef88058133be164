"""Prefix maxima over the tokens of each segment, in PyTorch on any device."""

# N segments, T tokens, H heads, V value dim; a state is (H, V)

from __future__ import annotations

import torch
from torch import Tensor

from distattn.kernels.recurrence.tokens import Segments
from distattn.kernels.spec import KernelRequirements


def unsupported_reason(requirements: KernelRequirements) -> str | None:
    """Return None: this kernel computes every prefix maximum on every device."""
    return None


def prepare(segments: Segments, requirements: KernelRequirements) -> Segments:
    """Return the segments unchanged: this kernel needs no other schedule."""
    return segments


def forward(x_THV: Tensor, segments: Segments, state_NHV: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (the maximum before each token, the maximum after each segment), in the states' dtype.

    Both include the segment's initial state. Rows outside the segments are -inf.
    """
    before_THV = state_NHV.new_full(x_THV.shape, -torch.inf)
    leaving_NHV = torch.empty_like(state_NHV)
    for number, (begin, end) in enumerate(segments):
        state = state_NHV[number]
        until = torch.maximum(x_THV[begin:end].to(state.dtype).cummax(0).values, state)
        before_THV[begin] = state
        before_THV[begin + 1 : end] = until[:-1]
        leaving_NHV[number] = until[-1]
    return before_THV, leaving_NHV


def states(x_THV: Tensor, segments: Segments, state_NHV: Tensor) -> Tensor:
    """Return the maximum over each segment's initial state and tokens, (N, H, V), in the states' dtype."""
    of_tokens = [x_THV[begin:end].amax(0) for begin, end in segments]
    return torch.maximum(torch.stack(of_tokens).to(state_NHV.dtype), state_NHV)
