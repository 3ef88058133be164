"""Reference kernel: dense core attention in plain torch, any float dtype, accumulated in fp32 (fp64 for fp64).

It builds the score matrix of its own rows and keys, so it is for tests and small problems.
"""

# T query rows, S key rows, H query heads, K key/value heads, D head dim, E value head dim

from typing import NamedTuple

import torch
from torch import Tensor

from distattn.bands import K0, K1, Q0, Q1, row_ends
from distattn.intervals import Ints
from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.score import Demand, Score

DIFFERENTIABLE_LSE = True


class Work(NamedTuple):
    """Cells of the scores (T, S): which are allowed, and how far their tokens are from each other on the axis."""

    allowed_TS: Tensor
    distance_TS: Tensor


def refusal(demand: Demand) -> str | None:
    """Why this kernel cannot serve such a call, or None: it serves all."""
    return None


def prepare(bands: Ints, shift: Ints, rows: int, keys: int) -> Work:
    """The cells (rows, keys) of bands (M, 10) in the coordinates of the tensors."""
    allowed_TS = torch.zeros(rows, keys, dtype=torch.bool)
    distance_TS = torch.zeros(rows, keys, dtype=torch.int64)
    row, key = torch.arange(rows)[:, None], torch.arange(keys)
    for band, offset in zip(bands, shift.tolist(), strict=True):
        q0, q1, k0, k1 = (int(band[column]) for column in (Q0, Q1, K0, K1))
        begin, end = row_ends(band[None].repeat(q1 - q0, 0), torch.arange(q0, q1).numpy())
        allowed_TS[q0:q1] |= (key >= torch.from_numpy(begin)[:, None]) & (key < torch.from_numpy(end)[:, None])
        distance_TS[q0:q1, k0:k1] = (key[k0:k1] - row[q0:q1] + offset).abs()
    return Work(allowed_TS, distance_TS)


def forward(q_THD: Tensor, k_SKD: Tensor, v_SKE: Tensor, work: Work, score: Score) -> tuple[Tensor, Tensor]:
    """(o_THE, lse_TH) in the accumulation dtype; rows without keys: o = 0, lse = -inf."""
    scores_HTS, _ = _scores(q_THD, k_SKD, work, score)
    lse_HT = torch.logsumexp(scores_HTS, -1)
    weights_HTS = torch.exp(scores_HTS - _finite(lse_HT)[..., None])
    o_THE = torch.einsum("hts,she->the", weights_HTS, _wide(v_SKE, q_THD.shape[1]))
    return o_THE, lse_HT.t().contiguous()


def backward(
    do_THE: Tensor,
    q_THD: Tensor,
    k_SKD: Tensor,
    v_SKE: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    work: Work,
    score: Score,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_THD, dk_SKD, dv_SKE) of these cells, given the final lse and delta = rowsum(dO * O) of each row."""
    heads, kv_heads = q_THD.shape[1], k_SKD.shape[1]
    q, k, v, do = _wide(q_THD, heads), _wide(k_SKD, heads), _wide(v_SKE, heads), _wide(do_THE, heads)
    scores_HTS, slope_HTS = _scores(q_THD, k_SKD, work, score)
    weights_HTS = torch.exp(scores_HTS - _finite(lse_TH.t())[..., None])
    dp_HTS = torch.einsum("the,she->hts", do, v)
    ds_HTS = weights_HTS * (dp_HTS - delta_TH.t()[..., None]) * slope_HTS
    dq_THD = torch.einsum("hts,shd->thd", ds_HTS, k)
    dk_SHD = torch.einsum("hts,thd->shd", ds_HTS, q)
    dv_SHE = torch.einsum("hts,the->she", weights_HTS, do)
    return dq_THD, _sum_groups(dk_SHD, kv_heads), _sum_groups(dv_SHE, kv_heads)


def _scores(q_THD: Tensor, k_SKD: Tensor, work: Work, score: Score) -> tuple[Tensor, Tensor | float]:
    """Scores (H, T, S), -inf where not allowed, and their derivative by <q, k>."""
    heads = q_THD.shape[1]
    scores_HTS = torch.einsum("thd,shd->hts", _wide(q_THD, heads), _wide(k_SKD, heads)) * score.scale
    slope: Tensor | float = score.scale
    if score.softcap:
        bent_HTS = torch.tanh(scores_HTS / score.softcap)
        scores_HTS, slope = bent_HTS * score.softcap, (1 - bent_HTS**2) * score.scale
    if score.slopes_H is not None:
        scores_HTS = scores_HTS - score.slopes_H.to(scores_HTS)[:, None, None] * work.distance_TS.to(scores_HTS)
    return scores_HTS.masked_fill(~work.allowed_TS.to(scores_HTS.device), -torch.inf), slope


def _wide(x: Tensor, heads: int) -> Tensor:
    return x.to(accumulation_dtype(x.dtype)).repeat_interleave(heads // x.shape[1], 1)


def _sum_groups(x_SHD: Tensor, kv_heads: int) -> Tensor:
    return x_SHD.unflatten(1, (kv_heads, -1)).sum(2)


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, 0.0)
