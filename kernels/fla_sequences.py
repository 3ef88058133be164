"""Offsets of sequences, in the form that the kernels of fla-core take."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


# fla-core caches its lists of chunks by the identity of these tensors, and layers of one plan share them
@lru_cache(maxsize=64)
def sequence_offsets(ends: tuple[int, ...]) -> Tensor:
    """Return 0 and the ends of consecutive sequences, int64, on the host."""
    # an inference tensor could not be saved for a backward pass
    with torch.inference_mode(False):
        return torch.tensor([0, *ends], dtype=torch.int64)
