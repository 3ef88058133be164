"""Kernel trials: wrong kernels are found and never used, and all ranks choose the same fastest correct one."""

import json
import logging
import sys
import types

import pytest
import torch
from cases import LENGTHS, all_masks, layouts, masks
from oracle import dense, random_inputs
from processes import run_on_ranks

import distattn as da
from distattn.batch import planner
from distattn.ir.errors import DistattnError
from distattn.ir.mask import Mask
from distattn.ir.op import OPS
from distattn.kernels import cpu, reference, registry, trial_cache, trials
from distattn.kernels.convolution import taps
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.recurrence import chunked
from distattn.kernels.spec import KernelRequirements
from distattn.kernels.trials import Trial, rank_kernels, sample_launch, try_each, try_kernels
from distattn.ops import kernel_choice
from distattn.ops.executable import kernel_requirements

CPU = torch.device("cpu")
NEEDED = KernelRequirements(torch.float64, 8, 8, CPU)
SHAPE = dict(heads=4, kv_heads=2, head_dim=8, dtype="float64")


def planted(name, monkeypatch, **changed):
    """Register a kernel module named `name` with the CPU kernel's functions, except those in `changed`."""
    module = types.ModuleType(f"planted_{name}")
    for attribute in ("DIFFERENTIABLE_LSE", "ACCUMULATES", "unsupported_reason", "prepare", "forward", "backward"):
        setattr(module, attribute, changed.get(attribute, getattr(cpu, attribute)))
    module.FINISHES = changed.get("FINISHES", ())
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.KERNELS, name, module.__name__)
    return name


def wrong_gradient(*args):
    dq, dk, dv = cpu.backward(*args)
    # damage one key of one head
    dv[3, 0] *= 1.5
    return dq, dk, dv


def empty_rows(*args):
    o, lse = cpu.forward(*args)
    return o, lse.masked_fill(lse == -torch.inf, 0.0)


def raising(*args):
    raise RuntimeError("an illegal memory access was encountered\nat 0x7f")


def out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")


def no_number_at_the_end(*args):
    dq, dk, dv = cpu.backward(*args)
    dv[-1] = torch.nan
    return dq, dk, dv


def one_wrong_row(*args):
    o, lse = cpu.forward(*args)
    o[-1, 0] *= 1.1
    return o, lse


def wrong_in_place(q, k, v, schedule, score, into=None, merge=False):
    """Compute correct new results, but ignore the earlier values when adding to results."""
    o, lse = cpu.forward(q, k, v, schedule, score)
    if into is None:
        return o, lse
    into[0].copy_(o)
    into[1].copy_(lse + merge)
    return into


def backward_in_place(*args, into=None, add=(False, False)):
    grads = cpu.backward(*args)
    if into is None:
        return grads
    for place, grad in zip((into[0], *into[1]), grads, strict=True):
        place.copy_(grad)
    return into[0], *into[1]


def written_instead_of_added(*args, into=None, add=(False, False)):
    return added(*args, into=into, add=(add[0], False))


def added(*args, into=None, add=(False, False)):
    grads = cpu.backward(*args)
    if into is None:
        return grads
    for place, grad, adds in zip((into[0], *into[1]), grads, (add[0], add[1], add[1]), strict=True):
        place.add_(grad) if adds else place.copy_(grad)
    return into[0], *into[1]


def merged(q, k, v, schedule, score, into=None, merge=False):
    o, lse = cpu.forward(q, k, v, schedule, score)
    if into is None:
        return o, lse
    total = torch.logaddexp(into[1], lse) if merge else lse
    share = (lse - total).exp().nan_to_num(0.0)[..., None]
    into[0].copy_(share * o + (1 - share) * into[0] if merge else o)
    into[1].copy_(total)
    return into


def finishing(*args, into=None, merge=False, final=None):
    if final is None:
        return merged(*args, into=into, merge=merge)
    held = into[0].nan_to_num(0.0) if final.number == 0 else into[0]
    result, _ = merged(*args, into=(held.clone(), into[1]), merge=merge)
    into[0].copy_(result)
    final.target_THD.copy_(result)
    return into


def finishing_without_earlier_sums(*args, into=None, merge=False, final=None):
    out = merged(*args, into=into, merge=merge)
    if final is not None:
        final.target_THD.copy_(cpu.forward(*args)[0] * 0.5)
    return out


WRONG = {
    "finishes wrong rows": dict(
        ACCUMULATES=True, FINISHES=("forward",), forward=finishing_without_earlier_sums, backward=added
    ),
    "writes where it should add": dict(ACCUMULATES=True, forward=merged, backward=written_instead_of_added),
    "no number at the end": dict(backward=no_number_at_the_end),
    "one wrong row": dict(forward=one_wrong_row),
    "in place": dict(ACCUMULATES=True, forward=wrong_in_place, backward=backward_in_place),
    "wrong gradient": dict(backward=wrong_gradient),
    "no number": dict(forward=lambda *args: tuple(x * torch.nan for x in cpu.forward(*args))),
    "rows without keys": dict(forward=empty_rows),
    "raises": dict(forward=raising),
    "refuses": dict(unsupported_reason=lambda requirements: "it is for other chips"),
}


def test_a_kernel_that_accumulates_is_right(monkeypatch):
    changed = dict(ACCUMULATES=True, forward=merged, backward=added)
    masks_ = [LaunchMask.from_mask(Mask.from_pieces([[2, 300, 0, 290, -400, 0]], 300), 4, 2)]
    by_kernel = try_kernels([planted("adding", monkeypatch, **changed)], masks_, NEEDED)
    assert not by_kernel["adding"].fault and by_kernel["adding"].difference < 1e-12


def test_a_kernel_that_finishes_rows_is_right(monkeypatch):
    changed = dict(ACCUMULATES=True, FINISHES=("forward",), forward=finishing, backward=added)
    masks_ = [LaunchMask.from_mask(Mask.from_pieces([[2, 300, 0, 290, -400, 0]], 300), 4, 2)]
    by_kernel = try_kernels([planted("finishing", monkeypatch, **changed)], masks_, NEEDED)
    assert not by_kernel["finishing"].fault and by_kernel["finishing"].difference < 1e-12


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_kernels_are_found(fault, monkeypatch):
    mask = Mask.from_pieces([[2, 300, 0, 290, -400, 0]], 300)
    masks_ = [LaunchMask.from_mask(mask, 4, 2)]
    by_kernel = try_kernels([planted("odd", monkeypatch, **WRONG[fault]), "cpu"], masks_, NEEDED)
    assert not by_kernel["cpu"].fault and by_kernel["cpu"].difference < 1e-12 and by_kernel["cpu"].seconds > 0
    reasons = {"raises": "RuntimeError: an illegal memory access was encountered", "refuses": "it is for other chips"}
    assert by_kernel["odd"].fault.startswith(reasons.get(fault, "wrong: "))
    assert rank_kernels([by_kernel, {}], ["odd", "cpu"]) == ["cpu"]


def test_a_trial_that_runs_out_of_memory_is_reported_and_not_stored(candidates, monkeypatch, caplog):
    planted("large", monkeypatch, backward=out_of_memory)
    monkeypatch.setitem(registry.CANDIDATES, "cpu", ("large", "cpu"))
    with caplog.at_level(logging.WARNING, "distattn"):
        assert da.prepare(plan_for(1)).key.kernel == "cpu"
    assert 'its trial ran out of device memory; kernel="large" uses it without a trial' in caplog.text
    ((_, kept),) = json.loads(candidates.read_text()).items()
    assert "large" not in kept
    # a different plan is tried again, this time with enough memory
    planted("large", monkeypatch)
    monkeypatch.setattr(trials, "_seconds", lambda kernel, *_: float(kernel is cpu))
    assert da.prepare(plan_for(1, "causal")).key.kernel == "large"


@pytest.fixture
def room(candidates, monkeypatch):
    """Register a kernel whose trial needs 100 free bytes. Return an object with the free bytes and the number of
    trials.
    """
    room = types.SimpleNamespace(free=40, tried=0)

    def backward(*args):
        room.tried += 1
        return cpu.backward(*args) if room.free >= 100 else out_of_memory(*args)

    planted("large", monkeypatch, backward=backward)
    monkeypatch.setitem(registry.CANDIDATES, "cpu", ("large", "cpu"))
    monkeypatch.setattr(trials, "free_bytes", lambda device: room.free)
    monkeypatch.setattr(trials, "_seconds", lambda kernel, *_: float(kernel is cpu))
    monkeypatch.setattr(kernel_choice, "_OUT_OF_MEMORY", {})
    kernel_choice._warn.cache_clear()
    return room


def test_a_trial_that_ran_out_of_memory_is_made_again_where_more_is_free(room, caplog):
    plan = plan_for(1)
    with caplog.at_level(logging.WARNING, "distattn"):
        for free, tried, kernel in [(40, 1, "cpu"), (49, 1, "cpu"), (50, 2, "cpu"), (62, 2, "cpu"), (100, 4, "large")]:
            room.free = free
            before = room.tried
            assert da.prepare(plan).key.kernel == kernel
            assert (room.tried > before) == (free in (40, 50, 100)), (free, room.tried, tried)
    # the user is warned only once
    assert caplog.text.count("ran out of device memory") == 1


def test_a_trial_that_runs_out_of_memory_is_made_three_times_at_most_by_all_plans_of_a_shape(room):
    for free in (1, 2, 4, 8, 16, 32):
        room.free = free
        # use a new plan every time
        assert da.prepare(plan_for(1, "documents" if free % 3 else "causal")).key.kernel == "cpu"
    assert room.tried == 3


@pytest.mark.parametrize(("op", "right"), [("ssd", chunked), ("convolution", taps)])
def test_trials_of_recurrences_and_convolutions_that_run_out_of_memory_are_repeated_three_times_at_most(
    op, right, room, monkeypatch, caplog
):
    def attempt(names, requirements, heads, key_heads, report):
        room.tried += 1
        return try_each(
            names,
            requirements,
            lambda kernel: [0.0] if kernel is right or room.free >= 100 else out_of_memory(),
            lambda kernel: float(kernel is right),
            report,
        )

    kind, usual = OPS[op].kind, right.__name__.split(".")[-1]
    large = types.ModuleType("planted_large_op")
    large.unsupported_reason, large.prepare = right.unsupported_reason, right.prepare
    monkeypatch.setitem(sys.modules, large.__name__, large)
    monkeypatch.setitem(registry.OTHER_KERNELS[kind], "large", large.__name__)
    monkeypatch.setitem(registry._OTHER_CANDIDATES[kind], "cpu", ("large", usual))
    monkeypatch.setitem(kernel_choice._TRIALS_OF_KIND, kind, attempt)
    monkeypatch.setattr(kernel_choice, "_TRIALS_OF_SHAPE", {})
    mask = da.Mask.documents(LENGTHS, (3, 0)) if kind == "convolution" else da.Mask.documents(LENGTHS)
    strategy, shape = "scan" if kind == "recurrence" else "allgather", SHAPE | dict(kv_heads=4, v_head_dim=8)
    plan = da.make_plan(mask, da.Layout.contiguous(LENGTHS, 1), strategy=strategy, op=op, **shape)
    with caplog.at_level(logging.WARNING, "distattn"):
        for free, tried, kernel in [(40, 1, usual), (49, 1, usual), (50, 2, usual), (62, 2, usual), (100, 3, "large")]:
            room.free = free
            assert da.prepare(plan).key.kernel == kernel
            assert room.tried == tried, free
    assert caplog.text.count("ran out of device memory") == 1


@pytest.mark.parametrize("needed", [100, 1000])
def test_the_driver_compares_trials_again_in_a_few_steps(room, needed, monkeypatch):
    lengths = list(LENGTHS)
    monkeypatch.setattr(planner, "_COMPARED_AT", (2, 4))
    q, k, v = random_inputs(sum(lengths), 4, 2, 8)[:3]
    chosen = []
    with da.ContextParallel(strategy="ring", layout="contiguous", kernel="auto") as cp:
        for step in range(8):
            # the trial in the first step runs out of memory. From the fourth step on, memory suffices for 100 bytes
            room.free = 40 + 10 * step if step < 3 else 100 * 100 // needed + 60 * (step > 4)
            batch = cp.shard(
                {"input_ids": torch.zeros(1, sum(lengths), dtype=torch.int64), "document_lengths": lengths}
            )
            batch["context_parallel"].attention(q, k, v)
            (executable,) = batch["context_parallel"]._executables.values()
            chosen.append(executable.key.kernel)
    if needed == 100:
        # the kernel passes its trial in the fourth step, and plans made after that step use the kernel
        assert chosen[:4] == ["cpu"] * 4 and chosen[-1] == "large"
    else:
        assert chosen == ["cpu"] * 8 and room.tried <= 3


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", all_masks(4))
def test_samples_are_parts_of_their_launch(name):
    whole = LaunchMask.from_mask(all_masks(4)[name], 4, 2)
    allowed = reference.prepare(whole, NEEDED).allowed_HTS.expand(4, -1, -1)
    for at in (0.0, 0.6, 1.0):
        part = sample_launch(whole, 64, 48, 2, at)
        assert (part.rows, part.keys, part.heads, part.kv_heads) == (64, 48, 2, 1)
        seen = reference.prepare(part, NEEDED).allowed_HTS.expand(2, -1, -1)
        assert seen.any()
        # the block that the trial runs equals some block of the launch
        tiles = allowed[:2].unfold(1, 64, 1).unfold(2, 48, 1)
        assert (tiles == seen[:, None, None].transpose(-1, -2).transpose(-1, -2)).all(-1).all(-1).all(0).any()


def test_ranks_take_the_kernel_that_is_right_on_all_of_them_and_fastest_on_the_slowest():
    right, slower, wrong = Trial(0.0, 1.0), Trial(0.0, 2.0), Trial(1.0, 0.1, "wrong: 1.0e+00 from the reference")
    names = ["a", "b", "c"]
    assert rank_kernels([dict(a=slower, b=right, c=wrong)], names) == ["b", "a"]
    # on a second rank, b is slow and c is correct
    assert rank_kernels([dict(a=slower, b=right, c=wrong), dict(a=slower, b=Trial(0.0, 3.0), c=right)], names) == [
        "a",
        "b",
    ]
    # no rank had a launch to try
    assert rank_kernels([{}, {}], names) == []
    with pytest.raises(DistattnError, match=r"no kernel can be used here \(a: wrong: 1.0e\+00 from the reference\)"):
        rank_kernels([dict(a=wrong)], ["a"])


@pytest.fixture
def candidates(monkeypatch, tmp_path):
    """Register two correct kernels for the CPU, of which "tardy" is slow, and a wrong kernel."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # use a fake clock, since a busy machine may delay either kernel
    now = [0.0]

    def slow(*args):
        now[0] += 1.0
        return cpu.forward(*args)

    monkeypatch.setattr(trials, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    planted("tardy", monkeypatch, forward=slow)
    planted("wrong", monkeypatch, **WRONG["wrong gradient"])
    monkeypatch.setitem(registry.CANDIDATES, "cpu", ("wrong", "tardy", "cpu"))
    return tmp_path / "distattn" / "kernels.json"


def plan_for(ranks, mask="documents"):
    return da.make_plan(masks()[mask], layouts(LENGTHS, ranks)["zigzag"], strategy="ring", **SHAPE)


def test_the_fastest_right_kernel_is_taken_and_kept(candidates, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, "distattn"):
        assert da.prepare(plan_for(1)).key.kernel == "cpu"
    log = caplog.text
    assert "trying kernel tardy" in log and "kernel wrong is not used on CPU | driver unknown | torch" in log
    ((key, kept),) = json.loads(candidates.read_text()).items()
    assert "float64 4:2 8/8" in key and kept["wrong"]["fault"].startswith("wrong: ") and not kept["tardy"]["fault"]
    # the next process finds the stored results
    monkeypatch.setattr(trials, "run_trial", None)
    assert da.prepare(plan_for(1), kernel="auto").key.kernel == "cpu"
    # naming a kernel disables the choice
    assert da.prepare(plan_for(1), kernel="tardy").key.kernel == "tardy"


def test_a_cache_that_cannot_be_read_is_no_cache(candidates):
    candidates.parent.mkdir()
    for content in ("{", "[]"):
        candidates.write_text(content)
        assert trial_cache.all_trials() == {}
    assert da.prepare(plan_for(1)).key.kernel == "cpu"
    assert len(trial_cache.all_trials()) == 1


def chosen_run(rank, driver):
    """Return the kernel that this rank has chosen, and its error. On rank 1 the fastest kernel computes wrong
    gradients.
    """
    if rank == 1:
        sys.modules["distattn.kernels.cpu"].backward = wrong_gradient_of(cpu.backward)
    inputs = random_inputs(sum(LENGTHS), 4, 2, 8)
    layout = layouts(LENGTHS, 2)["zigzag"]
    q, k, v = (layout.shard(x, rank) for x in inputs[:3])
    if driver:
        with da.ContextParallel(strategy="ring", layout="zigzag") as cp:
            batch = cp.shard(
                {"input_ids": torch.zeros(1, sum(LENGTHS), dtype=torch.int64), "document_lengths": list(LENGTHS)}
            )
            o = batch["context_parallel"].attention(q, k, v)
            (executable,) = batch["context_parallel"]._executables.values()
    else:
        executable = da.prepare(plan_for(2))
        o = da.attention(q, k, v, executable)
    wanted = layout.shard(dense(masks()["documents"], inputs).o, rank)
    return executable.key.kernel, float((o - wanted).abs().max())


def wrong_gradient_of(right):
    def backward(*args):
        dq, dk, dv = right(*args)
        return dq, dk, dv * 1.5

    return backward


@pytest.mark.parametrize("driver", [False, True], ids=["prepare", "driver"])
def test_all_ranks_choose_alike(candidates, driver, monkeypatch, tmp_path):
    for name, difference in run_on_ranks(2, on_its_own_machine, driver, str(tmp_path)):
        assert name == "tardy" and difference < 1e-12


def on_its_own_machine(rank, driver, folder):
    import os

    os.environ["XDG_CACHE_HOME"] = f"{folder}/{rank}"
    return chosen_run(rank, driver)


def test_what_calls_add_to_scores_and_how_masks_climb_is_known_when_kernels_are_chosen():
    call = plan_for(1).call
    assert kernel_requirements(call, CPU).least_step == 0
    assert kernel_requirements(call, CPU, ("softcap",)).softcap and not kernel_requirements(call, CPU).alibi
    staircase = Mask.block_causal_documents(LENGTHS, 24)
    plan = da.make_plan(staircase, layouts(LENGTHS, 1)["contiguous"], strategy="ring", **SHAPE)
    assert kernel_requirements(plan.call, CPU).least_step == 24
