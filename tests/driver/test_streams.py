"""The driver on streams: every read of a tensor comes after its write, in all threads. See `stream_clocks` and `imitated_cuda`."""

import gc

import pytest
import torch
from imitated_cuda import DEVICE, KERNEL, imitated_cuda
from processes import run_on_ranks
from torch import nn

import distattn as da

WIDTH, HEADS = 64, 4
# of each rank, for each step, the documents of its micro-batches
PACKS = [
    [[[200, 9], [40, 60]], [[70, 70]], [[100, 31]]],
    [[[30, 30], [5, 50]], [[128]], [[16] * 6]],
    [[[64], [1, 1, 90]], [[20, 3]], [[200]]],
    [[[100], [8] * 9]],
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, batch):
        q, k, v = (part[0].unflatten(-1, (HEADS, -1)) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(batch.attention(q, k, v).flatten(1)[None])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, 256)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def loss(self, local):
        x = self.embed(local["input_ids"].to(DEVICE))
        for layer in self.layers:
            x = layer(x, local["context_parallel"])
        logits, labels = self.head(x)[0], local["labels"][0].to(DEVICE)
        return nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") * local["loss_scale"]


def loader(rank, device):
    for step in PACKS[rank]:
        yield [
            {"input_ids": torch.zeros(1, sum(lengths), dtype=torch.int64, device=device), "document_lengths": lengths}
            for lengths in step
        ]


def watched(rank, work, *arguments):
    """What was found while `work` ran on a side stream, and how much was looked at."""
    with imitated_cuda() as cuda:
        with torch.cuda.stream(torch.cuda.Stream()):
            work(rank, *arguments)
        # memory counts as well
        gc.collect()
        return cuda.clocks.violations, cuda.clocks.counts


def trained(rank, settings, loads=DEVICE):
    model = Model().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replicated = settings.get("data", "replicated") == "replicated"
    with da.ContextParallel(kernel=KERNEL, **settings) as cp:
        for micro_batches in cp.steps(loader(0 if replicated else rank, loads)):
            losses = [model.loss(batch) for batch in micro_batches]
            for loss in losses:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            cp.mean_loss(losses)


def test_smoke():
    for found, counts in run_on_ranks(2, watched, trained, dict(strategy="ring")):
        print(counts)
        assert not found, "\n".join(found)
