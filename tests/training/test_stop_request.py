"""A run that is asked to stop saves after its step on all ranks, and continues from there bitwise."""

import dataclasses
from pathlib import Path

import pytest
import torch
from processes import run_on_ranks
from tiny_runs import new_run, tiny_config

from distattn.ir.errors import RunStopped
from distattn.training.config.run_file import Config, RunConfig, TrainConfig
from distattn.training.loop import train
from distattn.training.run_folder import RunFolder


def _train(rank: int, folder: Path, whole: Path, config: Config) -> None:
    run = RunFolder(folder)
    with pytest.raises(RunStopped, match=r"stopped after step 1, asked by a file in "):
        train(run, config, True, torch.device("cpu"))
    torch.distributed.barrier()
    if rank == 0:
        run.stop_file.unlink()
    torch.distributed.barrier()
    train(run, config, True, torch.device("cpu"))
    train(RunFolder(whole), config, True, torch.device("cpu"))


def test_all_ranks_stop_after_the_same_step_and_continue_bitwise(texts, tmp_path):
    config = tiny_config(
        texts,
        tmp_path / "stopped",
        data=dict(context_length=128),
        model=dict(num_layers=1, dtype="float64"),
        train=TrainConfig(steps=4),
    )
    runs = []
    for name in ("stopped", "whole"):
        named = dataclasses.replace(config, run=RunConfig(folder=str(tmp_path / name), seed=3))
        runs.append(new_run(named))
    stopped, whole = runs
    stopped.ask_to_stop("SIGUSR1")
    # the first request wins
    stopped.ask_to_stop("SIGTERM")
    assert stopped.stop_file.read_text() == "SIGUSR1\n"
    run_on_ranks(2, _train, stopped.folder, whole.folder, config)
    curves = [[(step.step, step.loss, step.grad_norm) for step in run.metrics()] for run in runs]
    assert curves[0] == curves[1] and len(curves[0]) == 4
    assert [event["kind"] for event in stopped.events()] == ["stopped", "resumed"]
    assert sorted(path.name for path in stopped.checkpoints.glob("step-*")) == ["step-00000001", "step-00000004"]
