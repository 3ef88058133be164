"""The input tensors of a recurrence, and its definition, token by token.

    S_t = (I - b_t k_t k_t^T) diag(exp g_t) S_(t-1) + b_t k_t v_t^T,    o_t = S_t^T q_t

Without b, the first factor is I and the last b is 1. `distattn.ir.op` lists the ops that are special cases.
"""

# T tokens, H heads, G heads of queries and keys (H is a multiple of G), K key dim, V value dim, N segments of tokens

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# rows [begin, end) of each segment, in tensors of tokens
Segments = Sequence[tuple[int, int]]


class RecurrenceTokens(NamedTuple):
    """The inputs of a recurrence.

    q, k: (T, G, K), shared by consecutive heads. v: (T, H, V). g: log decays, at most 0: (T, H), (T, H, K) with a decay per key
    channel, (H,) if all tokens share a decay, or None if there is no decay. beta: the fraction of a key's stored value to
    replace, (T, H), or None if there is no delta rule.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    beta: Tensor | None = None

    @property
    def heads(self) -> int:
        """The number of heads, H."""
        return self.v.shape[1]

    @property
    def decays_by_token(self) -> bool:
        """True if g has an entry for each token."""
        return self.g is not None and self.g.dim() > 1

    def present(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, keyed by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def by_token(self) -> dict[str, Tensor]:
        """Return the tensors that have an entry per token, keyed by name."""
        return {name: value for name, value in self.present().items() if name != "g" or self.decays_by_token}

    def cut(self, begin: int, end: int) -> RecurrenceTokens:
        """Return only tokens [begin, end)."""
        return self._replace(**{name: value[begin:end] for name, value in self.by_token().items()})


def bounds_of(segments: Segments) -> Tensor:
    """Return the segments as an int64 tensor (N, 2) on the host."""
    return torch.tensor([tuple(segment) for segment in segments], dtype=torch.int64).reshape(-1, 2)


def token_by_token(x: RecurrenceTokens, segments: Segments, state_NHKV: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (o_THV, the state after each segment) directly from the definition: differentiable, but slow. o is 0 outside the
    segments."""
    group = x.heads // x.q.shape[1]
    outputs: dict[int, Tensor] = {}
    states = []
    for (begin, end), s_HKV in zip(segments, state_NHKV, strict=True):
        for t in range(begin, end):
            q_HK, k_HK = (y[t].repeat_interleave(group, 0) for y in (x.q, x.k))
            v_HV = x.v[t]
            if x.g is not None:
                g_H = x.g[t] if x.decays_by_token else x.g
                s_HKV = torch.exp(g_H if g_H.dim() > 1 else g_H[:, None])[..., None] * s_HKV
            if x.beta is not None:
                v_HV = x.beta[t][:, None] * (v_HV - torch.einsum("hk,hkv->hv", k_HK, s_HKV))
            s_HKV = s_HKV + k_HK[..., None] * v_HV[:, None]
            outputs[t] = torch.einsum("hk,hkv->hv", q_HK, s_HKV)
        states.append(s_HKV)
    blank = torch.zeros(x.v.shape[1:], dtype=state_NHKV.dtype)
    o = torch.stack([outputs.get(t, blank) for t in range(len(x.v))]) if len(x.v) else state_NHKV.new_zeros(x.v.shape)
    return o, torch.stack(states) if states else state_NHKV
