"""Reference kernel: dense core attention in plain PyTorch for any float dtype, accumulated in fp32 (fp64 for fp64).

It materializes the score matrix, so it is meant for tests and small problems.
"""

# T query rows, S key rows, H query heads, K key/value heads, D head dim, E value head dim

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.ir.bands import K0, K1, Q0, Q1, row_key_ranges
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.spec import KernelRequirements, ScoreMod

DIFFERENTIABLE_LSE = True
ACCUMULATES = False


class DenseMask(NamedTuple):
    """The allowed cells, (H, T, S) or (1, T, S) for all heads, and the distance of each query and key on the axis, (T, S)."""

    allowed_HTS: Tensor
    distance_TS: Tensor
    # the KV head of each query head
    kv_head_H: Tensor


def unsupported_reason(requirements: KernelRequirements) -> str | None:
    """Return None: this kernel serves every call."""
    return None


def prepare(mask: LaunchMask, requirements: KernelRequirements) -> DenseMask:
    """Return the mask as boolean tensors. If all heads have the same mask, store it only once."""
    cuts = sorted({0, mask.heads, *mask.band_heads.ravel().tolist()})
    allowed_ETS = torch.zeros(len(cuts) - 1, mask.rows, mask.keys, dtype=torch.bool)
    distance_TS = torch.zeros(mask.rows, mask.keys, dtype=torch.int64)
    row, key = torch.arange(mask.rows)[:, None], torch.arange(mask.keys)
    for band, (h0, h1), offset in zip(mask.bands, mask.band_heads.tolist(), mask.distance_shift.tolist(), strict=True):
        q0, q1, k0, k1 = (int(band[column]) for column in (Q0, Q1, K0, K1))
        begin, end = row_key_ranges(band[None].repeat(q1 - q0, 0), torch.arange(q0, q1).numpy())
        inside = (key >= torch.from_numpy(begin)[:, None]) & (key < torch.from_numpy(end)[:, None])
        allowed_ETS[cuts.index(h0) : cuts.index(h1), q0:q1] |= inside
        distance_TS[q0:q1, k0:k1] = (key[k0:k1] - row[q0:q1] + offset).abs()
    sizes = torch.tensor([b - a for a, b in pairwise(cuts)])
    # if there is only one range of heads, its mask broadcasts over all heads
    allowed_HTS = allowed_ETS if len(sizes) == 1 else allowed_ETS.repeat_interleave(sizes, 0)
    return DenseMask(allowed_HTS, distance_TS, (torch.arange(mask.heads) + mask.first_head) // mask.group_size)


def forward(q_THD: Tensor, k_SKD: Tensor, v_SKE: Tensor, mask: DenseMask, score: ScoreMod) -> tuple[Tensor, Tensor]:
    """Compute (o_THE, lse_TH) in the accumulation dtype. Rows without keys get o = 0 and lse = -inf."""
    scores_HTS, _ = _scores(q_THD, k_SKD, mask, score)
    lse_HT = torch.logsumexp(scores_HTS, -1)
    weights_HTS = torch.exp(scores_HTS - _finite(lse_HT)[..., None])
    o_THE = torch.einsum("hts,she->the", weights_HTS, _wide(v_SKE, mask))
    return o_THE, lse_HT.t().contiguous()


def backward(
    do_THE: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKE: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    mask: DenseMask,
    score: ScoreMod,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mask's contribution to (dq_THD, dk_SKD, dv_SKE) from the final lse and delta = rowsum(dO * O)."""
    wide = accumulation_dtype(q_THD.dtype)
    q, k, v, do = q_THD.to(wide), _wide(k_SKD, mask), _wide(v_SKE, mask), do_THE.to(wide)
    scores_HTS, slope_HTS = _scores(q_THD, k_SKD, mask, score)
    weights_HTS = torch.exp(scores_HTS - _finite(lse_TH.t())[..., None])
    dp_HTS = torch.einsum("the,she->hts", do, v)
    ds_HTS = weights_HTS * (dp_HTS - delta_TH.t()[..., None]) * slope_HTS
    dq_THD = torch.einsum("hts,shd->thd", ds_HTS, k)
    dk_SHD = torch.einsum("hts,thd->shd", ds_HTS, q)
    dv_SHE = torch.einsum("hts,the->she", weights_HTS, do)
    return dq_THD, _sum_groups(dk_SHD, k_SKD, mask), _sum_groups(dv_SHE, v_SKE, mask)


def _scores(q_THD: Tensor, k_SKD: Tensor, mask: DenseMask, score: ScoreMod) -> tuple[Tensor, Tensor | float]:
    """Return the scores (H, T, S), -inf where masked, and their derivative with respect to <q, k>."""
    wide = accumulation_dtype(q_THD.dtype)
    scores_HTS = torch.einsum("thd,shd->hts", q_THD.to(wide), _wide(k_SKD, mask)) * score.scale
    slope: Tensor | float = score.scale
    if score.softcap:
        capped_HTS = torch.tanh(scores_HTS / score.softcap)
        scores_HTS, slope = capped_HTS * score.softcap, (1 - capped_HTS**2) * score.scale
    if score.slopes_H is not None:
        scores_HTS = scores_HTS - score.slopes_H.to(scores_HTS)[:, None, None] * mask.distance_TS.to(scores_HTS)
    return scores_HTS.masked_fill(~mask.allowed_HTS.to(scores_HTS.device), -torch.inf), slope


def _wide(x_SKE: Tensor, mask: DenseMask) -> Tensor:
    """Return keys or values in the accumulation dtype, repeated for every query head."""
    return x_SKE.to(accumulation_dtype(x_SKE.dtype))[:, mask.kv_head_H.to(x_SKE.device)]


def _sum_groups(x_SHE: Tensor, like_SKE: Tensor, mask: DenseMask) -> Tensor:
    zeros_SKE = x_SHE.new_zeros(like_SKE.shape)
    return zeros_SKE.index_add_(1, mask.kv_head_H.to(x_SHE.device), x_SHE)


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, 0.0)
