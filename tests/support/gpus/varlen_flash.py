"""The semantics of PyTorch's variable-length flash attention operators on the CPU.

Sequences are concatenated. Windows are aligned at the bottom right corner. The LSE (H, T) is +inf for rows without
keys. Results have the dtype of the inputs.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def allowed(rows: int, keys: int, causal: bool, left: int, right: int) -> Tensor:
    """Return whether each row of a sequence may attend to each key, bool (rows, keys). As in the operators, a negative
    window side is unlimited.
    """
    if causal:
        right = 0
    apart = torch.arange(keys)[None, :] - torch.arange(rows)[:, None] - (keys - rows)
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if left >= 0:
        seen &= apart >= -left
    if right >= 0:
        seen &= apart <= right
    return seen


def _checked(q, k, v, starts_q, starts_k, longest_q, longest_k):  # noqa: ANN001, ANN202
    assert all(x.stride(-1) == 1 and x.dim() == 3 for x in (q, k, v)) and k.shape == v.shape
    assert q.shape[1] % k.shape[1] == 0, "query heads are a multiple of key/value heads"
    for starts, longest, x in ((starts_q, longest_q, q), (starts_k, longest_k, k)):
        assert starts.dtype == torch.int32 and starts[0] == 0 and starts[-1] == len(x)
        sizes = starts.diff()
        assert (sizes >= 0).all() and sizes.max() <= longest
    assert len(starts_q) == len(starts_k)
    return [
        (slice(a, b), slice(c, d))
        for (a, b), (c, d) in zip(
            itertools.pairwise(starts_q.tolist()), itertools.pairwise(starts_k.tolist()), strict=True
        )
    ]


def _scores(q, k, scale, seen):  # noqa: ANN001, ANN202
    """Return the scores (H, T, S) in fp64."""
    group = q.shape[1] // k.shape[1]
    wide = k.double().repeat_interleave(group, 1)
    return (torch.einsum("thd,shd->hts", q.double(), wide) * scale).masked_fill(~seen, -torch.inf)


def forward(
    q,
    k,
    v,
    starts_q,
    starts_k,
    longest_q,
    longest_k,
    dropout,
    causal,
    debug,
    *,
    scale,
    window_size_left,
    window_size_right,  # noqa: ANN001
) -> tuple[Tensor, ...]:
    """Compute attention. See `aten::_flash_attention_forward`."""
    # rows outside all sequences are not written
    o = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    lse = torch.full(
        (q.shape[1], len(q)), torch.nan, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32
    )
    group = q.shape[1] // k.shape[1]
    for rows, keys in _checked(q, k, v, starts_q, starts_k, longest_q, longest_k):
        if rows.start == rows.stop:
            continue
        seen = allowed(rows.stop - rows.start, keys.stop - keys.start, causal, window_size_left, window_size_right)
        scores = _scores(q[rows], k[keys], scale, seen)
        total = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - total.masked_fill(total == -torch.inf, 0.0)[..., None])
        o[rows] = torch.einsum("hts,shd->thd", weights, v[keys].double().repeat_interleave(group, 1)).to(q.dtype)
        lse[:, rows] = total.masked_fill(total == -torch.inf, torch.inf).to(lse.dtype)
    return o, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros(0, dtype=torch.uint64), torch.zeros(0)


def backward(
    do, q, k, v, o, lse, starts_q, starts_k, longest_q, longest_k, dropout, causal, rng, unused, *, scale,  # noqa: ANN001
    window_size_left, window_size_right,  # noqa: ANN001
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of attention. See `aten::_flash_attention_backward`."""
    assert lse.is_contiguous() and lse.shape == (q.shape[1], len(q)) and o.dtype == do.dtype == q.dtype
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.full_like(x, torch.nan, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = (do.double() * o.double()).sum(-1).t()
    for rows, keys in _checked(q, k, v, starts_q, starts_k, longest_q, longest_k):
        if rows.start == rows.stop or keys.start == keys.stop:
            continue
        seen = allowed(rows.stop - rows.start, keys.stop - keys.start, causal, window_size_left, window_size_right)
        weights = torch.exp(_scores(q[rows], k[keys], scale, seen) - lse[:, rows].double()[..., None])
        wide_k, wide_v = (x[keys].double().repeat_interleave(group, 1) for x in (k, v))
        dp = torch.einsum("thd,shd->hts", do[rows].double(), wide_v)
        ds = weights * (dp - delta[:, rows, None]) * scale
        dq[rows] = torch.einsum("hts,shd->thd", ds, wide_k).to(q.dtype)
        for out, grad in (
            (dk, torch.einsum("hts,thd->shd", ds, q[rows].double())),
            (dv, torch.einsum("hts,thd->shd", weights, do[rows].double())),
        ):
            out[keys] = grad.unflatten(1, (-1, group)).sum(2).to(out.dtype)
    return dq, dk, dv
