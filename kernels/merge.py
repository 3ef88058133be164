"""Joining partial attention results by their log-sum-exp."""

# T tokens, H heads, E value head dim

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(o_THE: Tensor, lse_TH: Tensor, other_THE: Tensor, other_lse_TH: Tensor) -> None:
    """Fold (other, other_lse) into (o, lse) in place; a row without keys has o = 0 and lse = -inf.

    o = sum_i exp(lse_i - lse) o_i with lse = log sum_i exp(lse_i): Milakov & Gimelshein 2018, arXiv 1805.02867.
    """
    lse = torch.logaddexp(lse_TH, other_lse_TH)
    # -inf - -inf is not a number: rows empty on both sides keep weight exp(-inf) = 0
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    o_THE.mul_(torch.exp(lse_TH - finite)[..., None])
    o_THE.add_(other_THE * torch.exp(other_lse_TH - finite)[..., None])
    lse_TH.copy_(lse)
