"""Recurrent layers beside attention in one model: the same batch, any layout, packed documents, equal on any number of ranks."""

import pytest
import torch
import torch.nn.functional as F
from processes import run_on_ranks, sum_gradients

import distattn as da
from distattn.batch.recurrent_run import RecurrentRun

LENGTHS = [5, 40, 1, 30]
WIDTH, HEADS, DIM = 24, 4, 6


class Hybrid(torch.nn.Module):
    """Gated DeltaNet, Mamba-2, attention and latent attention layers with short convolutions of values."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = torch.nn.Parameter(torch.randn(64, WIDTH, generator=generator, dtype=torch.float64))
        self.maps = torch.nn.ParameterList(
            torch.randn(WIDTH, 4 * WIDTH, generator=generator, dtype=torch.float64) / WIDTH for _ in range(4)
        )
        self.taps = torch.nn.Parameter(torch.randn(WIDTH, 4, generator=generator, dtype=torch.float64))

    def run_of_recurrences(self, batch, layout):
        """Three layers in a row, on a layout of their own."""
        run = RecurrentRun(batch["context_parallel"], layout)
        assert run.is_relaid == (layout is not None)
        x = run.enter(self.embed[batch["input_ids"][0]])
        for map_, op in zip(self.maps, ("gated_delta_rule", "ssd", "gated_delta_rule"), strict=False):
            x = x + self.recurrent(x @ map_, run.batch, op)
        # attention after the run is where it was before it
        q, k, v, _ = (y.reshape(-1, HEADS, DIM) for y in (run.leave(x) @ self.maps[3]).chunk(4, -1))
        return batch["context_parallel"].attention(q, k, v).flatten(1)

    def recurrent(self, projected, local, op):
        q, k, v, gates = (y.reshape(len(projected), HEADS, DIM) for y in projected.chunk(4, -1))
        v = v + local.causal_conv1d(v.flatten(1), self.taps).reshape(v.shape)
        beta = gates[..., 1].sigmoid() if op == "gated_delta_rule" else None
        k = F.normalize(k[:, ::2], dim=-1)
        return local.recurrence(q[:, ::2], k, v, op, g=F.logsigmoid(gates[..., 0]), beta=beta).flatten(1)

    def forward(self, batch):
        x = self.embed[batch["input_ids"][0]]
        local = batch["context_parallel"]
        for map_, op in zip(self.maps, ("gated_delta_rule", "attention", "ssd", "latent_attention"), strict=True):
            q, k, v, gates = (y.reshape(len(x), HEADS, DIM) for y in (x @ map_).chunk(4, -1))
            mixed = local.causal_conv1d(v.flatten(1), self.taps, bias=self.taps[:, 0])
            v = v + mixed.reshape(v.shape)
            if op == "latent_attention":
                up = self.maps[0][:, : 8 * HEADS].t().reshape(HEADS, 8, WIDTH)
                x = x + local.latent_attention(q, k[:, 0, :2], v.flatten(1), up).flatten(1).repeat(1, 2)[:, :WIDTH]
                continue
            if op == "attention":
                x = x + local.attention(q, k, v).flatten(1)
                continue
            g = F.logsigmoid(gates[..., 0])
            beta = gates[..., 1].sigmoid() if op == "gated_delta_rule" else None
            x = x + local.recurrence(q[:, ::2], F.normalize(k[:, ::2], dim=-1), v, op, g=g, beta=beta).flatten(1)
        return x


def losses(rank, layout, pad_to, run_layout=False):
    """run_layout: of a run of recurrences in place of the model; None: where the model's tokens are."""
    cp = da.ContextParallel(strategy="ring", layout=layout, pad_to=pad_to)
    model, found = Hybrid(), []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 64, (1, sum(LENGTHS)), generator=generator)
        batch = cp.shard({"input_ids": ids, "document_lengths": LENGTHS[seed:] + LENGTHS[:seed]})
        out = model(batch) if run_layout is False else model.run_of_recurrences(batch, run_layout)
        # padding has no label
        loss = out[batch["labels"][0] >= 0].square().sum()
        loss.backward()
        found.append(float(loss.detach()))
    sum_gradients(model)
    return found, [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    "layout, pad_to, run", [("zigzag", 1, False), ("contiguous", 8, False), ("zigzag", 8, "contiguous")]
)
def test_a_hybrid_model_is_the_same_on_any_number_of_ranks(layout, pad_to, run):
    (wanted, gradients), *_ = run_on_ranks(1, losses, layout, 1, run and None)
    everyone = run_on_ranks(3, losses, layout, pad_to, run)
    for i, loss in enumerate(wanted):
        assert sum(found[i] for found, _ in everyone) == pytest.approx(loss, rel=1e-11)
    for a, b in zip(everyone[0][1], gradients, strict=True):
        assert float((a - b).abs().max()) <= 1e-10 * float(b.abs().max())
