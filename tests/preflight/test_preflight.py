"""The preflight on real ranks: a fault planted in a rank is reported before training, with its host and a remedy."""

import dataclasses
import itertools
import json
import os
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run_on_ranks, run_survivors

from distattn.ir.errors import LostRankError
from distattn.launch import cli
from distattn.launch.command_line import no_progress
from distattn.launch.start_run import start_run
from distattn.preflight import facts as facts_module
from distattn.preflight import probes
from distattn.preflight.preflight import check_run, preflight
from distattn.training import rank as rank_module
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config, DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from distattn.training.config.sections import PreflightConfig
from distattn.training.run_folder import RunFolder

CPU = torch.device("cpu")
RANKS, ODD = 4, 2
HOSTS = ("node-a", "node-a", "node-b", "node-b")


def config_of(texts: Path, folder: Path) -> Config:
    return Config(
        run=RunConfig(folder=str(folder), seed=3),
        data=DataConfig(path=str(texts), tokens_per_step=256, max_document_tokens=100),
        model=ModelConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
        ),
        parallel=ParallelConfig(ranks=RANKS, layout="document_zigzag", min_chunk=16),
        train=TrainConfig(steps=4),
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Create two folders of text: the ranks' data, and data that one rank reads by mistake."""
    folder = tmp_path_factory.mktemp("texts")
    for name, times in (("right", 3), ("wrong", 4)):
        (folder / name).mkdir()
        for number in range(8):
            (folder / name / f"{number}.py").write_text(f"number {number} of some text\n" * (times + number))
    return folder


@pytest.fixture(scope="module")
def runs(texts, tmp_path_factory) -> tuple[RunFolder, RunFolder, Config]:
    folder = tmp_path_factory.mktemp("runs")
    right, wrong = (config_of(texts / name, folder / name) for name in ("right", "wrong"))
    return start_run(right, no_progress), start_run(wrong, no_progress), right


def _plant(fault: str, runs, monkeypatch) -> tuple[RunFolder, Config]:
    """Make this rank faulty. Return its run and configuration."""
    right, wrong, config = runs
    if fault == "code":
        monkeypatch.setattr("distattn.preflight.preflight.code_digest", lambda: "0" * 16)
    elif fault == "package":
        version = facts_module.version
        monkeypatch.setattr(facts_module, "version", lambda name: "1.26.9" if name == "numpy" else version(name))
    elif fault == "configuration":
        return right, dataclasses.replace(config, train=TrainConfig(steps=4, learning_rate=0.5))
    elif fault == "data":
        return wrong, config
    elif fault == "plan of packs":
        resume_facts = facts_module.resume_facts
        monkeypatch.setattr(
            facts_module, "resume_facts", lambda *arguments: resume_facts(*arguments) | {"plan": "0" * 16}
        )
    elif fault == "attention plan":
        other = SimpleNamespace(load=lambda file: SimpleNamespace(digest="0" * 16))
        monkeypatch.setattr(facts_module, "Plan", other)
    elif fault == "no data":
        return RunFolder(right.folder / "nothing here"), config
    elif fault == "disk":
        full = SimpleNamespace(f_bavail=1, f_frsize=4096)
        monkeypatch.setattr(facts_module, "os", SimpleNamespace(**vars(os) | {"statvfs": lambda path: full}))
    elif fault == "memory":
        monkeypatch.setattr(facts_module, "available_bytes", lambda: 1000)
    elif fault == "slow":
        # each product and message appears to end a minute after its start
        minutes = SimpleNamespace(perf_counter=itertools.count(0, 60).__next__, monotonic=time.monotonic)
        monkeypatch.setattr(probes, "time", minutes)
    return right, config


def _preflights(rank: int, runs, faults) -> dict[str, tuple[list[str], list[str]]]:
    reports = {}
    for fault in faults:
        with pytest.MonkeyPatch.context() as monkeypatch:
            hosts = ["one-node"] * RANKS if fault == "slow" else HOSTS
            monkeypatch.setattr(facts_module.socket, "gethostname", lambda hosts=hosts: hosts[rank])
            run, config = _plant(fault if rank == ODD else "", runs, monkeypatch)
            report = preflight(run, config, CPU)
            reports[fault] = report.problems, report.warnings
    return reports


# each fault planted in a rank, with three parts of its message: the beginning, the fault and the remedy
PROBLEMS = {
    "code": ("rank 2 on node-b", "the code of distattn differs (digest 0000000000000000)", "install the same revision"),
    "package": ("rank 2 on node-b", "numpy is 1.26.9, on most ranks ", "install the same"),
    "configuration": ("rank 2 on node-b", "train.learning_rate is 0.5, on most ranks 0.003", "put the run folder"),
    "data": ("rank 2 on node-b", "the corpus text differs (digest ", "read the same files"),
    "plan of packs": (
        "rank 2 on node-b",
        "the plan of packs differs (digest 0000000000000000)",
        "read the same files",
    ),
    "attention plan": (
        "rank 2 on node-b",
        "the attention plan differs (digest 0000000000000000)",
        "read the same files",
    ),
    "no data": ("rank 2 on node-b", "nothing here", "No such file"),
    "disk": (
        "rank 2 on node-b",
        "the disk of the run folder has 4.1 kB free, its checkpoints need 382.8 kB",
        "make room",
    ),
    # both ranks share the host's memory
    "memory": (
        "ranks 2, 3 on node-b",
        "model and optimizer need 255.2 kB of the host's memory, of which 1.0 kB are free",
        "fewer ranks",
    ),
}
SLOW = {
    "product": ("rank 2 on one-node", "matrix products at ", "the median of all ranks is "),
    "links": ("rank 2 on one-node", "all its links inside the host are slow", "see what else runs there"),
}


def test_a_fault_planted_in_one_rank_is_named_with_its_host(runs):
    by_rank = run_on_ranks(RANKS, _preflights, runs, ("", *PROBLEMS, "slow"))
    # all ranks receive the same reports, so all of them stop
    assert all(reports == by_rank[0] for reports in by_rank)
    reports = by_rank[0]
    assert not reports[""][0]
    for fault, parts in PROBLEMS.items():
        problems, warnings = reports[fault]
        assert any(_has_parts(sentence, parts) for sentence in problems), (fault, problems)
        assert not warnings and "node-a" not in str(problems), fault
    problems, warnings = reports["slow"]
    assert not problems
    for device, parts in SLOW.items():
        assert any(_has_parts(sentence, parts) for sentence in warnings), (device, warnings)


def _has_parts(sentence: str, parts: tuple[str, ...]) -> bool:
    return sentence.startswith(parts[0]) and all(part in sentence for part in parts)


def _checks(rank: int, runs) -> dict[str, tuple[bool, list[str]]]:
    """Return whether a run starts, and the lines printed: with a problem under each action, and without a problem."""
    results = {}
    for action in ("stop", "warn", "off"):
        with pytest.MonkeyPatch.context() as monkeypatch:
            run, config = _plant("configuration" if rank == ODD else "", runs, monkeypatch)
            config = dataclasses.replace(config, preflight=PreflightConfig(action=action))
            lines: list[str] = []
            results[action] = check_run(run, config, CPU, lines.append), lines
    run, _, config = runs
    lines = []
    results["right"] = check_run(run, config, CPU, lines.append), lines
    return results


def test_a_run_stops_warns_or_skips_the_preflight_and_leaves_its_report(runs):
    by_rank = run_on_ranks(RANKS, _checks, runs)
    for rank, results in enumerate(by_rank):
        assert {name: begins for name, (begins, _) in results.items()} == {
            "stop": False,
            "warn": True,
            "off": True,
            "right": True,
        }
        assert [bool(lines) for _, lines in results.values()] == [False, False, False, rank == 0]
    table = by_rank[0]["right"][1]
    assert table[0].startswith("preflight: 4 ranks on 1 host in ") and "0, 1, 2, 3" in table[-2]
    written = json.loads(runs[0].preflight_file.read_text())
    assert written["problems"] == [] and [row["rank"] for row in written["ranks"]] == [0, 1, 2, 3]
    for row in written["ranks"]:
        assert row["tflops"] > 0 and sorted(link["peer"] for link in row["inside"]) == sorted(
            {0, 1, 2, 3} - {row["rank"]}
        )
        assert row["digests"]["attention plan"] and row["versions"]["torch"]


def _waits(rank: int, runs) -> str:
    run, _, config = runs
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(LostRankError) as lost:
        if rank == ODD:
            # imitate a file system that never answers
            monkeypatch.setattr(facts_module, "open_data", lambda run, config: time.sleep(3600))
        preflight(run, config, CPU, limit=timedelta(seconds=20))
    return str(lost.value)


def test_a_rank_that_does_not_answer_is_named_within_the_limit(runs):
    for error in run_survivors(RANKS, ODD, _waits, runs).values():
        assert "rank 2 did not take part in the preflight's comparison of code, configuration, data and memory" in error


def _trains(rank: int, runs) -> int:
    """Return the exit code of a rank after preflight has found a problem. The rank uses the existing process group."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("init_process_group", "destroy_process_group"):
            monkeypatch.setattr(rank_module.dist, name, lambda *backend: None)
        monkeypatch.setattr(rank_module, "job_store", dict)
        return rank_module.main(str(runs[1].folder), True, False, lambda run, config, device: False)


def test_a_run_that_may_not_begin_trains_nothing(runs):
    assert run_on_ranks(1, _trains, runs) == [2]
    assert not runs[1].metrics_file.exists() and not runs[1].checkpoints.exists()


def test_the_command_prints_a_run_s_report_and_leaves_nothing(texts, tmp_path, capfd):
    configuration.save(config_of(texts / "right", tmp_path / "out"), tmp_path / "run.toml")
    code = cli.main(["preflight", str(tmp_path / "run.toml"), "--parallel.ranks=1", "--json"])
    report = json.loads(capfd.readouterr().out)
    assert code == 0 and report["problems"] == [] and [row["rank"] for row in report["ranks"]] == [0]
    assert [file.name for file in tmp_path.iterdir()] == ["run.toml"]
