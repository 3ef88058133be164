"""Two micro-batches that take turns give the gradients of a plain run, and one computes while the other's messages
travel.
"""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from imitated_nccl import by_rules
from packs_of_ranks import model_of, shared
from processes import run_on_ranks
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.checkpoint import checkpoint

import distattn as da
from distattn.adapters.pytorch import local_loss
from distattn.driver.turns import MicroBatchThread, RandomState, ThreadModes
from distattn.memory.activation_checkpointing import checkpoint_layers
from distattn.ops.current_micro_batch import RECOMPUTING, current_micro_batch
from distattn.parallel.make_plan import STRATEGIES

pytestmark = pytest.mark.sampled(3)

PACKS = [[[200, 9], [40, 11, 60]], [[30, 30], [5, 5]], [[64], [1, 1, 90]], [[100], [8] * 9]]
OPTIONS = dict(options=dict(tolerance=0.0, block=8))


def batches(rank):
    generator = torch.Generator().manual_seed(rank)
    return [
        {"input_ids": torch.randint(0, 256, (1, sum(pack)), generator=generator), "document_lengths": pack}
        for pack in PACKS[rank]
    ]


def test_a_cancelled_micro_batch_that_is_suspended_again_while_it_unwinds_ends():
    def work():
        try:
            thread.suspend(None)
        finally:
            thread.suspend(None)

    thread = MicroBatchThread(work, None, ThreadModes.current(None), RandomState.current(None))
    next(thread.resume())
    thread.cancel()
    assert not thread._thread.is_alive()


class Block(nn.Module):
    """A layer with a gate, in which the parts before and after attention share a norm. twice: call attention twice."""

    def __init__(self, width: int, heads: int, twice: bool = False):
        super().__init__()
        self.heads, self.twice = heads, twice
        self.norm, self.qkv, self.gate = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.out, self.sink = nn.Linear(width, width), nn.Parameter(torch.zeros(heads))

    def forward(self, x, batch):
        for _ in range(1 + self.twice):
            normed = self.norm(x)
            q, k, v = (part[0].unflatten(-1, (self.heads, -1)) for part in self.qkv(normed).chunk(3, -1))
            o = batch.attention(q, k, v, sink=self.sink).flatten(1)[None]
            x = x + self.out(o * torch.sigmoid(self.gate(normed)))
        return x


class Stack(nn.Module):
    """A plain list of layers."""

    def __init__(self, twice: bool):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 32), nn.Linear(32, 256)
        self.layers = nn.ModuleList(Block(32, 4, twice and i == 0) for i in range(3))

    def loss(self, local):
        x = self.embed(local["input_ids"])
        for layer in self.layers:
            x = layer(x, local["context_parallel"])
        logits, labels = self.head(x)[0], local["labels"][0]
        return nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") * local["loss_scale"]


def made(kind):
    """Return (layers, loss function, parameters) of the model `kind`."""
    torch.manual_seed(0)
    if kind == "reentrant":
        model = model_of()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.train()
        return model.model.layers, lambda local: local_loss(model, local), list(model.parameters())
    if kind.startswith("plain"):
        model = Stack("twice" in kind).double()
        return model.layers, model.loss, list(model.parameters())
    model = model_of()
    if "checkpoint" in kind:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    return model.model.layers, lambda local: local_loss(model, local), list(model.parameters())


def alternating_run(rank, kind, options):
    """Return (losses, gradients) of micro-batches run in order, then of micro-batches taking turns, and the trace of
    the second run.
    """
    layers, loss, parameters = made(kind)
    out = []
    with shared(**options) as cp:
        for turns in (False, True):
            (local,) = cp.steps([batches(rank)])
            schedule = da.OverlapSchedule(layers)
            if turns:
                losses = schedule.step([lambda batch=batch: loss(batch) for batch in local])
            else:
                losses = [loss(batch) for batch in local]
                for batch_loss in losses:
                    batch_loss.backward()
            gradient = parameters_to_vector([parameter.grad for parameter in parameters])
            dist.all_reduce(gradient)
            out.append(([float(batch_loss.detach()) for batch_loss in losses], gradient))
            for parameter in parameters:
                parameter.grad = None
    return out, [tuple(span) for span in schedule.spans]


@pytest.mark.parametrize("kind", ["huggingface", "huggingface checkpointed", "plain", "plain twice"])
@pytest.mark.parametrize(
    ("ranks", "rules"), [(2, "gloo"), (4, "gloo"), pytest.param(4, "nccl", marks=pytest.mark.full)]
)
def test_gradients_equal_the_plain_run(kind, ranks, rules):
    work = by_rules(rules, alternating_run)
    for ((losses, gradient), (turned, turned_gradient)), _ in run_on_ranks(ranks, work, kind, OPTIONS):
        assert turned == pytest.approx(losses, rel=1e-12)
        assert (gradient - turned_gradient).abs().max() <= 1e-12 * gradient.abs().max()


@pytest.mark.full
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_any_strategy_may_take_turns_by_nccls_rules(strategy):
    work = by_rules("nccl", alternating_run)
    for ((losses, gradient), (turned, turned_gradient)), _ in run_on_ranks(4, work, "plain", dict(strategy=strategy)):
        assert turned == pytest.approx(losses, rel=1e-12)
        assert (gradient - turned_gradient).abs().max() <= 1e-12 * gradient.abs().max()


def _thread_state():
    """Return the thread-local state that a step must not change."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        current_micro_batch(),
        list(RECOMPUTING),
    )


def trained_run(rank, kind, turns):
    """Return the losses and parameters of five optimizer steps with two micro-batches each."""
    layers, loss, parameters = made(kind)
    optimizer, losses = torch.optim.SGD(parameters, lr=0.05), []
    before = _thread_state()
    with shared(**OPTIONS) as cp:
        schedule = da.OverlapSchedule(layers)
        for local in cp.steps([batches(rank)] * 5):
            if turns:
                step_losses = schedule.step([lambda batch=batch: loss(batch) for batch in local])
            else:
                step_losses = [loss(batch) for batch in local]
                for batch_loss in step_losses:
                    batch_loss.backward()
            assert _thread_state() == before
            for parameter in parameters:
                dist.all_reduce(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(cp.mean_loss(step_losses))
    return losses, parameters_to_vector(parameters).detach()


@pytest.mark.parametrize("kind", ["huggingface", "huggingface checkpointed", "plain twice"])
def test_many_steps_train_as_without_turns_and_leave_the_thread_as_it_was(kind):
    plain = run_on_ranks(2, trained_run, kind, False)
    for (losses, weights), (turned, turned_weights) in zip(
        plain, run_on_ranks(2, trained_run, kind, True), strict=True
    ):
        assert turned == pytest.approx(losses, rel=1e-11) and len(set(losses)) == 5
        assert (weights - turned_weights).abs().max() <= 1e-11 * weights.abs().max()


class DroppingBlock(Block):
    """A layer with dropout before and after attention."""

    def forward(self, x, batch):
        x = nn.functional.dropout(x, 0.5)
        return nn.functional.dropout(super().forward(x, batch), 0.5)


@pytest.mark.parametrize("by", ["checkpoint_layers", "torch"])
def test_checkpointed_layers_repeat_their_dropout(by):
    gradients = []
    with shared() as cp:
        for is_checkpointed in (False, True):
            torch.manual_seed(0)
            model = Stack(False).double()
            model.layers = nn.ModuleList(DroppingBlock(32, 4) for _ in range(2)).double()
            if is_checkpointed and by == "torch":
                for layer in model.layers:
                    layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
            elif is_checkpointed:
                checkpoint_layers(model.layers)
            (local,) = cp.steps([batches(0)])
            da.OverlapSchedule(model.layers).step([partial(model.loss, batch) for batch in local])
            gradients.append(parameters_to_vector([parameter.grad for parameter in model.parameters()]))
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-12 * gradients[0].abs().max()


def test_reentrant_checkpointing_is_refused_in_a_sentence():
    layers, loss, _ = made("reentrant")
    with shared() as cp:
        (local,) = cp.steps([batches(0)])
        with pytest.raises(da.DistattnError, match="use_reentrant=False"):
            da.OverlapSchedule(layers).step([lambda batch=batch: loss(batch) for batch in local])


@pytest.mark.parametrize("policy", ["keep", "refetch-home"])
def test_messages_of_one_travel_while_the_other_runs(policy):
    for _, spans in run_on_ranks(2, alternating_run, "plain", OPTIONS | {"backward": policy}):
        moves = [span for span in spans if span[1] == "moves"]
        runs = [span for span in spans if span[1] == "runs"]
        # every pass of 3 layers and 2 batches sends inputs to other ranks, and outputs back
        assert len(moves) >= 3 * 2 * 2
        hidden = [
            move for move in moves if any(run[0] != move[0] and run[2] < move[3] and move[2] < run[3] for run in runs)
        ]
        assert {part for part, *_ in hidden} == {0, 1}
        # batches run one at a time
        ordered = sorted(runs, key=lambda run: run[2])
        assert all(a[3] <= b[2] for a, b in zip(ordered, ordered[1:], strict=False))


def order_run(rank):
    layers, loss, _ = made("plain")
    with shared(**OPTIONS) as cp:
        (local,) = cp.steps([batches(rank)])
        schedule = da.OverlapSchedule(layers)
        schedule.step([lambda batch=batch: loss(batch) for batch in local])
        trace = schedule.trace(rank)
    assert any(event["name"] == "moves 1" for event in trace["traceEvents"])
    return [part for part, event_kind, *_ in schedule.spans if event_kind == "runs"]


def test_there_is_one_order_of_issue_on_all_ranks():
    orders = run_on_ranks(4, order_run)
    assert all(order == orders[0] for order in orders)
    assert orders[0][:4] == [0, 1, 0, 1]


def test_without_gradients_only_forward_runs():
    layers, loss, parameters = made("plain")
    cp = shared()
    (local,) = cp.steps([batches(0)])
    with torch.no_grad():
        losses = da.OverlapSchedule(layers).step([lambda batch=batch: loss(batch) for batch in local])
    assert [float(turn_loss) for turn_loss in losses] == pytest.approx([float(loss(batch).detach()) for batch in local])
    assert all(parameter.grad is None for parameter in parameters)
    cp.close()


def test_a_step_leaves_nothing_to_the_garbage_collector():
    layers, loss, parameters = made("plain")
    with shared() as cp:
        (local,) = cp.steps([batches(0)])
        kept = []

        def watched(batch):
            result = loss(batch)
            kept.append(weakref.ref(result))
            return result

        gc.collect()
        gc.disable()
        try:
            da.OverlapSchedule(layers).step([partial(watched, batch) for batch in local])
            assert [reference() for reference in kept] == [None, None]
        finally:
            gc.enable()


def test_a_failure_in_one_batch_ends_the_others():
    layers, loss, _ = made("plain")
    cp = shared()
    (local,) = cp.steps([batches(0)])

    def failing():
        raise ValueError("no such batch")

    with pytest.raises(ValueError, match="no such batch"):
        da.OverlapSchedule(layers).step([lambda: loss(local[0]), failing])
    cp.close()


def test_models_that_cannot_take_turns_are_refused():
    with pytest.raises(da.DistattnError, match="at least one layer"):
        da.OverlapSchedule([])
    layers, loss, _ = made("plain")
    cp = shared()
    (local,) = cp.steps([batches(0)])
    with pytest.raises(da.DistattnError, match="outside of the layers"):
        da.OverlapSchedule(layers[1:]).step([lambda: loss(local[0])])
    cp.close()
