"""Sequence offsets in the form that fla-core's kernels accept."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


# return the same tensor to all layers of a plan, because fla-core caches chunk lists keyed by this tensor's identity
@lru_cache(maxsize=64)
def sequence_offsets(ends: tuple[int, ...]) -> Tensor:
    """Return an int64 tensor on the host: 0, and the ends of consecutive sequences."""
    # create a normal tensor: autograd cannot save an inference tensor for the backward pass
    with torch.inference_mode(False):
        return torch.tensor([0, *ends], dtype=torch.int64)
