"""Checks that every example trains, with the same losses on any number of ranks."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run_script_on_ranks
from waiting import LIMIT_SECONDS

pytestmark = pytest.mark.sampled(8)

EXAMPLES = Path(__file__).parents[1] / "examples"


def losses(ranks: int, example: str, *arguments: str) -> list[float]:
    before = "megatron_on_cpu" if example == "megatron_gpt" else None
    if "float64" in arguments:
        before = "norms_in_float64"
    outputs = run_script_on_ranks(ranks, EXAMPLES / f"{example}.py", *arguments, before=before)
    # the example must not print warnings on which a user cannot act
    assert example != "deepspeed_zero" or "Warning" not in outputs[0], outputs[0]
    return [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)", outputs[0], re.M)]


# core-attention disaggregation: ranks with different packs share attention
SHARED = ["--data", "per_rank"]
RUNS = {
    # (example, its arguments for one process, [(ranks, additional arguments)], tolerance). The first example is meant
    # for newcomers
    "own_model": ("own_model", [], [(2, []), (4, []), (2, SHARED)], 1e-4),
    "fsdp2 in float64": (
        "fsdp2",
        ["--dtype", "float64"],
        [(2, []), (4, ["--replicas", "2"]), (4, SHARED)],
        # losses are printed with twelve decimals
        1e-11,
    ),
    "hf_trainer": ("hf_trainer", [], [(2, []), (4, [])], 1e-4),
    "hf_trainer, shared": ("hf_trainer", [], [(2, SHARED), (4, SHARED)], 1e-4),
    # transformers logs losses in fp32
    "hf_trainer in float64": ("hf_trainer", ["--dtype", "float64"], [(2, [])], 3e-7),
    "deepspeed_zero": (
        "deepspeed_zero",
        ["--stage", "1"],
        [(2, ["--stage", "3"]), (4, ["--stage", "2"]), (2, [*SHARED, "--stage", "3"]), (4, SHARED)],
        1e-4,
    ),
    "megatron_gpt": (
        "megatron_gpt",
        [],
        [
            (4, []),
            (4, ["--tp", "2"]),
            (4, ["--pp", "2"]),
            (2, SHARED),
            (4, [*SHARED, "--tp", "2"]),
        ],
        1e-4,
    ),
}
ADAPTERS = {"deepspeed_zero": "deepspeed", "megatron_gpt": "megatron", "hf_trainer": "hf_trainer"}
NEEDS = {"deepspeed_zero": "deepspeed", "megatron_gpt": "megatron.core", "hf_trainer": "accelerate"}


@pytest.mark.full
@pytest.mark.parametrize("run", RUNS)
def test_losses_are_those_of_one_process_over_20_steps(run):
    example, arguments, others, tolerance = RUNS[run]
    if example in NEEDS:
        pytest.importorskip(NEEDS[example], reason=f"{NEEDS[example]} is not installed")
    # import the adapter once here, before the ranks are forked
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    importlib.import_module(f"distattn.adapters.{ADAPTERS.get(example, 'pytorch')}")
    wanted = losses(1, example, *arguments)
    assert len(wanted) == 20 and wanted[-1] < wanted[0] - 1
    for ranks, further in others:
        got = losses(ranks, example, *arguments, *further)
        assert max(abs(a - b) / b for a, b in zip(got, wanted, strict=True)) <= tolerance, (ranks, further)


@pytest.mark.full
def test_a_hybrid_has_one_curve_on_any_number_of_ranks():
    importlib.import_module("distattn.adapters.pytorch")
    wanted, *others = (losses(ranks, "recall", "--steps", "10") for ranks in (1, 2, 4))
    assert len(wanted) == 10 and wanted[-1] < wanted[0] - 0.05
    for got in others:
        assert max(abs(a - b) / b for a, b in zip(got, wanted, strict=True)) <= 1e-4


@pytest.mark.full
def test_examples_are_short_and_start_with_torchrun():
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text().splitlines()) <= 60, file
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "fsdp2.py"), "--steps", "2"],
        cwd=EXAMPLES.parent,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^step 2 loss \d", done.stdout, re.M)


@pytest.mark.full
def test_megatrons_example_says_that_it_wants_gpus():
    pytest.importorskip("megatron.core")
    if torch.cuda.is_available():
        pytest.skip("there are GPUs")
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    how = dict(env={**os.environ, **alone}, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    done = subprocess.run([sys.executable, str(EXAMPLES / "megatron_gpt.py")], **how)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "megatron_gpt.py: Megatron-core needs GPUs, and this machine has no GPU" in done.stderr
