"""fla-core's kernels compute every task of a recurrence and are chosen by trial. If they are missing, that is reported."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_once import made_once
from recurrences import RECURRENT
from waiting import LIMIT_SECONDS

import distattn as da
from distattn.ir.op import OPS
from distattn.kernels import registry, trial_cache, trials
from distattn.kernels.recurrence import chunked
from distattn.kernels.spec import KernelRequirements
from distattn.kernels.trials import rank_kernels
from distattn.ops import kernel_choice

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv" / "fla-core"
NEEDED = KernelRequirements(torch.float32, 16, 16, torch.device("cpu"), op=OPS["ssd"])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the results of a process that runs fla-core's kernels in Triton's interpreter."""
    if not FOLDER.exists():
        pytest.skip("fla-core is not installed next to the environment; run `make fla`")
    return json.loads((made_once(tmp_path_factory, "fla", interpret) / "found.json").read_text())


def interpret(folder: Path) -> None:
    script = ROOT / "tests" / "support" / "gpus" / "fla_in_interpreter.py"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{script.parent}:{script.parents[1]}"}
    command = [sys.executable, str(script), str(FOLDER), *RECURRENT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr
    (folder / "found.json").write_text(done.stdout.splitlines()[-1])


@pytest.mark.full
def test_outputs_states_and_gradients_are_those_of_the_chunked_kernel(results):
    assert list(results["differences"]) == sorted(RECURRENT, key=lambda name: name == "delta_rule")
    for name, difference in results["differences"].items():
        # allow for a few roundings in half precision
        assert difference < (3e-3 if name == "delta_rule" else 2e-5), name


@pytest.mark.full
def test_states_travel_over_ranks(results):
    assert not results["ranks"]


@pytest.mark.full
def test_convolutions_are_those_of_the_taps(results):
    assert all(difference < 1e-6 for difference in results["convolutions"].values()), results["convolutions"]


@pytest.mark.full
def test_the_operator_runs_them(results):
    assert max(results["operator"].values()) < 3e-3, results["operator"]


@pytest.mark.full
def test_unsupported_calls_are_refused_by_name(results):
    reasons = results["refusals"]
    assert reasons["served"] == "" and "bfloat16 and float16, not float32" in reasons["fp32"]
    assert "multiples of 16 up to 256, not 24" in reasons["dim"] and "not 512" in reasons["wide"]
    assert reasons["filters"] == "" and "not of groups" in reasons["groups"] and "a shift has none" in reasons["shift"]


@pytest.mark.full
def test_its_own_context_parallelism_is_right_as_the_cluster_check_calls_it():
    if not FOLDER.exists():
        pytest.skip("fla-core is not installed next to the environment; run `make fla`")
    support = ROOT / "tests" / "support" / "gpus"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = f"{ROOT}:{support}:{support.parent}:{ROOT / 'benchmarks'}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    how = dict(env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    done = subprocess.run([*launcher, str(support / "fla_over_ranks.py"), str(FOLDER)], **how)
    assert done.returncode == 0, done.stderr[-3000:]
    right = {f"{op}, {layout}": "" for op in ("gated_delta_rule", "kda") for layout in ("contiguous", "zigzag")}
    assert json.loads(done.stdout.splitlines()[-1]) == [right, right]


def test_on_gpus_they_are_tried_before_the_chunked_kernel():
    gpu = torch.device("cuda", 0)
    assert registry.candidate_kernels(gpu, OPS["kda"]) == ("fla", "triton_chunked", "chunked")
    assert registry.candidate_kernels(torch.device("cpu"), OPS["kda"]) == ("chunked",)
    assert registry.candidate_kernels(gpu, OPS["convolution"]) == ("fla_conv1d", "taps")


@pytest.fixture
def as_on_gpus(monkeypatch, tmp_path):
    """Let the CPU choose kernels as a GPU does, without results stored by earlier processes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "candidate_kernels", lambda device, op: ("fla", "chunked"))
    monkeypatch.setattr(kernel_choice, "_TRIALS_OF_SHAPE", {})
    monkeypatch.setattr(kernel_choice, "_OUT_OF_MEMORY", {})
    kernel_choice._warn.cache_clear()


def plan_of(op):
    shape = dict(heads=2, kv_heads=1, head_dim=16, v_head_dim=16, dtype="float32", op=op)
    return da.make_plan(da.Mask.documents([40]), da.Layout.contiguous([40], 1), strategy="scan", **shape)


def test_without_the_package_the_chunked_kernel_is_used_by_name(as_on_gpus, caplog):
    with caplog.at_level(logging.WARNING, "distattn"):
        ready = da.prepare(plan_of("ssd"))
    assert ready.key.kernel == "chunked"
    assert 'kernel fla is not used on ssd on cpu: kernel "fla" needs fla' in caplog.text
    assert 'pip install "distattn[fla]"' in caplog.text
    with pytest.raises(da.DistattnError, match=r'kernel "fla" needs fla.*pip install "distattn\[fla\]"'):
        da.prepare(plan_of("ssd"), kernel="fla")


class WrongGradient:
    """The chunked kernel with a wrong gradient of the decays."""

    states, gradient_states, forward = chunked.states, chunked.gradient_states, chunked.forward
    unsupported_reason, prepare = chunked.unsupported_reason, chunked.prepare

    @staticmethod
    def backward(*args):
        dx, dstate = chunked.backward(*args)
        return dx._replace(g=dx.g * 1.1), dstate


def test_a_kernel_that_is_wrong_is_not_used_by_later_processes_either(as_on_gpus, monkeypatch):
    def tried_again():
        kernel_choice._TRIALS_OF_SHAPE.clear()
        return kernel_choice.local_kernel_trials(plan, 0, NEEDED._replace(op=plan.call.op))

    monkeypatch.setitem(sys.modules, "distattn.kernels.recurrence.fla", WrongGradient)
    plan = plan_of("gated_delta_rule")
    own_trials = tried_again()
    assert own_trials["fla"].fault.startswith("wrong") and not own_trials["chunked"].fault
    assert rank_kernels([own_trials], ("fla", "chunked")) == ["chunked"]
    ((key, kept),) = trial_cache.all_trials().items()
    assert kept == own_trials and "fla-core" in key and key.endswith("gated_delta_rule float32 2:1 16/16")
    monkeypatch.setattr(trials, "run_trial", lambda name, *args: trials.Trial(0.0, 1.0))
    assert tried_again() == own_trials
    # a different version of the package counts as a different kernel
    monkeypatch.setattr(trial_cache, "version", lambda package: "9")
    assert not tried_again()["fla"].fault
