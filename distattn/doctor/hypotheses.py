"""Attention with a mistake in it, which `distattn doctor` runs in one process to see whether that explains what it found."""

# N tokens on the axis, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from distattn.batch.packed_batch import PackedBatch

# what a layer may ask of its attention beside q, k and v
ATTENTION_OPTIONS = ("window", "softcap", "sink", "scale")


class HypotheticalAttention:
    """Takes a sharded batch's place in one process: dense attention over allowed_NN (N, N), some of ATTENTION_OPTIONS dropped."""

    def __init__(self, allowed_NN: Tensor, dropped: Collection[str] = ()):
        self.allowed_NN, self.dropped = allowed_NN, dropped

    def check_positions(self, given: Tensor) -> None:
        """Accept any positions: they may be wrong on purpose."""

    def attention(
        self, q_NHD: Tensor, k_NKD: Tensor, v_NKE: Tensor, scale: float | None = None, **options: Any
    ) -> Tensor:
        """Compute attention (N, H, E) as `LocalBatch.attention` does, with this hypothesis' mask and dropped options."""
        how = {"scale": scale, **options}
        window, softcap, sink, scale = (None if name in self.dropped else how.get(name) for name in ATTENTION_OPTIONS)
        group = q_NHD.shape[1] // k_NKD.shape[1]
        k_NHD, v_NHE = (x.repeat_interleave(group, 1) for x in (k_NKD, v_NKE))
        scores = torch.einsum("qhd,khd->hqk", q_NHD, k_NHD) * (q_NHD.shape[-1] ** -0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        allowed_NN = self.allowed_NN
        if window is not None:
            allowed_NN = allowed_NN & torch.ones_like(allowed_NN).triu(1 - window)
        scores = scores.masked_fill(~allowed_NN, -torch.inf)
        if sink is not None:
            scores = torch.cat([scores, sink.to(scores.dtype)[:, None, None].expand(-1, len(q_NHD), 1)], -1)
        weights = scores.softmax(-1).nan_to_num(0.0)[..., : len(q_NHD)]
        return torch.einsum("hqk,khe->qhe", weights, v_NHE)


def causal_document_mask(rows: PackedBatch) -> Tensor:
    """Make the right mask (N, N): causal inside each document."""
    return causal_mask(rows) & document_mask(rows)


def document_mask(rows: PackedBatch) -> Tensor:
    """Make a mask (N, N) that allows everything inside each document, the future included."""
    document = torch.repeat_interleave(torch.arange(len(rows.lengths)), torch.tensor(rows.lengths))
    return document[:, None] == document[None]


def causal_mask(rows: PackedBatch) -> Tensor:
    """Make a causal mask (N, N) that takes all documents for one."""
    return torch.ones(len(rows.ids_N), len(rows.ids_N), dtype=torch.bool).tril()


def rank_local_mask(tokens: list[Tensor], rows: PackedBatch, positions_N: Tensor | None = None) -> Tensor:
    """Make a mask (N, N) that is causal over each rank's own tokens, in their local order, and allows nothing else.

    tokens: global coordinates of each rank's tokens. With positions (N,), a document ends wherever they do not go on by one,
    as transformers takes it.
    """
    allowed_NN = torch.zeros(len(rows.ids_N), len(rows.ids_N), dtype=torch.bool)
    for own in tokens:
        mine = torch.ones(len(own), len(own), dtype=torch.bool).tril()
        if positions_N is not None and len(own):
            document = (positions_N[own].diff(prepend=positions_N[own][:1] - 1) != 1).cumsum(0)
            mine &= document[:, None] == document[None]
        allowed_NN[own[:, None], own[None]] = mine
    return allowed_NN
