"""Pipeline stages that pool their attention: ticks, and the gradients of one process."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from imitated_nccl import by_rules
from one_process import loss_by_document
from processes import run_on_ranks
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.checkpoint import checkpoint

import distattn as da
from distattn.batch.planner import AttentionShape
from distattn.driver.pipeline_ticks import one_forward_one_backward, ticks
from distattn.parallel.make_plan import STRATEGIES

WIDTH, HEADS = 32, 4
SHAPE = AttentionShape(HEADS, HEADS, WIDTH // HEADS, WIDTH // HEADS, "float64")
# by replica and step: micro-batches
PACKS = [[[[150], [40, 9], [7]], [[33, 60]]], [[[20, 20], [90]], [[128], [4, 4]]]]


@given(st.integers(1, 9), st.integers(0, 12))
def test_every_stage_does_every_micro_batch_forward_before_backward(stages, micro_batches):
    order = ticks(stages, micro_batches)
    # as many as 1F1B has slots
    assert len(order) == (2 * (micro_batches + stages - 1) if micro_batches else 0)
    place = {}
    for at, tick in enumerate(order):
        for stage, number in enumerate(tick.micro_batches):
            if number is not None:
                assert (tick.direction, stage, number) not in place
                place[tick.direction, stage, number] = at
    assert len(place) == 2 * stages * micro_batches
    for number in range(micro_batches):
        there = [place["forward", stage, number] for stage in range(stages)]
        back = [place["backward", stage, number] for stage in range(stages)]
        assert there == sorted(set(there)) and back == sorted(set(back), reverse=True) and there[-1] < back[-1]


def test_one_forward_one_backward_takes_as_long_as_its_slots():
    assert one_forward_one_backward(4, [1.0] * 6, [2.0] * 6) == 3.0 * (6 + 3)
    assert one_forward_one_backward(1, [1.0, 3.0], [2.0, 5.0]) == 11.0
    # the longest micro-batch delays all stages
    assert one_forward_one_backward(2, [1.0, 5.0, 1.0], [2.0, 10.0, 2.0]) > 3 * 7


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, attend):
        q, k, v = (part[0].unflatten(-1, (HEADS, -1)) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(attend(q, k, v).flatten(1)[None])


def whole_model():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(256, WIDTH), "head": nn.Linear(WIDTH, 256)})
    model["layers"] = nn.ModuleList(Block() for _ in range(3))
    return model.double()


def rows(replica, step, number):
    lengths = PACKS[replica][step][number]
    generator = torch.Generator().manual_seed(100 * replica + 10 * step + number)
    return {"input_ids": torch.randint(0, 256, (1, sum(lengths)), generator=generator), "document_lengths": lengths}


def plain_steps(replicas):
    """Return (loss, gradients) of every step: one process, one document at a time."""
    model, out = whole_model(), []
    causal = nn.functional.scaled_dot_product_attention
    for step in range(2):
        batches = [rows(r, step, n) for r in range(replicas) for n in range(len(PACKS[r][step]))]

        def logits_of(ids):
            x = model["embed"](ids)
            for layer in model["layers"]:
                x = layer(
                    x, lambda q, k, v: causal(*(y.transpose(0, 1) for y in (q, k, v)), is_causal=True).transpose(0, 1)
                )
            return model["head"](x)[0]

        loss = loss_by_document(logits_of, batches)
        loss.backward()
        out.append(
            (float(loss.detach()), {name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        )
        model.zero_grad()
    return out


def shared(**settings):
    return da.ContextParallel(**{"strategy": "cad", "data": "per_rank", **settings})


def spec(layers=1):
    return da.StageSpec(shape=SHAPE, attention_layers=layers, hidden_size=WIDTH, dtype=torch.float64)


CUT_FINELY = dict(options=dict(tolerance=0.0, block=8))


def staged(rank, replicas, depths, settings=CUT_FINELY):
    stage, replica = divmod(rank, replicas)
    model = whole_model()
    first = sum(depths[:stage])
    layers = model["layers"][first : first + depths[stage]]

    def run(hidden, batch):
        x = model["embed"](batch["input_ids"]) if hidden is None else hidden
        for layer in layers:
            x = layer(x, batch["context_parallel"].attention)
        if stage + 1 < len(depths):
            return x
        logits, labels = model["head"](x)[0], batch["labels"][0]
        return nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") * batch["loss_scale"]

    cp = shared(**settings)
    pipeline = da.PipelineSchedule(cp, stages=len(depths), spec=spec(depths[stage]))
    out = []
    data = [[rows(replica, step, n) for n in range(len(PACKS[replica][step]))] for step in range(2)]
    for losses in pipeline.train(data, run):
        total = torch.tensor(float(sum(losses)), dtype=torch.float64)
        dist.all_reduce(total)
        gradients = {}
        for name, parameter in model.named_parameters():
            gradients[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradients[name])
        out.append((float(total), gradients))
        model.zero_grad(set_to_none=True)
    cp.close()
    return out


def assert_same_gradients(results, replicas):
    wanted = plain_steps(replicas)
    for result in results:
        for (loss, gradients), (wanted_loss, wanted_gradients) in zip(result, wanted, strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-11)
            got, want = (parameters_to_vector(list(grads.values())) for grads in (gradients, wanted_gradients))
            assert (got - want).abs().max() <= 1e-11 * want.abs().max()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rules", ["gloo", pytest.param("nccl", marks=pytest.mark.full)])
@pytest.mark.parametrize(("replicas", "depths"), [(1, (2, 1)), (2, (1, 2)), (1, (1, 1, 1))])
def test_stages_that_pool_their_attention_have_the_gradients_of_one_process(replicas, depths, rules):
    ranks = replicas * len(depths)
    assert_same_gradients(run_on_ranks(ranks, by_rules(rules, staged), replicas, depths), replicas)


@pytest.mark.full
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_any_strategy_may_serve_a_pipeline_by_nccls_rules(strategy):
    # a pipeline cannot hold the tensors that the forward pass keeps
    settings = dict(strategy=strategy, backward="refetch-home")
    assert_same_gradients(run_on_ranks(4, by_rules("nccl", staged), 2, (1, 2), settings), 2)


def adaptive_run(rank):
    """Return the log of speeds of a pipeline of two stages."""
    model = whole_model()
    cp = shared(adaptive=True, options=dict(block=8))
    pipeline = da.PipelineSchedule(cp, stages=2, spec=spec())

    def stage(hidden, batch):
        x = model["embed"](batch["input_ids"]) if hidden is None else hidden
        x = model["layers"][rank](x, batch["context_parallel"].attention)
        return x if rank == 0 else x.sum() * batch["loss_scale"]

    for _ in pipeline.train([[rows(0, 0, 0), rows(0, 0, 1)]] * 4, stage):
        pass
    cp.close()
    return cp.speeds.log


def test_a_pipeline_adapts_two_steps_later():
    logs = run_on_ranks(2, adaptive_run)
    assert logs[0] == logs[1] and logs[0][:2] == [None, None] and all(logs[0][2:]) and len(logs[0]) == 4


def test_repeated_layers_are_refused():
    model = whole_model()
    pipeline = da.PipelineSchedule(shared(), stages=1, spec=spec())

    def stage(hidden, batch):
        x = model["embed"](batch["input_ids"])
        return checkpoint(model["layers"][0], x, batch["context_parallel"].attention, use_reentrant=False).sum()

    with pytest.raises(da.DistattnError, match="are not recomputed"):
        next(pipeline.train([rows(0, 0, 0)], stage))


def test_pipelines_that_cannot_be_are_refused():
    with pytest.raises(da.DistattnError, match="2 stages do not divide the 1 ranks"):
        da.PipelineSchedule(shared(), stages=2, spec=spec())
    for settings in (dict(strategy="ulysses"), dict(backward="keep"), dict(data="replicated")):
        with pytest.raises(da.DistattnError, match='a pipeline needs data="per_rank"'):
            da.PipelineSchedule(shared(**settings), stages=1, spec=spec())
    pipeline = da.PipelineSchedule(shared(), stages=1, spec=spec())
    with pytest.raises(da.DistattnError, match="made 0 attention calls in a forward pass"):
        next(pipeline.train([rows(0, 0, 0)], lambda hidden, batch: torch.zeros((), requires_grad=True)))
