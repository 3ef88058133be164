"""Recurrent layers and attention in one model share a batch, in any layout, with packed documents, on any number of
ranks.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_on_ranks, sum_gradients

import distattn as da
from distattn.batch.recurrent_span import RecurrentSpan
from distattn.driver.overlap import OverlapSchedule

LENGTHS = [5, 40, 1, 30]
WIDTH, HEADS, DIM = 24, 4, 6


class Hybrid(torch.nn.Module):
    """Layers of Gated DeltaNet, Mamba-2, attention and latent attention, with short convolutions of the values."""

    def __init__(self, ops=("gated_delta_rule", "attention", "ssd", "latent_attention")):
        super().__init__()
        self.ops = ops
        generator = torch.Generator().manual_seed(0)
        self.embed = torch.nn.Parameter(torch.randn(64, WIDTH, generator=generator, dtype=torch.float64))
        self.maps = torch.nn.ParameterList(
            torch.randn(WIDTH, 4 * WIDTH, generator=generator, dtype=torch.float64) / WIDTH for _ in ops
        )
        self.taps = torch.nn.Parameter(torch.randn(WIDTH, 4, generator=generator, dtype=torch.float64))

    def span_of_recurrences(self, batch, layout):
        """Run three consecutive recurrent layers on `layout`, then attention on the batch's own layout."""
        span = RecurrentSpan(batch["context_parallel"], layout)
        assert span.is_relaid == (layout is not None)
        x = span.enter(self.embed[batch["input_ids"][0]])
        for map_, op in zip(self.maps, ("gated_delta_rule", "ssd", "gated_delta_rule"), strict=False):
            x = x + self.recurrent(x @ map_, span.batch, op)
        # after the span, attention uses the original layout again
        q, k, v, _ = (y.reshape(-1, HEADS, DIM) for y in (span.leave(x) @ self.maps[3]).chunk(4, -1))
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
        for map_, op in zip(self.maps, self.ops, strict=True):
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


def losses(rank, layout, pad_to, span_layout=False):
    """Return the losses and gradients of two batches.

    span_layout: the layout of a span of recurrent layers (None: the batch's own), which then runs with one attention
    layer; False to run the entire model.
    """
    cp = da.ContextParallel(strategy="ring", layout=layout, pad_to=pad_to)
    model, losses_ = Hybrid(), []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 64, (1, sum(LENGTHS)), generator=generator)
        batch = cp.shard({"input_ids": ids, "document_lengths": LENGTHS[seed:] + LENGTHS[:seed]})
        out = model(batch) if span_layout is False else model.span_of_recurrences(batch, span_layout)
        # padding has no labels
        loss = out[batch["labels"][0] >= 0].square().sum()
        loss.backward()
        losses_.append(float(loss.detach()))
    sum_gradients(model)
    return losses_, [p.grad for p in model.parameters()]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "layout, pad_to, run", [("zigzag", 1, False), ("contiguous", 8, False), ("zigzag", 8, "contiguous")]
)
def test_a_hybrid_model_is_the_same_on_any_number_of_ranks(layout, pad_to, run):
    (wanted, gradients), *_ = run_on_ranks(1, losses, layout, 1, run and None)
    results = run_on_ranks(3, losses, layout, pad_to, run)
    for i, loss in enumerate(wanted):
        assert sum(rank_losses[i] for rank_losses, _ in results) == pytest.approx(loss, rel=1e-11)
    for a, b in zip(results[0][1], gradients, strict=True):
        assert float((a - b).abs().max()) <= 1e-10 * float(b.abs().max())


# document lengths of each step's only micro-batch, by rank and step; the third rank has no documents after step 0
PACKS = [[[64, 3], [1], [90]], [[20, 70, 2], [100], [8]], [[31], [], []]]


def packs_of(rank):
    for step, lengths in enumerate(PACKS[rank]):
        generator = torch.Generator().manual_seed(10 * rank + step)
        ids = torch.randint(0, 64, (1, sum(lengths)), generator=generator)
        yield [{"input_ids": ids, "document_lengths": lengths}] if lengths else []


def steps_of(model, cp, loader, group=None):
    """Return the losses and gradients of every step, summed over the ranks with a model."""
    results = []
    for micro_batches in cp.steps(loader):
        total = torch.zeros((), dtype=torch.float64)
        for batch in micro_batches:
            loss = model(batch)[batch["labels"][0] != -100].square().sum()
            loss.backward()
            total += loss.detach()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        for part in (total, *gradients):
            dist.all_reduce(part, group=group)
        results.append((float(total), gradients))
        model.zero_grad()
    return results


def pooled(rank, servers, ops):
    trainers = dist.new_group(list(range(3)))
    if rank >= 3:
        return tuple(da.serve()) if servers else None
    settings = dict(strategy="cad", options=dict(block=8, tolerance=0.0), data="per_rank", servers=servers)
    with da.ContextParallel(None if servers else trainers, **settings) as cp:
        results = steps_of(Hybrid(ops), cp, packs_of(rank), trainers)
        if servers:
            latent = Hybrid(["latent_attention"])
            with pytest.raises(
                da.DistattnError, match="servers compute attention only, and layers of latent_attention"
            ):
                steps_of(latent, cp, packs_of(rank), trainers)
    return results


def alone(rank, ops):
    """Run every step of all ranks in a single process, one micro-batch after another."""
    steps = [
        [pack for of_rank in step for pack in of_rank] for step in zip(*(packs_of(r) for r in range(3)), strict=True)
    ]
    with da.ContextParallel(strategy="ring") as cp:
        return steps_of(Hybrid(ops), cp, steps)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("servers", [0, 1])
def test_recurrent_layers_stay_where_tokens_are_while_attention_is_pooled_or_served(servers):
    ops = ["gated_delta_rule", "attention", "ssd"] + ([] if servers else ["latent_attention"])
    (wanted,) = run_on_ranks(1, alone, ops)
    *results, served = run_on_ranks(4, pooled, servers, ops)
    for rank_steps in results:
        assert len(rank_steps) == len(wanted) == 3
        for (loss, gradients), (other_loss, others) in zip(rank_steps, wanted, strict=True):
            assert loss == pytest.approx(other_loss, rel=1e-11)
            for a, b in zip(gradients, others, strict=True):
                assert float((a - b).abs().max()) <= 1e-10 * float(b.abs().max())
    # servers run one attention layer forward and backward in each of three steps
    assert served == ((3, 3) if servers else None)


class Recurrent(torch.nn.Module):
    def __init__(self, batch, op):
        super().__init__()
        self.batch, self.op = batch, op

    def forward(self, x):
        q = x.reshape(-1, 2, 4)
        if self.op == "recurrence":
            return self.batch.recurrence(q, q, q, "linear_attention").reshape(x.shape)
        if self.op == "causal_conv1d":
            return self.batch.causal_conv1d(x, x.new_ones(8, 2))
        return self.batch.latent_attention(q, x[:, :2], x, x.new_ones(2, 6, 8)).reshape(x.shape)


@pytest.mark.parametrize("op", ["recurrence", "causal_conv1d", "latent_attention"])
def test_layers_of_other_ops_do_not_take_turns(op):
    with da.ContextParallel(strategy="ring") as cp:
        batch = cp.shard({"input_ids": torch.zeros(1, 12, dtype=torch.int64), "document_lengths": [12]})
        layer, x = Recurrent(batch["context_parallel"], op), torch.ones(12, 8, requires_grad=True)
        with pytest.raises(
            da.DistattnError, match="cannot take turns with other micro-batches yet; leave OverlapSchedule out"
        ):
            OverlapSchedule([layer]).step([lambda: layer(x).sum()] * 2)
