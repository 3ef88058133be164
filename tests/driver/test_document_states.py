"""Document states passed into and out of local batches: documents split over two batches equal whole documents."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from plain_batch import PlainBatch
from processes import run_on_ranks, sum_gradients

import distattn as da
from distattn.batch.local_batch import LocalBatch
from distattn.batch.planner import AttentionShape, BatchKey, Planner
from distattn.batch.pooled_layout import BatchBlock
from distattn.batch.recurrent_span import RecurrentSpan
from distattn.cluster.spec import Link, load
from distattn.ir.op import OPS
from distattn.parallel.attention_config import AttentionConfig

HEADS, DIM, TAPS = 2, 4, 4
WIDTH = 4 * HEADS * DIM
# tokens of each document in the first and in the second batch; in both, the third document is shorter than a filter
FIRST, SECOND = [5, 40, 1, 30], [7, 3, 1, 21]
# one entry per block of ranks; additional blocks have no tokens in either batch
OF_BLOCKS = [([5, 40, 1], [7, 3, 1]), ([30], [21])]


class Layers(torch.nn.Module):
    """A short convolution and a recurrence with one row of parameters per token, so that each token has its own
    gradient.
    """

    def __init__(self, tokens, documents):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = (tokens, WIDTH), (WIDTH, TAPS), (documents, WIDTH, TAPS - 1), (documents, HEADS, DIM, DIM)
        tensors = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
        self.rows, self.filters, self.before, self.state = map(torch.nn.Parameter, tensors)

    def forward(self, local, ids, states, span=None):
        """Return (o, states) for a batch. span: the RecurrentSpan that moves the rows to another layout, or None."""
        x, before, state = self.rows[ids], *states
        if span is not None:
            x, local = span.enter(x), span.batch
        how = dict(activation="silu", return_final_state=True)
        x, before = local.causal_conv1d(x, self.filters, initial_state=before, **how)
        q, k, v, gates = (y.reshape(-1, HEADS, DIM) for y in x.chunk(4, -1))
        g, beta = F.logsigmoid(gates[..., 0]), gates[..., 1].sigmoid()
        o, state = local.recurrence(
            q,
            F.normalize(k, dim=-1),
            v,
            "gated_delta_rule",
            g=g,
            beta=beta,
            initial_state=state,
            return_final_state=True,
        )
        o = o.flatten(1)
        return (o if span is None else span.leave(o)), (before, state)


def of_two_batches(rank, settings, relaid, blocks):
    """Return (this rank's loss, final states, gradients summed over ranks) of documents split over two batches.

    blocks: for each block of ranks, the tokens of its documents in the first and in the second batch.
    """
    total = sum(sum(first) + sum(second) for first, second in blocks)
    documents = sum(len(first) for first, _ in blocks)
    model = Layers(total, documents)
    with da.ContextParallel(strategy="ring", **settings) as cp:
        size = cp.block_ranks
        mine = rank // size
        token = sum(sum(first) + sum(second) for first, second in blocks[:mine])
        number = sum(len(first) for first, _ in blocks[:mine])
        lengths_of_batches = blocks[mine] if mine < len(blocks) else ([], [])
        states = [every[number : number + len(lengths_of_batches[0])] for every in (model.before, model.state)]
        # all ranks of a block have the same loss, so each rank counts its share
        loss = torch.zeros((), dtype=torch.float64)
        for lengths in lengths_of_batches:
            ids = torch.arange(token, token + sum(lengths))[None]
            token += sum(lengths)
            packs = [{"input_ids": ids, "document_lengths": lengths}] if lengths else []
            (batch,) = cp.shard_step(packs)
            local = batch["context_parallel"]
            assert local.documents == tuple(lengths)
            span = RecurrentSpan(local, relaid) if relaid else None
            o, states = model(local, batch["input_ids"][0], states, span)
            loss = loss + weighted(o, batch["input_ids"][0])[: local.own_tokens].sum()
        loss = loss + sum(state.square().sum() for state in states) / size
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    sum_gradients(model)
    return loss.detach(), [state.detach() for state in states], [p.grad for p in model.parameters()]


def weighted(o, ids):
    """Sum the squared outputs with a weight per token, so that swapped tokens change the loss."""
    return o.square().sum(1) * (1 + ids % 7)


def of_one_batch(blocks):
    """Compute the same results from unsplit documents, one at a time."""
    total = sum(sum(first) + sum(second) for first, second in blocks)
    model = Layers(total, sum(len(first) for first, _ in blocks))
    loss, token, number, final = 0.0, 0, 0, []
    for first, second in blocks:
        order = [torch.arange(0)]
        begin, further = token, token + sum(first)
        for a, b in zip(first, second, strict=True):
            order += [torch.arange(begin, begin + a), torch.arange(further, further + b)]
            begin, further = begin + a, further + b
        ids, token = torch.cat(order), further
        states = [every[number : number + len(first)] for every in (model.before, model.state)]
        number += len(first)
        o, states = model(PlainBatch([a + b for a, b in zip(first, second, strict=True)]), ids, states)
        loss = loss + weighted(o, ids).sum() + sum(state.square().sum() for state in states)
        final.append([state.detach() for state in states])
    loss.backward()
    return loss.detach(), final, [p.grad for p in model.parameters()]


REPLICATED = [(FIRST, SECOND)]
# moving tokens takes almost no time on this cluster
_H100 = load("h100-1x2")
FAST = replace(
    _H100,
    intra_node=Link(1e9, 0.0),
    device=replace(_H100.device, launch_us=0.01, task_us=0.001, host_us=0.01),
)
CASES = {
    1: [(dict(layout="zigzag"), None, REPLICATED)],
    2: [
        (dict(layout="block_cyclic", layout_options=dict(block=1), cluster=FAST), None, REPLICATED),
        # ranks do not have the states of each other's documents
        (dict(data="per_rank", cluster=FAST), None, OF_BLOCKS),
    ],
    4: [
        (dict(layout="zigzag", pad_to=8), None, REPLICATED),
        (dict(layout="balanced"), None, REPLICATED),
        (dict(layout="block_cyclic", layout_options=dict(block=3), pad_to=8), "contiguous", REPLICATED),
        # first, blocks of two ranks that split their own batch; then four ranks with one batch each, two of them empty
        (dict(data="per_rank", context_parallel_size=2, layout="zigzag", pad_to=8), None, OF_BLOCKS),
        (dict(data="per_rank"), None, OF_BLOCKS),
    ],
}


def work(rank, ranks):
    return [of_two_batches(rank, *case) for case in CASES[ranks]]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("ranks", CASES)
def test_batches_that_pass_on_states_equal_one_batch(ranks):
    for (settings, _, blocks), results in zip(
        CASES[ranks], zip(*run_on_ranks(ranks, work, ranks), strict=True), strict=True
    ):
        loss, final, gradients = of_one_batch(blocks)
        assert float(sum(rank_loss for rank_loss, *_ in results)) == pytest.approx(float(loss), rel=1e-11), settings
        size = settings.get("context_parallel_size", 1) if "data" in settings else ranks
        for rank, (_, states, rank_gradients) in enumerate(results):
            mine = rank // size
            # the states are complete and bitwise equal on every rank that has the batch
            assert all(map(torch.equal, states, results[mine * size][1]))
            for a, b in zip(states, final[mine] if mine < len(final) else [], strict=False):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
            assert [len(state) for state in states] == [len(blocks[mine][0]) if mine < len(blocks) else 0] * 2
            for a, b in zip(rank_gradients, gradients, strict=True):
                assert float((a - b).abs().max()) <= 1e-10 * float(b.abs().max()), settings


def test_states_of_other_documents_are_refused():
    with da.ContextParallel(strategy="ring") as cp:
        batch = cp.shard({"input_ids": torch.arange(12)[None], "document_lengths": [5, 7]})["context_parallel"]
        x, filters = torch.randn(12, 8), torch.randn(8, 4)
        with pytest.raises(da.DistattnError, match=r"of shape \(3, 8, 3\); .* each of the batch's 2 documents"):
            batch.causal_conv1d(x, filters, initial_state=torch.zeros(3, 8, 3))
        q = torch.randn(12, 2, 4)
        with pytest.raises(da.DistattnError, match="initial_state is float; "):
            batch.recurrence(q, q, q, "linear_attention", initial_state=0.0)
    # this batch belongs to the first rank only, but the span would place its rows on both ranks
    planner = Planner(
        AttentionConfig(strategy="ring"), None, lambda ends: (da.Mask.causal(12), da.Layout.zigzag([12], 2))
    )
    batch = LocalBatch(planner, BatchKey(()), 0, False, BatchBlock(range(1), range(1)))
    assert batch.documents == (12,)
    with pytest.raises(da.DistattnError, match="re-laid layers has no states of documents"):
        RecurrentSpan(batch, "contiguous").batch._states_in(torch.zeros(1, 2, 4, 4))


SHAPE = dict(heads=2, kv_heads=2, head_dim=64, v_head_dim=64, dtype="float32")


def _strategies(rank):
    """Return the strategy chosen for this rank's own batch, and the faster strategy chosen where tokens may move."""
    with da.ContextParallel(strategy="ring", data="per_rank", cluster=FAST) as cp:
        lengths = [[4000, 96], [8]][rank]
        batch = cp.shard({"input_ids": torch.zeros(1, sum(lengths), dtype=torch.int64), "document_lengths": lengths})
        plan = batch["context_parallel"].plan(*AttentionShape(**SHAPE, op=OPS["linear_attention"]))
        call = plan.call
        faster = da.make_recurrent_plan(call.mask, call.layout, op=call.op, cluster=FAST, **SHAPE)
        return plan.strategy, faster.strategy


def test_tokens_stay_on_ranks_that_have_states_of_their_own_documents():
    assert run_on_ranks(2, _strategies) == [("scan", "ulysses")] * 2
