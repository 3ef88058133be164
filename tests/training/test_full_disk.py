"""A full or read-only disk ends no run. The run reports it once, and saves again when there is room."""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from tiny_runs import new_run, tiny_config
from waiting import eventually

from distattn.checkpoints.checkpoint_folder import list_checkpoints, newest_good
from distattn.checkpoints.owner import Owner
from distattn.training.config.run_file import Config, TrainConfig
from distattn.training.config.sections import CheckpointConfig, EvaluationConfig
from distattn.training.engines.fsdp2 import Fsdp2Engine
from distattn.training.loop import train
from distattn.training.reporting.step_documents import documents_of_step
from distattn.training.run_data import find_text, write_text
from distattn.training.run_folder import EVALUATION, RunFolder

STEPS = 10
DISK_BYTES = 8 << 20
DISK_FILES = 1000


@pytest.fixture
def disk(tmp_path):
    """Create and mount a small file system. Return its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},nr_inodes={DISK_FILES}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def config_of(texts: Path, folder: Path) -> Config:
    return tiny_config(
        texts,
        folder,
        data=dict(context_length=128),
        model=dict(num_layers=1, num_attention_heads=2, num_key_value_heads=1),
        train=TrainConfig(steps=STEPS, histogram_every=2),
        checkpoint=CheckpointConfig(every_steps=2),
        evaluation=EvaluationConfig(every_steps=3, steps=1),
    )


def fill(disk: Path) -> None:
    with open(disk / "ballast", "wb", buffering=0) as ballast, suppress(OSError):
        while ballast.write(bytes(1 << 16)):
            pass


def fill_with_files(disk: Path) -> None:
    """Fill the disk until no byte, file or folder fits."""
    fill(disk)
    (many := disk / "many").mkdir()
    with suppress(OSError):
        for number in range(DISK_FILES):
            (many / str(number)).touch()


def warned_of(step: int, messages: Path) -> None:
    """Wait until the save of a step, which overlaps with training, has failed."""
    eventually(lambda: f"step-{step:08d}" in messages.read_text(), messages.read_text)


def mounted(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def _train(rank: int, folder: Path, config: Config, messages: Path, events: dict) -> None:
    """Train. events: changes to the disk, by the number of updates before each. messages: the file for rank 0's
    warnings.
    """
    if rank == 0:
        os.dup2(os.open(messages, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    update, updates = Fsdp2Engine.update, []

    def updated(self, rate):
        update(self, rate)
        updates.append(rate)
        if len(updates) in events:
            dist.barrier()
            if rank == 0:
                events[len(updates)]()
            dist.barrier()

    Fsdp2Engine.update = updated
    train(RunFolder(folder), config, True, torch.device("cpu"))


def trained(config: Config, messages: Path, events: dict, checkpoints: Path | None = None) -> RunFolder:
    run = RunFolder.create(config)
    if checkpoints is not None:
        run.checkpoints.symlink_to(checkpoints)
    write_text(run, config, find_text(config))
    run_on_ranks(2, _train, run.folder, config, messages, events)
    return run


def rows(run: RunFolder) -> list[tuple[int, float, float]]:
    return [(step.step, step.loss, step.grad_norm) for step in run.metrics()]


@pytest.mark.full
def test_a_disk_that_is_full_or_cannot_be_written_for_a_while_ends_no_run(texts, disk, tmp_path):
    plain = trained(config_of(texts, tmp_path / "plain"), tmp_path / "said-0", {})
    # the whole run is on the disk, which is full from before the first save until after the third
    full = {1: lambda: fill(disk), 7: lambda: (warned_of(6, tmp_path / "said-1"), (disk / "ballast").unlink())}
    run = trained(config_of(texts, disk / "run"), tmp_path / "said-1", full)
    assert [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints)] == [8, 10]
    assert newest_good(run.checkpoints) == run.checkpoints / "step-00000010"
    # nothing recorded in the meantime is lost
    assert rows(run) == rows(plain) and len(rows(run)) == STEPS
    assert run.losses(EVALUATION) == plain.losses(EVALUATION)
    for step in range(STEPS):
        assert documents_of_step(run.documents_file, step)
    lines = (tmp_path / "said-1").read_text().splitlines()
    ours = [line for line in lines if line.startswith("distattn: ")]
    assert all("No space left on device" in line for line in ours)
    for name in ("metrics.jsonl", "tensorboard", "step-00000002", "step-00000004", "step-00000006"):
        assert sum(name in line for line in ours) == 1, lines
    # only the checkpoints are on the disk, which is read-only from before the first save until after the second
    shutil.rmtree(run.folder)
    read_only = {1: lambda: mounted(disk, "ro"), 5: lambda: (warned_of(4, tmp_path / "said-2"), mounted(disk, "rw"))}
    run = trained(config_of(texts, tmp_path / "run"), tmp_path / "said-2", read_only, disk)
    assert [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints)] == [6, 8, 10]
    assert rows(run) == rows(plain)
    lines = (tmp_path / "said-2").read_text().splitlines()
    assert len(lines) == 2 and all("was not saved" in line and "Read-only file system" in line for line in lines), lines


@pytest.mark.full
def test_a_restart_survives_a_full_disk(texts, disk, tmp_path):
    config, messages = config_of(texts, disk / "run"), tmp_path / "said"
    run = new_run(config)
    run_on_ranks(2, _train, run.folder, replace(config, train=replace(config.train, steps=4)), tmp_path / "said-0", {})
    # the state after a kill of rank 0, whose file names a process that no longer exists
    dead = replace(Owner.of_this_process(), pid=2**22 + 1)
    dead.write(run.folder / "owner.json")
    fill_with_files(disk)
    room = {2: lambda: (shutil.rmtree(disk / "many"), (disk / "ballast").unlink())}
    run_on_ranks(2, _train, run.folder, config, messages, room)
    assert [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints)] == [6, 8, 10]
    assert [step.step for step in run.metrics()] == list(range(1, STEPS + 1))
    lines = [line for line in messages.read_text().splitlines() if line.startswith("distattn: ")]
    assert "Traceback" not in messages.read_text()
    assert all("No space left on device" in line for line in lines) and any("owner.json" in line for line in lines), (
        lines
    )


def test_a_run_whose_folder_is_renamed_is_saved_there_and_ends(texts, tmp_path):
    place, moved = tmp_path / "run", tmp_path / "moved"

    def rename():
        # another run starts under the old name
        place.rename(moved)
        place.mkdir()

    with pytest.raises(
        AssertionError, match=rf"run: was renamed to {moved} meanwhile; the run was saved there after step 5"
    ) as ended:
        trained(config_of(texts, place), tmp_path / "said", {4: rename})
    # several ranks report the same sentence, which is printed once
    assert (
        str(ended.value).count("DistattnError: ") == str(ended.value).count(f"was renamed to {moved} meanwhile; ") > 1
    )
    assert list(place.iterdir()) == []
    run = RunFolder(moved)
    assert newest_good(run.checkpoints) == run.checkpoints / "step-00000005"
    assert [step.step for step in run.metrics()] == [1, 2, 3, 4, 5]
    for step in range(5):
        assert documents_of_step(run.documents_file, step)
    assert run.events()[-1]["kind"] == "stopped"


def test_a_run_whose_folder_is_deleted_ends_and_does_not_recreate_part_of_it(texts, tmp_path):
    place = tmp_path / "run"
    with pytest.raises(
        AssertionError, match="was deleted meanwhile, or moved elsewhere; the run ends after step 4, which is not"
    ):
        trained(config_of(texts, place), tmp_path / "said", {3: lambda: shutil.rmtree(place)})
    assert not place.exists()
    assert (tmp_path / "said").read_text() == ""
