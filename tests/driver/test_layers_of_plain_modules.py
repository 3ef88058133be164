"""The layers in examples/ on any number of ranks match the same modules run on each document separately."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from plain_batch import PlainBatch
from processes import run_on_ranks, sum_gradients
from torch import nn

import distattn as da

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import layers  # noqa: E402
import prefix_softmax  # noqa: E402

LENGTHS = [5, 40, 1, 30]
WIDTH, HEADS, DIM, LATENTS, VOCABULARY, AHEAD = 12, 2, 3, 4, 32, 2


class GatedAttention(nn.Module):
    """Attention as in Qwen3-Next: a sigmoid of the layer's input scales the outputs, without communication."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.affine, self.project = affine, nn.Linear(WIDTH, 4 * HEADS * DIM)
        self.out = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x, batch):
        q, k, v, gate = self.project(x).unflatten(1, (4, HEADS, DIM)).unbind(1)
        if self.affine:
            mixed = layers.affine_scaled_attention(q, k, v, gate[..., :1].exp(), gate[..., 1:2] / 8, batch)
        else:
            mixed = batch.attention(q, k, v) * gate.sigmoid()
        return x + self.out(mixed.flatten(1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.mixers = nn.ModuleList(
            [
                layers.Canon(WIDTH),
                layers.CompressedConvolutionalAttention(WIDTH, HEADS, DIM),
                GatedAttention(affine=False),
                GatedAttention(affine=True),
                prefix_softmax.Latte(WIDTH, HEADS, LATENTS, DIM),
                prefix_softmax.Aaren(WIDTH, HEADS, DIM),
            ]
        )
        self.ahead = layers.MultiTokenPrediction(WIDTH, AHEAD, GatedAttention(affine=False))
        self.double()

    def loss(self, ids, labels, batch):
        """Return the next-token loss summed over tokens, plus the loss of predicting a token further ahead."""
        x = self.embed(ids)
        for mixer in self.mixers:
            x = mixer(x, batch)
        later, later_labels = self.ahead(x, self.embed, ids, labels, batch)
        return sum(
            F.cross_entropy(self.head(x), wanted, reduction="sum", ignore_index=-100)
            for x, wanted in ((x, labels), (later, later_labels))
        )


def token_ids():
    return torch.randint(0, VOCABULARY, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(rank, settings):
    model = Model()
    for some in settings:
        with da.ContextParallel(strategy="ring", **some) as cp:
            batch = cp.shard({"input_ids": token_ids(), "document_lengths": LENGTHS})
            loss = model.loss(batch["input_ids"][0], batch["labels"][0], batch["context_parallel"])
            loss.backward()
            sum_gradients(model)
            yield loss.detach(), [parameter.grad for parameter in model.parameters()]
            model.zero_grad()


def work(rank, settings):
    return list(loss_and_gradients(rank, settings))


@pytest.mark.full
@pytest.mark.sampled(2)
@pytest.mark.parametrize("ranks", [4, 2, 1])
def test_layers_equal_each_document_alone(ranks):
    model, batch, ids = Model(), PlainBatch(LENGTHS), token_ids()[0]
    labels = batch.token_shift(ids, -1, fill=-100)
    loss = model.loss(ids, labels, batch)
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    # by definition, the labels are the tokens AHEAD positions after the next token
    later = batch.token_shift(labels, -AHEAD, fill=-100)
    assert later[5 : 5 + 40 - 1 - AHEAD].tolist() == ids[5 + 1 + AHEAD : 45].tolist()
    assert (later[45 - 1 - AHEAD : 46] == -100).all()
    settings = [dict(layout="zigzag"), dict(layout="contiguous", pad_to=8), dict(layout="balanced")]
    for of_ranks in zip(*run_on_ranks(ranks, work, settings), strict=True):
        assert float(sum(loss for loss, _ in of_ranks)) == pytest.approx(float(loss), rel=1e-11)
        for got, right in zip(of_ranks[0][1], wanted, strict=True):
            assert float((got - right).abs().max()) <= 1e-10 * max(float(right.abs().max()), 1.0)
