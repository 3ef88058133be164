"""All parameters are compared: ranks with different weights, and gradients that are clipped, left out or reduced
differently.
"""

import pytest
import small
import torch
import torch.distributed as dist
from processes import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distattn.adapters import pytorch
from distattn.driver.context_parallel import ContextParallel
from distattn.driver.parameter_probe import GradientSketches, ProbedParameter, check_same_weights
from distattn.ir.errors import DistattnError

DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"


def summed(model, left_out=(), divided=(), clip=None, clip_first=False):
    """Return a function that sums gradients after the backward pass.

    left_out: parameters that the function does not sum. divided: parameters whose gradients it halves. clip: the norm
    to which it clips gradients.
    """

    def reduce():
        if clip_first:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for name, parameter in model.named_parameters():
            if name not in left_out and dist.is_initialized():
                dist.all_reduce(parameter.grad)
            if name in divided:
                parameter.grad /= 2
        if clip is not None and not clip_first:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)

    return reduce


def refusal_of(cp, model, **arguments) -> str:
    """Return the error of loss_scale, or "" if it accepts the trainer."""
    before = [pytorch.full_tensor(parameter.detach()).clone() for parameter in model.parameters()]
    try:
        cp.loss_scale(pytorch.ProbeTarget(model, **arguments))
    except DistattnError as refusal:
        sentence = str(refusal)
    else:
        sentence = ""
    after = [pytorch.full_tensor(parameter.detach()) for parameter in model.parameters()]
    assert all(torch.equal(value, value_before) for value, value_before in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    return sentence


def looped(rank: int) -> dict[str, str]:
    """Return the errors raised for hand-written training loops, keyed by the mistake planted in each."""
    refusals = {}
    with ContextParallel(strategy="ring", kernel="reference") as cp:
        for kind, how in {
            "right": {},
            "left out": dict(left_out=[DOWN, NORM]),
            "divided": dict(divided=[DOWN]),
            "clipped": dict(clip=1.0),
            "clipped, large": dict(clip=500.0),
            "clipped first": dict(clip=1.0, clip_first=True),
        }.items():
            model = small.build()
            refusals[kind] = refusal_of(cp, model, reduce=summed(model, **how))
        model = small.build()
        if rank == 1:
            with torch.no_grad():
                # the same values in different positions
                weight = model.get_parameter(DOWN)
                weight.copy_(weight.flip(0))
        model.get_parameter(DOWN).requires_grad_(False)
        refusals["permuted"] = refusal_of(cp, model, reduce=lambda: None)
        if rank == 1:
            model.extra = torch.nn.Linear(2, 2)
        refusals["another parameter"] = refusal_of(cp, model, reduce=lambda: None)
    return refusals


def test_loops_that_reduce_some_parameters_differently_are_refused_by_name():
    for refusals in run_on_ranks(2, looped):
        assert refusals["right"] == ""
        assert (
            f"on ranks 0, 1 of the loss group the gradient of {DOWN}, {NORM} is the rank's own" in refusals["left out"]
        )
        assert f"the gradient of {DOWN} is 0.5 times what the other gradients' reduction" in refusals["divided"]
        for kind in ("clipped", "clipped, large"):
            assert "gradients are not linear: a loss 64 times as large makes gradients" in refusals[kind]
            assert "Clipping belongs after the reduction" in refusals[kind]
        assert "not linear" in refusals["clipped first"] or "weighs ranks unequally" in refusals["clipped first"]
        assert "rank 1 of the loss group begins with other weights than rank 0" in refusals["permuted"]
        assert refusals["permuted"].endswith(f"Different: {DOWN}.")
        assert "rank 1 of the loss group has other parameters than rank 0" in refusals["another parameter"]


def test_clipping_is_refused_on_one_rank_as_well():
    model = small.build()
    with ContextParallel(strategy="ring", kernel="reference") as cp:
        assert "Clipping belongs after the reduction" in refusal_of(cp, model, reduce=summed(model, clip=1.0))
        assert cp.loss_scale() == 1.0


def wrapped(rank: int) -> dict[str, str]:
    """Return the errors for PyTorch wrappers that leave out parameters, and for replicas of shards."""
    refusals = {}
    with ContextParallel(strategy="ring", kernel="reference") as cp:
        model = small.build()
        model._ddp_params_and_buffers_to_ignore = [DOWN]
        refusals["ddp"] = refusal_of(cp, DistributedDataParallel(model))
        mesh = init_device_mesh("cpu", (2,))
        for kind in ("fsdp", "fsdp, left out", "fsdp, evaluated before"):
            model = small.build()
            ignored = {model.get_parameter(DOWN)} if kind == "fsdp, left out" else set()
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh, ignored_params=ignored)
            fully_shard(model, mesh=mesh, ignored_params=ignored)
            if kind == "fsdp, evaluated before":
                # this leaves the root's parameters gathered
                with torch.no_grad():
                    pytorch.logits_of(model, cp.shard(small.micro_batch([4, 3])))
            refusals[kind] = refusal_of(cp, model)
        for kind in ("replicas", "other replicas"):
            torch.manual_seed(rank)
            model = small.build()
            if kind == "other replicas" and rank == 1:
                torch.nn.init.normal_(model.get_parameter(NORM))
            fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "shard")))
            refusals[kind] = refusal_of(cp, model)
    return refusals


def test_wrappers_of_pytorch_that_leave_out_parameters_are_refused_by_name():
    for refusals in run_on_ranks(2, wrapped):
        for kind in ("ddp", "fsdp, left out"):
            assert f"on ranks 0, 1 of the loss group the gradient of {DOWN} is the rank's own" in refusals[kind], kind
        assert refusals["fsdp"] == refusals["fsdp, evaluated before"] == refusals["replicas"] == ""
        assert refusals["other replicas"].endswith(f"Different: {NORM}.")


def parts(rank: int) -> list[str]:
    """Return the errors, or "", for ranks that hold different parts of parameters and for ranks that claim the same
    part. The parameters have many sizes and dtypes.
    """
    refusals = []
    for part in (rank, 0):
        parameters = [
            ProbedParameter(f"{dtype} {size}", torch.full((size,), rank).to(dtype), lambda: None, lambda: None, part)
            for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int64)
            for size in (0, 1, 5000)
        ]
        try:
            check_same_weights(parameters, dist.group.WORLD, torch.device("cpu"))
            refusals.append("")
        except DistattnError as refusal:
            refusals.append(str(refusal))
    return refusals


def test_parts_of_a_parameter_may_differ():
    for same, differs in run_on_ranks(2, parts):
        assert same == ""
        assert "torch.float32 1, torch.float32 5000, torch.bfloat16 1 and 7 more" in differs


def test_one_number_in_a_million_is_seen():
    refusals = run_on_ranks(2, one_number)
    assert all("Different: weight." in refusal for refusal in refusals)


def one_number(rank: int) -> str:
    weight = torch.zeros(1_000_003)
    weight[777_777] = 1e-30 * rank
    parameter = ProbedParameter("weight", weight, lambda: None, lambda: None)
    with pytest.raises(DistattnError) as refusal:
        check_same_weights([parameter], dist.group.WORLD, torch.device("cpu"))
    return str(refusal.value)


def test_an_antisymmetric_gradient_has_a_sketch():
    sketches = GradientSketches([], None, torch.device("cpu"))
    values = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    gradient = values - values.T
    # the expected square of a sketch is the squared norm of the gradient, so the mean square of 8 sketches is within a
    # factor of 10 of that norm
    assert 0.1 < float(sketches._sketch(gradient).square().mean() / gradient.square().sum()) < 10
