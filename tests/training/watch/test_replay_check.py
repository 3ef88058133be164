"""The replay check: an ulp added once by one rank is found, and that rank is named although messages spread the error."""

import pytest
import torch
import torch.distributed as dist
from planted_changes import ChangedGradient, change_output
from processes import run_on_ranks
from small import CAD, build, micro_batch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import parameters_to_vector

import distattn as da
from distattn.adapters import pytorch
from distattn.kernels import cpu
from distattn.training.watch.replay_check import ReplayCheck, bits_digest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_digest_sees_every_bit_and_where_rows_are(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator).to(dtype)
    digest = bits_digest(x)
    assert digest == bits_digest(x.clone()) and digest.dtype == torch.int64 and digest.dim() == 0
    assert digest == bits_digest(x.transpose(0, 1).contiguous().transpose(0, 1))
    size = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()]
    for place in ((0, 0, 0), (2, 4, 7), (1, 2, 3)):
        for bit in range(0, 8 * x.element_size() - 1, 3):
            other = x.clone()
            other.view(size)[place] ^= 1 << bit
            assert bits_digest(other) != digest
    assert bits_digest(x[torch.tensor([1, 0, 2])]) != digest
    # bits count, not values: the two zeros differ, and equal NaNs match
    assert bits_digest(torch.zeros(2).to(dtype)) != bits_digest((-torch.zeros(2)).to(dtype))
    nan = torch.full((4,), float("nan")).to(dtype)
    assert bits_digest(nan) == bits_digest(nan.clone())
    assert bits_digest(torch.tensor(1.0, dtype=dtype)).dim() == 0


def an_ulp(out):
    """Replace one element of an output by the next larger number."""
    other = out.detach().clone()
    other.view(-1)[3] = torch.nextafter(other.view(-1)[3], torch.tensor(torch.inf))
    return out + (other - out.detach())


def ulp_in_backward(out):
    return ChangedGradient.apply(out, an_ulp)


def bad_kernel(rank, which):
    """Make this process's CPU kernel add an ulp in call `which`, a (direction, number).

    Return a function that restores the kernel and returns the calls made.
    """
    calls, right = [], (cpu.forward, cpu.backward)

    def wrong(name, function):
        def call(*arguments, **options):
            out = function(*arguments, **options)
            calls.append(name)
            if calls.count(name) == which[1] + 1 and name == which[0]:
                part = out[0] if name == "forward" else out[1]
                part.view(-1)[2] = torch.nextafter(part.view(-1)[2], part.new_tensor(torch.inf))
            return out

        return call

    cpu.forward, cpu.backward = wrong("forward", right[0]), wrong("backward", right[1])

    def undo():
        cpu.forward, cpu.backward = right
        return calls

    return undo


def _kernel_checked(rank, settings, which):
    """Return the finding if rank 1 computes a wrong result for another rank in the second run."""
    model = build(torch.float32)
    pytorch.shard_parameters(model, init_device_mesh("cpu", (4,), mesh_dim_names=("cp",)))
    with da.ContextParallel(kernel="cpu", **settings) as cp:
        cp.loss_scale(pytorch.ProbeTarget(model))
        check, runs = ReplayCheck(model, 1, dist.group.WORLD, cp.messages), []
        lengths = [[190, 1, 8], [30], [7, 25], [9, 40]][rank if settings.get("data") == "per_rank" else 0]
        for (batch,) in cp.steps([[micro_batch(lengths)]]):

            def run(batch=batch):
                undo = bad_kernel(rank, which) if rank == 1 and runs else list
                runs.append(None)
                pytorch.local_loss(model, batch).backward()
                assert rank != 1 or len(runs) == 1 or undo().count(which[0]) > which[1]

            difference = check.check(1, run, model.zero_grad)
    return difference and (difference.ranks, difference.computed_in, difference.tensor)


# (rank, module, change of its output, run in which it happens)
FAULTS = [
    (2, "model.layers.0.self_attn.k_proj", an_ulp, 1),
    (1, "model.layers.1.mlp", an_ulp, 0),
    (3, "model.layers.1.self_attn.v_proj", ulp_in_backward, 1),
    (0, "lm_head", an_ulp, 1),
]
WANTED = [
    (2, "model.layers.0.self_attn.k_proj"),
    (1, "model.layers.1.mlp"),
    (3, "model.layers.1.self_attn.v_proj"),
    (0, "lm_head"),
]


def _checked(rank, settings):
    model, out = build(torch.float32), []
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    pytorch.shard_parameters(model, mesh)
    check = ReplayCheck(model, 10, dist.group.WORLD)
    assert [step for step in range(31) if check.due(step)] == [10, 20, 30] and not ReplayCheck(model, 0).due(0)
    with pytorch.context_parallel(mesh, **settings) as cp:
        cp.loss_scale(pytorch.ProbeTarget(model))
        lengths = [[19, 1, 8], [30], [7, 25], [9, 40]]
        own_lengths = lengths[rank] if settings.get("data") == "per_rank" else lengths[0]
        for number, (batch,) in enumerate(cp.steps([[micro_batch(own_lengths)]] * (len(FAULTS) + 1))):
            fault = None
            if number < len(FAULTS) and FAULTS[number][0] == rank:
                _, module, spoil, when = FAULTS[number]
                fault = change_output(model.get_submodule(module), spoil, (when,))

            def run(batch=batch):
                pytorch.local_loss(model, batch).backward()

            difference = check.check(number, run, model.zero_grad)
            out.append(difference and (difference.ranks, difference.computed_in, difference.text))
            if fault is not None:
                fault.remove()
        # the second run leaves the gradients of a step without a check
        checked = parameters_to_vector([pytorch.full_tensor(p.grad) for p in model.parameters()])
        model.zero_grad()
        run()
        plain = parameters_to_vector([pytorch.full_tensor(p.grad) for p in model.parameters()])
        assert torch.equal(checked, plain)
    return out


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "settings",
    [
        dict(strategy="ring", layout="zigzag"),
        dict(strategy="allgather", layout="document_zigzag"),
        {**CAD, "context_parallel_size": 1},
    ],
    ids=["ring", "allgather", "cad"],
)
def test_the_rank_that_computes_another_result_is_named(settings):
    results = run_on_ranks(4, _checked, settings)
    assert all(result == results[0] for result in results)
    *differences, clean = results[0]
    assert clean is None
    for (rank, module), (ranks, computed_in, text) in zip(WANTED, differences, strict=True):
        assert (ranks, computed_in) == ((rank,), module), text
    assert differences[0][2] == (
        "rank 2 computed another result for the same inputs in model.layers.0.self_attn.k_proj "
        "(model.layers.0.self_attn.k_proj output)."
    )


@pytest.mark.parametrize(
    ("settings", "which", "module", "sentence"),
    [
        # the second call uses another rank's keys or queries, and sends back their gradients or results
        (dict(strategy="ring", layout="zigzag"), ("backward", 1), "model.layers.1.self_attn", "message dKV to rank"),
        ({**CAD, "context_parallel_size": 1}, ("forward", 1), "model.layers.0.self_attn", "message O to rank"),
    ],
    ids=["ring", "cad"],
)
def test_a_rank_that_computes_wrong_attention_for_another_is_named_and_not_the_other(settings, which, module, sentence):
    results = run_on_ranks(4, _kernel_checked, settings, which)
    ranks, computed_in, tensor = results[0]
    assert results == [results[0]] * 4
    assert (ranks, computed_in) == ((1,), module), tensor
    assert sentence in tensor


def test_random_numbers_are_not_a_fault_but_a_program_that_differs_everywhere_is_reported():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    x, check = torch.ones(8, 4), ReplayCheck(model, 1)
    torch.manual_seed(7)
    assert check.check(1, lambda: model(x).sum().backward(), model.zero_grad) is None
    after_check = torch.rand(1)
    torch.manual_seed(7)
    model(x)
    assert torch.rand(1) == after_check
    numbers = iter([1.0, 2.0])
    difference = check.check(1, lambda: model(x * next(numbers)).sum().backward(), model.zero_grad)
    assert difference is not None and difference.ranks == (0,) and difference.computed_in == "the model"


def test_compiled_blocks_are_checked_from_outside():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].compile(backend="aot_eager")
    # call 0 is outside the check, and call 2 is the check's second run
    change_output(model[0], an_ulp, (2,))
    x = torch.ones(3, 4)
    model(x)
    difference = ReplayCheck(model, 1).check(1, lambda: model(x).sum().backward(), model.zero_grad)
    assert difference is not None and difference.computed_in == "0"
