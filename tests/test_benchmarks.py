"""Checks that the benchmarks run, and that their harness verifies results before it times them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import check_recurrences
import findings
import harness
import pytest
import recall_by_ratio
import torch
from gpu_programs import run_program
from waiting import LIMIT_SECONDS

from distattn.ir.op import OPS
from distattn.kernels.recurrence import chunked
from distattn.kernels.recurrence.trial import RecurrenceInputs
from distattn.kernels.spec import KernelRequirements

ROOT = Path(__file__).parents[1]


def contestants():
    def unsupported():
        raise harness.Unsupported("no such mask")

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB\nmore lines")

    def late():
        calls = iter(range(3))

        def run():
            if next(calls) == 2:
                raise RuntimeError("fell over")
            return 42

        return run

    def counted():
        def run():
            TOTALS["bytes"] += 7
            return 42

        run.facts = {"planned": 7}
        return run

    return {
        "right": counted,
        "wrong": lambda: lambda: 41,
        "unsupported": unsupported,
        "hungry": out_of_memory,
        "late": late,
    }


TOTALS = {"bytes": 0}


@pytest.fixture
def cells():
    check = lambda result: "" if result == 42 else f"{result} is not 42"  # noqa: E731
    return harness.compare("a case", contestants(), check, repeats=4, count=lambda: dict(TOTALS))


def test_only_correct_results_are_timed_and_everything_is_reported(cells):
    by_name = {cell.contestant: cell for cell in cells}
    right = by_name["right"]
    assert right.status == "ok" and len(right.seconds) == 4 and right.median > 0
    assert right.facts == {"bytes": 7, "planned": 7}
    assert (by_name["wrong"].status, by_name["wrong"].note) == ("wrong", "41 is not 42")
    assert (by_name["unsupported"].status, by_name["unsupported"].note) == ("unsupported", "no such mask")
    assert by_name["hungry"].status == "out of memory" and "\n" not in by_name["hungry"].note
    assert (by_name["late"].status, by_name["late"].note) == ("error", "RuntimeError: fell over")
    assert not any(by_name[name].seconds for name in ("wrong", "unsupported", "hungry"))


def test_records_and_tables_hold_every_cell(cells, tmp_path):
    harness.write(tmp_path / "out" / "cells.jsonl", cells)
    rows = [json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").read_text().splitlines()]
    assert [row["contestant"] for row in rows] == list(contestants())
    assert all(row["versions"]["torch"] and row["command"] and row["date"] for row in rows)
    text = harness.table(cells, {"bytes": lambda size: f"{size} B"})
    assert "<- fastest" in text and "wrong: 41 is not 42" in text and "7 B" in text


DATA = ["--documents", "3000", "--context", "2048"]
SHORT_STEPS = ["--data.tokens_per_step=1024", "--data.max_document_tokens=900"]


@pytest.mark.full
@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("script", "arguments", "wanted"),
    [
        ("planning.py", ["--tokens", "20000", "--documents", "20", "--ranks", "4"], ["balanced", "double_ring", "usp"]),
        ("pack_planning.py", ["--documents", "3000"], ["plan, level", "first-fit", "utilisation"]),
        (
            "data_loading.py",
            [*DATA, "--packs", "4", "--repeats", "2", "--only", "distattn, a rank's part", "distattn, no digests"],
            ["resumed at step", "(1.0x)", "no digests"],
        ),
        ("data_packers.py", ["--documents", "500"], ["distattn plan", "utilisation", "0.000%"]),
        (
            "data_ranks.py",
            [*DATA, "--open-documents", "20000", "--processes", "2", "--ranks", "16", "--micro-batches", "2"],
            ["all together", "2 processes at once", "simulated: 16 ranks"],
        ),
        ("host_time.py", ["--tokens", "256", "--ranks", "4"], ["us_per_step", "double_ring"]),
        ("glue.py", ["--tokens", "4096", "--ranks", "4"], ["8 documents: attention", "ulysses", "to one peer"]),
        ("adapter_overhead.py", ["--repeats", "1", "--tokens", "256"], ["transformers beyond the operators", "aim 2%"]),
        (
            "tokenize_throughput.py",
            ["--megabytes", "0.5", "--vocabulary", "500", "--repeats", "1"],
            ["distattn, 2 processes"],
        ),
        ("indexed_reading.py", ["--megabytes", "2", "--documents", "50", "--repeats", "1"], ["with digests", "cold, "]),
        ("model_memory.py", ["--ranks", "2", "--hidden", "128", "--layers", "2"], ["initial", "exported", "loaded"]),
        ("checkpoint_faults.py", ["--count", "24", "--kills", "2"], ["2 kills", "passed over", "edited manifest"]),
        ("checkpoint_stall.py", ["--megabytes", "4", "--repeats", "1"], ["ours, overlap", "dcp async", "stall/save"]),
        ("recurrence.py", ["--tokens", "256", "--ranks", "2", "--repeats", "1"], ["fla's way", "<- fastest"]),
        (
            "hybrid_layers.py",
            ["--tokens", "16384", "--clusters", "h100-1x2", "h100-8x8"],
            ["(1.00x)", "refused", "estimated"],
        ),
        (
            "hybrid_layers.py",
            ["--latent", "--tokens", "16384", "--clusters", "h100-1x2"],
            ["ulysses", "expanded", "estimated"],
        ),
        (
            "hybrid_layers.py",
            ["--choices", "--tokens", "4096", "--clusters", "h100-1x2", "--documents", "3"],
            ["document_zigzag", "scan", "re-laid"],
        ),
        (
            "supervision_rivals.py",
            ["--only", "distattn", "torchrun", "--faults", "SIGKILL", "--repeats", "1", "--limit", "2"],
            ["| distattn | SIGKILL |", "| torchrun | SIGKILL |"],
        ),
        (
            "cluster_restarts.py",
            ["--on", "local", "--repeats", "1", "--patience", "20", *SHORT_STEPS],
            ["| local | SIGKILL |", "| local | SIGSTOP |", "imports of a new process"],
        ),
        ("rivals.py", ["--tokens", "256", "--ranks", "2", "--repeats", "1"], ["torch ring loop", "<- fastest"]),
    ],
)
def test_the_benchmarks_run(script, arguments, wanted):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in wanted), done.stdout
    assert "wrong" not in done.stdout and "error" not in done.stdout, done.stdout


@pytest.mark.full
def test_the_gpu_benchmark_runs_without_one():
    done = run_program("benchmarks/gpu.py")
    assert done.returncode == 0 and "ours wrong or failing in 0" in done.stdout, (
        done.stdout[-500:] + done.stderr[-1500:]
    )
    # contestants that need a GPU say so in their table cells
    assert "sdpa cudnn" in done.stdout and "no build of FlashAttention 3" in done.stdout


@pytest.mark.full
def test_the_gpu_checks_run_without_one():
    done = run_program("benchmarks/gpu_checks.py")
    assert done.returncode == 0 and "guards whole" in done.stdout, done.stdout + done.stderr[-1500:]
    assert "gluon (32, 32) softcap alibi: left out" in done.stdout


@pytest.mark.full
def test_kernels_of_recurrences_are_checked_and_timed_without_a_gpu():
    done = run_program("benchmarks/gpu_recurrence.py", "--tokens", "65")
    assert done.returncode == 0, done.stdout + done.stderr[-1500:]
    assert "kernel chunked, kda: right" in done.stdout and "kernel fla, ssd: left out" in done.stdout
    assert "ssd, 65 tokens, 2 heads: gradients' state pass" in done.stdout


@pytest.mark.full
def test_all_ranks_in_lock_step_with_late_copies_equal_one_shot():
    done = run_program("benchmarks/gpu_executor.py", "--ranks", "3")
    assert done.returncode == 0 and "usp" in done.stdout, done.stdout + done.stderr[-1500:]


@pytest.mark.full
def test_the_cluster_check_runs_over_gloo_with_the_triton_kernel():
    done = run_program("benchmarks/check_cluster.py", ranks=2)
    assert done.returncode == 0 and "2 ranks, gloo" in done.stdout, done.stdout + done.stderr[-1500:]
    assert "wrong" not in done.stdout and "error" not in done.stdout


@pytest.mark.full
def test_recurrent_layers_are_right_on_every_rank_over_gloo(tmp_path):
    out = tmp_path / "found.jsonl"
    done = run_program("benchmarks/check_recurrences.py", "--findings", str(out), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr[-1500:]
    assert "fla-core's own context parallelism: left out: it " in done.stdout
    rows = findings.read(out)
    checks = [row for row in rows if row["kind"] == "check"]
    # seven ops with one document and with nine documents, each in five variants over ranks and on one device
    assert len(checks) == 7 * 2 * 6 and not any(row["text"] for row in checks) and rows[-1]["kind"] == "ended"


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_ranks_that_are_as_wrong_as_one_device_are_wrong(dtype, most):
    lengths = (300, 20)
    needed = KernelRequirements(dtype, 16, 16, torch.device("cpu"), op=OPS["gated_delta_rule"])
    inputs = RecurrenceInputs.random(lengths, 2, 2, needed)
    inputs = inputs._replace(state=torch.zeros_like(inputs.state), dstate=torch.zeros_like(inputs.dstate))
    mine, exact = check_recurrences.computed(chunked, inputs), check_recurrences.in_fp64(inputs)
    tokens = torch.arange(sum(lengths))
    right = check_recurrences.Case(needed.op.name, lengths, inputs, exact, lambda: (tokens, *mine), mine)
    assert right.check((tokens, *mine)) == ""
    for off in (2 * most, float("nan")):
        o = mine[0].clone()
        o[250, 1, 3] += off * exact[0].abs().max()
        wrong = (o, *mine[1:])
        assert "o of one device is off by" in right._replace(of_one_device=wrong).check((tokens, *wrong))


@pytest.mark.full
def test_what_hybrids_recall_is_a_table_and_a_figure_of_all_runs(tmp_path):
    learned, other = recall_by_ratio.Setting(6, 7), recall_by_ratio.Setting(-1, 7)
    row = recall_by_ratio.trained(learned, 1, 2)
    assert len(row["recall"]) == 2 and max(row["recall"]) < 0.2 and row["cpu_seconds"] > 0
    rows = [row | dict(seed=seed, recall=[0.0, 0.5, 0.95]) for seed in (0, 1)]
    rows.append(row | other._asdict() | dict(seed=1, recall=[0.03, 0.03, 0.04], cpu_seconds=2.0))
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert recall_by_ratio.kept(tmp_path / "runs.jsonl", 2) == rows
    assert recall_by_ratio.kept(tmp_path / "runs.jsonl", 3) == recall_by_ratio.kept(tmp_path / "none", 2) == []
    text = recall_by_ratio.table(rows)
    assert "| 6 recurrent : 1 attention | 7 | 0.950 | 0.950 | 3, 3 |" in text
    assert "| recurrent alone | 7 |  | 0.040 | - | 2 |" in text
    recall_by_ratio.draw(rows, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_disaggregation_is_compared_with_its_rivals(tmp_path):
    lengths, out = tmp_path / "lengths.json", tmp_path / "rows.jsonl"
    lengths.write_text(json.dumps([64, 500, 900, 3000, 16000]))
    benchmark = [sys.executable, ROOT / "benchmarks/disaggregation.py", "--lengths", lengths, "--servers", "4"]
    for inner in ("causal", "shared_question"):
        sized = ["--context", "16384", "--batches", "1", "--inner", inner, "--out", out]
        subprocess.run(
            [*benchmark, *sized], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=LIMIT_SECONDS
        )
    rows = {(row["inner"], row["contestant"]): row for row in map(json.loads, out.read_text().splitlines())}
    assert len(rows) == 12
    ours, greedy, plain = (rows["causal", name] for name in ("cad 0.02", "cad_greedy 0.10", "plain"))
    assert plain["GB"] == 0 and ours["GB"] < greedy["GB"] and ours["cost"] < 1.05 < plain["cost"]
    assert ours["forward ms"] < plain["forward ms"]


@pytest.mark.parametrize(
    ("arrivals", "dots", "products", "serialized"),
    # a loop unrolled four times, the same loop with a wait around each instruction, and a loop that is not unrolled
    [(9, 3, 96, False), (96, 3, 96, True), (4, 2, 16, False), (16, 2, 16, True)],
)
def test_products_of_an_unrolled_loop_are_not_taken_for_products_that_wait_for_each_other(
    arrivals, dots, products, serialized
):
    pytest.importorskip("triton", reason="Triton is not installed")
    from compile_lint import is_serialized

    assert is_serialized(arrivals, dots, products) == serialized
