"""A hybrid model in plain modules, with recurrent layers and attention in every n-th layer. `recall.py` trains it."""

import torch
import torch.nn.functional as F
from torch import nn

import distattn as da

WIDTH, HEADS, KEY_DIM = 64, 4, 2


class Mixer(nn.Module):
    """A short convolution, followed by gated attention or by Gated DeltaNet with a small state."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        dim = WIDTH // HEADS
        self.attends, self.sizes = attends, [HEADS * (dim if attends else KEY_DIM)] * 2 + [WIDTH]
        self.norm, self.out = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.project = nn.Linear(WIDTH, sum(self.sizes) + WIDTH + 2 * HEADS)
        self.filters = nn.Parameter(torch.randn(sum(self.sizes), 4) / 2)

    def forward(self, x: torch.Tensor, batch: da.ContextParallel) -> torch.Tensor:
        qkv, gate, decay, beta = self.project(self.norm(x)).split([sum(self.sizes), WIDTH, HEADS, HEADS], -1)
        qkv = batch.causal_conv1d(qkv, self.filters, activation="silu")
        q, k, v = (part.unflatten(1, (HEADS, -1)) for part in qkv.split(self.sizes, -1))
        if self.attends:
            mixed = batch.attention(q, k, v)
        else:
            gates = dict(g=F.logsigmoid(decay + 4), beta=beta.sigmoid())
            mixed = batch.recurrence(q, F.normalize(k, dim=-1), v, "gated_delta_rule", **gates)
        return x + self.out(mixed.flatten(1) * gate.sigmoid())


class Hybrid(nn.Module):
    """A model with `ratio` recurrent layers per attention layer (0: only attention layers, -1: no attention layers)."""

    def __init__(self, ratio: int, layers: int = 4, vocabulary: int = 256) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocabulary, WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)
        # place attention early, in layer 1: its inputs have passed through few layers, so it learns sooner
        attends = [ratio >= 0 and i % (ratio + 1) == min(ratio, 1) for i in range(layers)]
        self.mixers = nn.ModuleList(map(Mixer, attends))
        parts = [(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH)) for _ in range(layers)]
        self.mlps = nn.ModuleList(nn.Sequential(*part) for part in parts)

    def forward(self, input_ids: torch.Tensor, context_parallel: da.ContextParallel) -> torch.Tensor:
        x = self.tokens(input_ids[0])
        for mixer, mlp in zip(self.mixers, self.mlps, strict=True):
            x = mixer(x, context_parallel)
            x = x + mlp(x)
        return self.head(x)[None]
