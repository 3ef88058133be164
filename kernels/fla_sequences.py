"""Sequence offsets in the form that the kernels in fla-core take."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


# fla-core caches its chunk lists by the identity of these tensors, so the layers of a plan share one tensor
@lru_cache(maxsize=64)
def sequence_offsets(ends: tuple[int, ...]) -> Tensor:
    """Return 0 and the ends of consecutive sequences as an int64 tensor on the host."""
    # autograd cannot save an inference tensor for the backward pass
    with torch.inference_mode(False):
        return torch.tensor([0, *ends], dtype=torch.int64)
