"""Losses are scaled so that any trainer gets the gradients of a single process."""

import logging
import random

import numpy as np
import pytest
import small
import torch
import torch.distributed as dist
from processes import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distattn.adapters import pytorch
from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.driver.context_parallel import ContextParallel
from distattn.ir.errors import DistattnError

pytestmark = pytest.mark.sampled(6)


def _sum(model, group=None, mean=False):
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=group)
        if mean:
            parameter.grad /= dist.get_world_size()


def trainer(kind: str, mesh, **changes) -> tuple[torch.nn.Module, pytorch.ProbeTarget]:
    model = small.build(**changes)
    flat = pytorch.gradient_mesh(mesh)
    if kind == "fsdp that sums":
        pytorch.shard_parameters(model, mesh)
    if kind == "fsdp":
        for module in [*model.get_decoder().layers, model]:
            fully_shard(module, mesh=flat)
    if kind == "ddp":
        model = DistributedDataParallel(model, process_group=flat.get_group())
    if kind in ("sum", "mean"):
        return model, pytorch.ProbeTarget(model, reduce=lambda: _sum(model, flat.get_group(), kind == "mean"))
    if kind == "only replicas":
        return model, pytorch.ProbeTarget(model, reduce=lambda: _sum(model, mesh["dp"].get_group()))
    return model, pytorch.ProbeTarget(model)


FACTORS = {"sum": 1, "mean": 4, "ddp": 4, "fsdp": 4, "fsdp that sums": 1}


RING = dict(strategy="ring", layout="document_zigzag")


def _gradients(rank: int, kind: str, degree: int, micro_batches: int, changes: dict, settings: dict):
    """Return (factor, loss in a single process, gradients). degree: the number of ranks that share a batch; if
    above 1, these ranks form the mesh dimension cp.
    """
    replicas = dist.get_world_size() // degree
    shape, names = ((replicas, degree), ("dp", "cp")) if degree > 1 else ((replicas,), ("dp",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model, loop = trainer(kind, mesh, **changes)
    cp = pytorch.context_parallel(mesh, **settings, kernel="reference")
    factor = cp.loss_scale(loop)
    total = torch.zeros((), dtype=torch.float64)
    parts = cp.shard_step(small.step(rank // degree, micro_batches))
    if settings is small.CAD:
        assert small.shared_between_blocks(parts, degree)
    for number, batch in enumerate(parts):
        last = number == len(parts) - 1
        if kind.startswith("fsdp"):
            model.set_requires_gradient_sync(last)
        if kind == "ddp":
            model.require_backward_grad_sync = last
        loss = pytorch.local_loss(model, batch)
        loss.backward()
        total += loss.detach()
    if loop._reduce is not None:
        loop._reduce()
    dist.all_reduce(total)
    return factor, total / factor, [pytorch.full_tensor(parameter.grad) for parameter in model.parameters()]


@pytest.mark.parametrize(("degree", "micro_batches"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("kind", FACTORS)
def test_gradients_match_one_process(kind, degree, micro_batches):
    changes = {"tie_word_embeddings": kind == "ddp"}
    batches = [batch for replica in range(4 // degree) for batch in small.step(replica, micro_batches)]
    loss, gradients = small.in_one_process(small.build(**changes), batches)
    for factor, got_loss, got in run_on_ranks(4, _gradients, kind, degree, micro_batches, changes, RING):
        assert factor == FACTORS[kind]
        assert abs(got_loss - loss) < 1e-6
        assert abs(small.norm_ratio(got, gradients) - 1) < 1e-4


@pytest.mark.parametrize(("ranks", "degree", "micro_batches"), [(2, 1, 1), (4, 2, 2)])
@pytest.mark.parametrize("kind", FACTORS)
def test_replicas_that_share_attention_have_the_gradients_of_one_process(kind, ranks, degree, micro_batches):
    changes = {"tie_word_embeddings": kind == "ddp"}
    batches = [batch for replica in range(2) for batch in small.step(replica, micro_batches)]
    loss, gradients = small.in_one_process(small.build(**changes), batches)
    arguments = kind, degree, micro_batches, changes, small.CAD
    for factor, got_loss, got in run_on_ranks(ranks, _gradients, *arguments):
        assert factor == (1 if FACTORS[kind] == 1 else ranks)
        assert abs(got_loss - loss) < 1e-6
        assert abs(small.norm_ratio(got, gradients) - 1) < 1e-4


def _meshes(rank: int) -> list[str]:
    refusals = []
    for shape, names, settings in (
        ((2, 2), ("cp", "dp"), small.CAD),
        ((2, 2), ("dp", "sp"), {"strategy": "ring"}),
    ):
        with pytest.raises(DistattnError) as refusal:
            pytorch.context_parallel(init_device_mesh("cpu", shape, mesh_dim_names=names), **settings)
        refusals.append(str(refusal.value))
    return refusals


def test_meshes_that_do_not_fit_are_refused():
    for refusals in run_on_ranks(4, _meshes):
        assert "'cp' has to be the mesh's last dim" in refusals[0] and "dims dp, sp, none called 'cp'" in refusals[1]


def _refused(rank: int, kind: str) -> str:
    mesh = init_device_mesh(
        "cpu", (1 if kind == "unequal" else 2, 2 if kind != "unequal" else 4), mesh_dim_names=("dp", "cp")
    )
    model, loop = trainer("sum" if kind in ("unequal", "clipped", "only the group's") else kind, mesh)
    if kind == "unequal":
        wrong = loop._reduce

        def reduce():
            for parameter in model.parameters():
                parameter.grad *= 2 if rank == 1 else 1
            wrong()

        loop._reduce = reduce
    if kind == "clipped":
        right = loop._reduce
        loop._reduce = lambda: (right(), [p.grad.clamp_(-0.1, 0.1) for p in model.parameters()])
    cp = pytorch.context_parallel(mesh, strategy="ring", kernel="reference")
    if kind == "only the group's":
        # gradients are summed over both replicas, but loss_group contains only one replica
        cp = ContextParallel(mesh["cp"].get_group(), strategy="ring", kernel="reference")
    with pytest.raises(DistattnError) as refusal:
        cp.loss_scale(loop)
    assert cp.loss_scale() == 1.0
    return str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("only replicas", "rank 0 1, 0, 1, 0; rank 1 0, 1, 0, 1"),
        ("none", "different gradients"),
        ("unequal", "weighs ranks unequally, 1, 2, 1, 1"),
        ("clipped", "not a weighted sum"),
        ("only the group's", "ranks outside of it add theirs"),
    ],
)
def test_gradients_that_no_factor_can_correct_are_refused_on_all_ranks(kind, sentence):
    for refusal in run_on_ranks(4, _refused, kind):
        assert sentence in refusal


def _frozen(rank: int, kind: str) -> float:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    model = small.build()
    model.requires_grad_(False)
    # train only some weights, as with LoRA adapters
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    if kind == "ddp":
        model = DistributedDataParallel(model)
        loop = pytorch.ProbeTarget(model)
    else:
        weight = model.model.layers[1].mlp.down_proj.weight
        loop = pytorch.ProbeTarget(model, reduce=lambda: dist.all_reduce(weight.grad))
    return pytorch.context_parallel(mesh, strategy="ring", kernel="reference").loss_scale(loop)


@pytest.mark.parametrize("kind", ["sum", "ddp"])
def test_another_layer_is_read_if_the_output_layer_is_frozen(kind):
    assert run_on_ranks(4, _frozen, kind) == [FACTORS[kind]] * 4


def _accumulating(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
    model, loop = trainer("fsdp", mesh)
    cp = pytorch.context_parallel(mesh, strategy="ring", kernel="reference")
    refusals = []
    for synchronized in (False, True):
        model.set_requires_gradient_sync(False)
        pytorch.local_loss(model, cp.shard(small.micro_batch([9, 30]))).backward()
        model.set_requires_gradient_sync(synchronized)
        with pytest.raises(DistattnError) as refusal:
            cp.loss_scale(loop)
        refusals.append(str(refusal.value))
    return refusals


def test_a_probe_amid_accumulated_gradients_of_fsdp2_is_refused():
    for refusals in run_on_ranks(2, _accumulating):
        assert all("between steps" in refusal for refusal in refusals) and len(refusals) == 2


def _state(model) -> list[torch.Tensor]:
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    return [pytorch.full_tensor(tensor.detach()).clone() for tensor in tensors]


def _untouched(rank: int, kind: str) -> bool:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
    model, loop = trainer(kind, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    cp = pytorch.context_parallel(mesh, strategy="ring", kernel="reference")

    def take_step():
        batch = cp.shard(small.micro_batch([9, 30]))
        pytorch.local_loss(model, batch).backward()
        if loop._reduce is not None:
            loop._reduce()

    take_step()
    optimizer.step()
    # a probe in the middle of a step leaves the gradients unchanged
    before, moments = (
        _state(model),
        [x.clone() for s in optimizer.state.values() for x in map(pytorch.full_tensor, s.values())],
    )
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    cp.loss_scale(loop)
    assert all(torch.equal(a, b) for a, b in zip(_state(model), before, strict=True))
    after = [x for s in optimizer.state.values() for x in map(pytorch.full_tensor, s.values())]
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == numbers[1:]
    return True


@pytest.mark.parametrize("kind", ["sum", "ddp", "fsdp"])
def test_the_probe_leaves_everything_bit_identical(kind):
    assert run_on_ranks(2, _untouched, kind) == [True, True]


def test_one_rank_needs_no_factor():
    cp = ContextParallel(strategy="ring", kernel="reference")
    model = small.build()
    assert cp.loss_scale(pytorch.ProbeTarget(model)) == 1.0
    with pytest.raises(DistattnError, match="the layer of Identity that makes logits is unknown"):
        cp.loss_scale(pytorch.ProbeTarget(torch.nn.Identity()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert IGNORE_INDEX in cp.shard(small.micro_batch([4]))["labels"]


class _Said(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def _not_probed(rank):
    """Return the warnings of a trainer whose loss scale was not measured, of a probed trainer, and of an evaluation."""
    batch = {"input_ids": torch.arange(8)[None]}
    warnings = []
    for kind in ("trains", "was probed", "evaluates"):
        handler = _Said()
        logging.getLogger("distattn").addHandler(handler)
        cp, model = ContextParallel(strategy="ring", kernel="reference"), small.build()
        if kind == "was probed":
            cp.loss_scale(pytorch.ProbeTarget(model, reduce=lambda model=model: _sum(model)))
        with torch.set_grad_enabled(kind != "evaluates"):
            for _ in range(3):
                cp.shard(batch)
        logging.getLogger("distattn").removeHandler(handler)
        warnings.append(handler.lines)
    return warnings


def test_a_missing_loss_scale_is_reported_once():
    (warnings, *silent), others = run_on_ranks(2, _not_probed)
    assert len(warnings) == 1 and "loss_scale(target) was not called" in warnings[0] and silent == [[], []]
    assert others == [[], [], []]


def _other_weights(rank):
    """Return the error of ranks with different seeds."""
    cp, model = ContextParallel(strategy="ring", kernel="reference"), small.build()
    torch.manual_seed(rank)
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    with pytest.raises(DistattnError) as error:
        cp.loss_scale(pytorch.ProbeTarget(model, reduce=lambda: _sum(model)))
    return str(error.value)


def test_ranks_that_begin_with_other_weights_are_refused():
    for refusal in run_on_ranks(2, _other_weights):
        assert "rank 1 of the loss group begins with other weights than rank 0: seed before" in refusal
        assert refusal.endswith("Different: lm_head.weight.")


def _other_counts(rank):
    """Return the error of a trainer that accumulates four micro-batches but steps after two."""
    cp = ContextParallel(strategy="ring", kernel="reference")
    model = small.build()
    target = pytorch.ProbeTarget(model, reduce=lambda: _sum(model))
    target.micro_batches_per_step = 4
    batch = {"input_ids": torch.arange(8)[None]}
    for _ in range(2):
        cp.loss_scale(target)
        assert len(cp.shard_step([batch] * 4)) == 4
    with torch.no_grad():
        assert len(cp.shard_step([batch])) == 1
    assert cp.reduction(target) is not None
    with pytest.raises(DistattnError) as error:
        cp.shard_step([batch] * 2)
    return str(error.value)


def test_steps_of_other_micro_batches_than_the_trainer_accumulates_are_refused():
    for sentence in run_on_ranks(2, _other_counts):
        assert "this step has 2 micro-batches, but the trainer accumulates 4" in sentence
