"""A reference batch that computes each document separately in plain PyTorch, to test modules that call a local batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.kernels.recurrence.tokens import RecurrenceTokens, token_by_token


class PlainBatch:
    """A stand-in for `LocalBatch` with the same methods for packed documents, except latent attention."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        def of_document(*qkv: Tensor) -> Tensor:
            by_head = (x.transpose(0, 1) for x in qkv)
            return F.scaled_dot_product_attention(*by_head, is_causal=True, scale=scale, enable_gqa=True).transpose(
                0, 1
            )

        return self._each(of_document, q, k, v)

    def recurrence(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        op: str,
        *,
        g: Any = None,
        beta: Any = None,
        scale: Any = None,
        initial_state: Tensor | None = None,
        return_final_state: bool = False,
    ):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        ends = list(itertools.accumulate(self.lengths, initial=0))
        zeros = v.new_zeros(len(self.lengths), v.shape[1], q.shape[2], v.shape[2])
        x, segments = RecurrenceTokens(q * scale, k, v, g, beta), list(itertools.pairwise(ends))
        o, final = token_by_token(x, segments, zeros if initial_state is None else initial_state)
        return (o, final) if return_final_state else o

    def prefix_softmax(self, weights: Tensor, logits: Tensor, v: Tensor) -> Tensor:
        def of_document(w: Tensor, k: Tensor, v: Tensor) -> Tensor:
            later = torch.ones(len(k), len(k), dtype=torch.bool).triu(1)[..., None, None]
            softmax = k[None].masked_fill(later, -torch.inf).softmax(1)
            return torch.einsum("thl,tshl,shv->thv", w, softmax, v)

        return self._each(of_document, weights, logits, v)

    def causal_conv1d(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        activation: str | None = None,
        initial_state: Tensor | None = None,
        return_final_state: bool = False,
    ):
        weight = weight if weight.dim() == 3 else weight[:, None]
        groups, before = len(weight) // weight.shape[1], weight.shape[2] - 1
        zeros = x.new_zeros(len(self.lengths), x.shape[1], before)
        states = zeros if initial_state is None else initial_state
        parts = zip(x.split(self.lengths), states, strict=True)
        rows = [torch.cat([state, part.t()], 1) for part, state in parts]
        y = torch.cat([F.conv1d(row[None], weight, bias, groups=groups)[0].t() for row in rows])
        y = F.silu(y) if activation == "silu" else y
        return (y, torch.stack([row[:, row.shape[1] - before :] for row in rows])) if return_final_state else y

    def token_shift(self, x: Tensor, distance: int = 1, *, fill: int = 0) -> Tensor:
        def of_document(part: Tensor) -> Tensor:
            rows = [
                part[at] if 0 <= (at := row - distance) < len(part) else torch.full_like(part[0], fill)
                for row in range(len(part))
            ]
            return torch.stack(rows)

        return self._each(of_document, x)

    def _each(self, of_document: Callable[..., Tensor], *by_token: Tensor) -> Tensor:
        parts = zip(*(x.split(self.lengths) for x in by_token), strict=True)
        return torch.cat([of_document(*part) for part in parts])
