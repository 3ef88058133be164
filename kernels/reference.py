"""Reference kernel: dense core attention in plain torch, any float dtype, accumulated in fp32 (fp64 for fp64).

It builds the score matrix of its own rows and keys, so it is for tests and small problems.
"""

# T query rows, S key rows, H query heads, K key/value heads, D head dim, E value head dim

import torch
from torch import Tensor

from distattn.bands import Q0, Q1, row_ends
from distattn.intervals import Ints
from distattn.kernels.merge import accumulation_dtype

DIFFERENTIABLE_LSE = True


def refusal(dtype: torch.dtype, head_dim: int, v_head_dim: int, device: torch.device) -> str | None:
    """Why this kernel cannot serve such a call, or None: it serves all."""
    return None


def prepare(bands: Ints, rows: int, keys: int) -> Tensor:
    """The allowed cells (rows, keys) of bands (M, 10) in the coordinates of the tensors, as booleans."""
    allowed_TS = torch.zeros(rows, keys, dtype=torch.bool)
    key = torch.arange(keys)
    for band in bands:
        q0, q1 = int(band[Q0]), int(band[Q1])
        begin, end = row_ends(band[None].repeat(q1 - q0, 0), torch.arange(q0, q1).numpy())
        allowed_TS[q0:q1] |= (key >= torch.from_numpy(begin)[:, None]) & (key < torch.from_numpy(end)[:, None])
    return allowed_TS


def forward(q_THD: Tensor, k_SKD: Tensor, v_SKE: Tensor, allowed_TS: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(o_THE, lse_TH) in the accumulation dtype; rows without keys: o = 0, lse = -inf."""
    scores_HTS = _scores(q_THD, k_SKD, allowed_TS, scale)
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
    allowed_TS: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_THD, dk_SKD, dv_SKE) of these cells, given the final lse and delta = rowsum(dO * O) of each row."""
    heads, kv_heads = q_THD.shape[1], k_SKD.shape[1]
    q, k, v, do = _wide(q_THD, heads), _wide(k_SKD, heads), _wide(v_SKE, heads), _wide(do_THE, heads)
    weights_HTS = torch.exp(_scores(q_THD, k_SKD, allowed_TS, scale) - _finite(lse_TH.t())[..., None])
    dp_HTS = torch.einsum("the,she->hts", do, v)
    ds_HTS = weights_HTS * (dp_HTS - delta_TH.t()[..., None]) * scale
    dq_THD = torch.einsum("hts,shd->thd", ds_HTS, k)
    dk_SHD = torch.einsum("hts,thd->shd", ds_HTS, q)
    dv_SHE = torch.einsum("hts,the->she", weights_HTS, do)
    return dq_THD, _sum_groups(dk_SHD, kv_heads), _sum_groups(dv_SHE, kv_heads)


def _scores(q_THD: Tensor, k_SKD: Tensor, allowed_TS: Tensor, scale: float) -> Tensor:
    heads = q_THD.shape[1]
    scores_HTS = torch.einsum("thd,shd->hts", _wide(q_THD, heads), _wide(k_SKD, heads)) * scale
    return scores_HTS.masked_fill(~allowed_TS.to(scores_HTS.device), -torch.inf)


def _wide(x: Tensor, heads: int) -> Tensor:
    return x.to(accumulation_dtype(x.dtype)).repeat_interleave(heads // x.shape[1], 1)


def _sum_groups(x_SHD: Tensor, kv_heads: int) -> Tensor:
    return x_SHD.unflatten(1, (kv_heads, -1)).sum(2)


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, 0.0)
