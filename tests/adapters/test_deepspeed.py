"""Checks that DeepSpeed's ZeRO stages match a single process, and that setups which its own reductions get wrong are
refused.
"""

import os

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

import small  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state  # noqa: E402
from processes import run_on_ranks  # noqa: E402

import distattn as da  # noqa: E402
from distattn.adapters.deepspeed import ProbeTarget, SequenceGroups  # noqa: E402
from distattn.adapters.pytorch import local_loss  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.sampled(4)]


def _start(rank: int) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    # otherwise DeepSpeed compiles a C++ extension for communication in shared memory
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def groups(rank: int, degree: int) -> dist.ProcessGroup:
    ranks = range(dist.get_world_size())
    return [dist.new_group(ranks[first : first + degree]) for first in ranks[::degree]][rank // degree]


def engine_of(cp, stage: int, micro_batches: int, dtype=torch.float32, **config):
    model = small.build(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **config,
    }
    arguments = dict(model=model, model_parameters=model.parameters(), optimizer=optimizer, config=settings)
    return deepspeed.initialize(**arguments, mpu=SequenceGroups(cp))[0]


def take_step(cp, engine, rank: int, degree: int, micro_batches: int) -> list[torch.Tensor]:
    """Take a training step. Return the gradients as they were just before the optimizer step."""
    for batch in cp.shard_step(small.step(rank // degree, micro_batches)):
        engine.backward(local_loss(engine, batch))
        if engine.is_gradient_accumulation_boundary():
            gradients = [safe_get_full_grad(parameter).clone() for parameter in engine.module.parameters()]
        engine.step()
    return gradients


def _gradients(rank: int, stage: int, degree: int, shared: bool = False):
    """Return the loss factor and the gradients of several steps.

    shared: each block of `degree` ranks has its own batches, and all blocks share attention.
    """
    _start(rank)
    results = []
    for micro_batches in (1, 2):
        if shared:
            cp = da.ContextParallel(dist.group.WORLD, context_parallel_size=degree, **small.CAD)
            assert small.shared_between_blocks(cp.shard_step(small.step(rank // degree, micro_batches)), degree)
        else:
            cp = da.ContextParallel(
                groups(rank, degree), loss_group=dist.group.WORLD, strategy="ring", layout="document_zigzag"
            )
        engine = engine_of(cp, stage, micro_batches)
        cp.loss_scale(ProbeTarget(engine))
        results.append((cp.loss_scale(), take_step(cp, engine, rank, degree, micro_batches)))
    return results


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_those_of_one_process_in_every_stage(stage, degree):
    every = run_on_ranks(4, _gradients, stage, degree)
    for number, micro_batches in enumerate((1, 2)):
        batches = [batch for replica in range(4 // degree) for batch in small.step(replica, micro_batches)]
        _, wanted = small.in_one_process(small.build(torch.float32), batches)
        for factor, gradients in (results[number] for results in every):
            assert abs(small.norm_ratio(gradients, wanted) - 1) < 1e-4, factor


@pytest.mark.parametrize(("ranks", "degree"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_replicas_that_share_attention_have_the_gradients_of_one_process(stage, ranks, degree):
    every = run_on_ranks(ranks, _gradients, stage, degree, True)
    for number, micro_batches in enumerate((1, 2)):
        batches = [batch for replica in range(2) for batch in small.step(replica, micro_batches)]
        _, wanted = small.in_one_process(small.build(torch.float32), batches)
        for factor, gradients in (results[number] for results in every):
            assert abs(small.norm_ratio(gradients, wanted) - 1) < 1e-4, factor


def _stepped(rank: int, stage: int, config: dict):
    """Return (gradient norm reported by DeepSpeed, parameters) after a clipped step, with offloading if the stage
    supports it.
    """
    _start(rank)
    cp = da.ContextParallel(groups(rank, 2), loss_group=dist.group.WORLD, strategy="ring", layout="document_zigzag")
    dtype = torch.bfloat16 if "bf16" in config else torch.float32
    engine = engine_of(cp, stage, 2, dtype, gradient_clipping=0.5, **config)
    cp.loss_scale(ProbeTarget(engine))
    take_step(cp, engine, rank, 2, 2)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        parameters = [parameter.detach().float().clone() for parameter in engine.module.parameters()]
    return engine.get_global_grad_norm(), parameters


OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (3, {}),
        (2, OFFLOAD),
        (1, {"bf16": {"enabled": True}}),
        (3, {"bf16": {"enabled": True}}),
    ],
    ids=["0", "1", "2", "3", "offload", "bf16 1", "bf16 3"],
)
def test_a_clipped_step_matches_one_process(stage, config):
    model = small.build(torch.float32)
    _, gradients = small.in_one_process(model, [batch for replica in range(2) for batch in small.step(replica, 2)])
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    assert norm > 0.5
    coarse = "bf16" in config
    for got_norm, parameters in run_on_ranks(4, _stepped, stage, config):
        if got_norm is not None:
            assert float(got_norm) == pytest.approx(norm, rel=2e-2 if coarse else 1e-4)
        for got, parameter, gradient in zip(parameters, model.parameters(), gradients, strict=True):
            wanted = parameter.detach() - 0.1 * 0.5 / norm * gradient
            assert (got - wanted).abs().max() < (5e-3 if coarse else 1e-5)


VARIANTS = {
    "fp32, clipped": dict(gradient_clipping=0.01),
    "bf16": dict(bf16={"enabled": True}),
    "bf16, sums in fp32": dict(bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}),
    "offload": dict(offload=True),
}


def _variant(rank: int, variant: str, stage: int, probes: bool):
    """Return (loss factor, gradients, final parameters and state) of three steps. probes: run a probe between steps."""
    _start(rank)
    config = dict(VARIANTS[variant])
    if config.pop("offload", False):
        config["zero_optimization"] = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    cp = da.ContextParallel(dist.group.WORLD, strategy="ring", layout="document_zigzag")
    dtype = torch.bfloat16 if "bf16" in config else torch.float32
    engine = engine_of(cp, stage, 2, dtype, **config)
    factor = cp.loss_scale(ProbeTarget(engine))
    for _ in range(3):
        if probes:
            before = torch.get_rng_state()
            assert cp.loss_scale(ProbeTarget(engine)) == factor
            assert torch.equal(torch.get_rng_state(), before)
            assert all(parameter.grad is None for parameter in engine.module.parameters())
        gradients = take_step(cp, engine, rank, 2, 2)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        state = [parameter.detach().clone() for parameter in engine.module.parameters()]
    if stage:
        state += [safe_get_full_fp32_param(parameter) for parameter in engine.module.parameters()]
        state += [safe_get_full_optimizer_state(p, "momentum_buffer") for p in engine.module.parameters()]
    return factor, gradients, state


# every stage and every variant. DeepSpeed supports offloading and reduction in a different dtype only from stage 1
# upward
@pytest.mark.parametrize(
    ("variant", "stage"),
    [
        *(("fp32, clipped", stage) for stage in (0, 1, 2, 3)),
        *(("bf16", stage) for stage in (0, 2)),
        *(("bf16, sums in fp32", stage) for stage in (1, 3)),
        *(("offload", stage) for stage in (2, 3)),
    ],
)
def test_probes_between_steps_change_nothing(variant, stage):
    probed, plain = (run_on_ranks(2, _variant, variant, stage, probes)[0] for probes in (True, False))
    assert probed[0] == plain[0]
    for got, wanted in zip(probed[2], plain[2], strict=True):
        assert torch.equal(got, wanted)


def _other_weights(rank: int) -> str:
    """Return the error of a rank that loads different weights into one layer after DeepSpeed has synchronized all
    ranks.
    """
    _start(rank)
    cp = da.ContextParallel(dist.group.WORLD, strategy="ring")
    engine = engine_of(cp, 1, 1)
    name = "model.layers.1.self_attn.o_proj.weight"
    with torch.no_grad():
        engine.module.get_parameter(name)[0, 0] += rank
    with pytest.raises(da.DistattnError) as refusal:
        cp.loss_scale(ProbeTarget(engine))
    return str(refusal.value)


def test_a_rank_with_other_weights_is_named_with_the_parameter():
    for refusal in run_on_ranks(2, _other_weights):
        assert "rank 1 of the loss group begins with other weights than rank 0" in refusal
        assert refusal.endswith("Different: model.layers.1.self_attn.o_proj.weight.")


def _by_mesh(rank: int) -> str:
    _start(rank)
    cp = da.ContextParallel(groups(rank, 2), loss_group=dist.group.WORLD, strategy="ring")
    model = small.build(torch.float32)
    settings = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9}
    arguments = dict(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=settings)
    engine = deepspeed.initialize(**arguments, mesh_param=(2, 2))[0]
    with pytest.raises(da.DistattnError) as refusal:
        cp.loss_scale(ProbeTarget(engine))
    return str(refusal.value)


def test_deepspeeds_mesh_does_not_reduce_over_the_sequence_and_is_refused():
    for refusal in run_on_ranks(4, _by_mesh):
        assert "ranks of the loss group end up with different gradients" in refusal


def _refusals(rank: int) -> list[str]:
    _start(rank)
    cp = da.ContextParallel(groups(rank, 2), strategy="ring")
    refusals = []
    for ask in (
        lambda: SequenceGroups(cp),
        lambda: SequenceGroups(da.ContextParallel(dist.group.WORLD, strategy="ring")).initialize_sequence_parallel(2),
        lambda: ProbeTarget(object.__new__(deepspeed.PipelineEngine)),
        lambda: ProbeTarget(type("Experts", (), {"has_moe_layers": True})()),
    ):
        with pytest.raises(da.DistattnError) as refusal:
            ask()
        refusals.append(str(refusal.value))
    cp = da.ContextParallel(dist.group.WORLD, strategy="ring")
    engine = engine_of(cp, 1, 2)
    batch = cp.shard(small.micro_batch([20]))
    engine.backward(local_loss(engine, batch))
    engine.step()
    with pytest.raises(da.DistattnError) as refusal:
        cp.loss_scale(ProbeTarget(engine))
    return [*refusals, str(refusal.value)]


def _with_servers(rank: int) -> str:
    _start(rank)
    if rank == 2:
        return str(da.serve())
    with da.ContextParallel(dist.group.WORLD, servers=1, **small.CAD) as cp:
        with pytest.raises(da.DistattnError) as refusal:
            SequenceGroups(cp)
        return str(refusal.value)


def test_ranks_that_only_serve_are_refused():
    *refusals, _ = run_on_ranks(3, _with_servers)
    assert all("no rank can only serve; leave servers out" in refusal for refusal in refusals)


def test_settings_that_deepspeed_does_not_support_are_refused_by_name():
    wanted = ["has 2; give", "split over 4 ranks, not 2", "PipelineModule", "expert parallelism", "1 of a step's 2"]
    for refusals in run_on_ranks(4, _refusals):
        assert all(sentence in refusal for sentence, refusal in zip(wanted, refusals, strict=True)), refusals
