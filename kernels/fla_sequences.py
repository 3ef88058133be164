"""Where sequences begin and end, as the kernels of fla-core take it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


# fla-core keeps its lists of chunks by the identity of these: layers of one plan have the same
@lru_cache(maxsize=64)
def sequence_offsets(ends: tuple[int, ...]) -> Tensor:
    """Return 0 and the ends of sequences that follow one another, int64, on the host."""
    # one that is made while inference runs cannot be kept for a backward pass
    with torch.inference_mode(False):
        return torch.tensor([0, *ends], dtype=torch.int64)
