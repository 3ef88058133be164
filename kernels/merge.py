"""Merging of partial attention results by log-sum-exp, and outputs for operators that recompute delta from them."""

# T tokens, H heads, E value head dim

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which to accumulate: float64 for float64, float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(o_THE: Tensor, lse_TH: Tensor, other_THE: Tensor, other_lse_TH: Tensor) -> None:
    """Merge (other, other_lse) into (o, lse) in place. Rows without keys have o = 0 and lse = -inf.

    o = sum_i exp(lse_i - lse) o_i with lse = log sum_i exp(lse_i): Milakov & Gimelshein 2018, arXiv 1805.02867.
    """
    lse = torch.logaddexp(lse_TH, other_lse_TH)
    # avoid -inf - -inf, which is NaN: rows without keys on both sides get weights exp(-inf) = 0
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    o_THE.mul_(torch.exp(lse_TH - finite)[..., None])
    o_THE.add_(other_THE * torch.exp(other_lse_TH - finite)[..., None])
    lse_TH.copy_(lse)


def output_with_delta(do_THE: Tensor, delta_TH: Tensor) -> Tensor:
    """Return an o in dO's dtype with rowsum(dO * o) = delta, for backward operators that use o only in this sum.

    delta may have a wider dtype. Each row of the result is parallel to dO, so all terms have the same sign and 16-bit
    rounding errors average out. Rows are scaled by their largest element before they are squared, so that nothing
    overflows and tiny gradients do not vanish.
    """
    largest_TH1 = do_THE.abs().amax(-1, keepdim=True).to(delta_TH.dtype)
    largest_TH1 = largest_TH1.masked_fill(largest_TH1 == 0, 1.0)
    direction_THE = do_THE.to(delta_TH.dtype) / largest_TH1
    # clamp, so that rows of zeros remain zeros instead of becoming NaN
    squares_TH1 = direction_THE.square().sum(-1, keepdim=True).clamp(min=1.0)
    return (direction_THE * (delta_TH[..., None] / largest_TH1 / squares_TH1)).to(do_THE.dtype)
