"""A refused `distattn resume` leaves the run unchanged, and derived settings are derived again."""

import errno
import json
import os
import signal
from dataclasses import asdict, replace

import pytest

from distattn.checkpoints import run_lock
from distattn.checkpoints.checkpoint_folder import choose_step
from distattn.checkpoints.manifest import Manifest
from distattn.checkpoints.owner import writer_name
from distattn.checkpoints.run_lock import RunLock
from distattn.ir.errors import DistattnError
from distattn.launch import resume_command, run_locally
from distattn.launch.attempts import Attempts
from distattn.launch.command_line import no_progress
from distattn.launch.ranks import supervised
from distattn.launch.run_node import check_places
from distattn.launch.start_run import resume_run, start_run
from distattn.launch.stop_signals import CommandStopped
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import ReferenceCheckConfig, RunConfig, TrainConfig
from distattn.training.proposal import Proposal
from distattn.training.run_folder import StepMetrics


@pytest.fixture
def run(tmp_path):
    """Create a run of four ranks on one node, as `launch local --gpus 4` does, with a checkpoint of step 34 that
    contains no files.
    """
    overrides = ["--parallel.ranks=4", "--parallel.devices_per_node=4", "--train.steps=40", "--reference_check.steps=0"]
    (tmp_path / "text.py").write_text("Some text to train on. " * 2000)
    overrides += [f"--data.path={tmp_path}/text.py", "--data.tokens_per_step=256", "--data.max_document_tokens=100"]
    new_run = start_run(
        configuration.load("configs/tiny.toml", [*overrides, f"--run.folder={tmp_path}/run"]), no_progress
    )
    Manifest(1, 34, "2026-01-01T00:00:00+00:00", 4, "2.13.0", {}, []).write(folder_of(new_run, 34))
    return new_run


def folder_of(run, step):
    folder = run.checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True)
    return folder


def with_steps(run, steps):
    return configuration.load(run.config_file, [f"--train.steps={steps}"])


def content_of(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"}


@pytest.fixture
def ranks(monkeypatch):
    """Replace the ranks by a function that records the configuration they would read and returns exit code 2."""
    seen = []

    def run_ranks_and_finish(run, config, report_progress, json_lines, proposal):
        seen.append(proposal.load() if proposal.was_written else configuration.load(run.config_file))
        assert seen[-1] == config
        return 2

    monkeypatch.setattr(run_locally, "run_ranks_and_finish", run_ranks_and_finish)
    return seen


def test_fewer_steps_than_were_done_are_refused_before_ranks_start(run, ranks):
    before = content_of(run.folder)
    with pytest.raises(DistattnError) as refused:
        resume_command.main([str(run.folder), "--train.steps", "10"])
    assert str(refused.value) == f"train.steps: 10, but {run.folder} has a checkpoint of step 34: give 34 or more."
    assert content_of(run.folder) == before and not ranks


def test_a_run_without_a_step_left_starts_no_ranks_unless_its_report_or_comparison_is_missing(run, ranks, capsys):
    arguments = [str(run.folder), "--json"]
    config = replace(configuration.load(run.config_file), train=TrainConfig(steps=34))
    configuration.save(config, run.config_file)
    run.append(run.metrics_file, *(asdict(StepMetrics(step, 2.0, 1.0, 64, 0.5)) for step in (1, 34)))
    attempts = Attempts(run.attempts)
    attempts.end(attempts.begin(), 0, "ended well")
    assert resume_command.main(arguments) == 2 and len(ranks) == 1
    run.report_file.touch()
    before = content_of(run.folder)
    assert resume_command.main(arguments[:1]) == 0
    last_lines = f"all 34 steps are done; --train.steps N trains further\nreport: {run.report_file}\n"
    assert capsys.readouterr().out.endswith(last_lines)
    assert resume_command.main(arguments) == 0
    facts = {"run": str(run.folder), "first_loss": 2.0, "last_loss": 2.0, "reference_check": None}
    assert json.loads(capsys.readouterr().out) == facts | {"report": str(run.report_file)}
    assert len(ranks) == 1 and content_of(run.folder) == before
    # a reference check is configured, but has not been run or has failed
    configuration.save(replace(config, reference_check=ReferenceCheckConfig(steps=2)), run.config_file)
    assert resume_command.main(arguments) == 2 and len(ranks) == 2
    run.reference_check_file.write_text('{"passed"')
    assert resume_command.main(arguments) == 2 and len(ranks) == 3
    run.reference_check_file.write_text('{"passed": false}')
    assert resume_command.main(arguments) == 2 and len(ranks) == 4
    run.reference_check_file.write_text('{"passed": true}')
    assert resume_command.main(arguments) == 0 and len(ranks) == 4
    assert resume_command.main([*arguments, "--train.steps=40"]) == 2 and len(ranks) == 5


def test_what_ranks_refuse_does_not_change_the_run_s_configuration(run, ranks):
    before = content_of(run.folder)
    assert resume_command.main([str(run.folder), "--train.learning_rate=0.5"]) == 2
    assert ranks[0].train.learning_rate == 0.5
    after = content_of(run.folder)
    assert {file for file in before if before[file] != after.get(file)} == {run.secret_file}
    assert set(after) == set(before)


def test_a_second_resume_leaves_what_the_first_one_proposes(run, ranks):
    first = Proposal(run, "first")
    resume_run(run, with_steps(run, 60), no_progress, first)
    # the first resume's ranks have not taken the lock yet
    assert resume_command.main([str(run.folder)]) == 2 and ranks[0].train.steps == 40
    assert first.load().train.steps == 60
    with RunLock(run.folder), pytest.raises(DistattnError, match="belongs to process"):
        resume_command.main([str(run.folder), "--train.steps=80"])
    assert first.load().train.steps == 60 and run.proposals() == ["first"]


def test_a_resume_of_a_run_that_is_starting_is_refused_and_touches_nothing(run, monkeypatch, tmp_path):
    refused = []

    def begin_ranks(run, *args):
        # the ranks have not taken the lock yet
        before = content_of(run.folder)
        with pytest.raises(DistattnError, match=f"belongs to process {os.getpid()}"):
            resume_command.main([str(run.folder), "--train.steps=60"])
        assert content_of(run.folder) == before
        refused.append(run.folder)
        return 2

    monkeypatch.setattr(run_locally, "run_ranks_and_finish", begin_ranks)
    assert resume_command.main([str(run.folder)]) == 2
    new = replace(with_steps(run, 60), run=RunConfig(folder=str(tmp_path / "new")))
    assert run_locally.run_locally(new, json_lines=True) == 2
    assert refused == [run.folder, tmp_path / "new"]
    # the launcher has ended
    monkeypatch.setattr(run_locally, "run_ranks_and_finish", lambda *_: 2)
    assert resume_command.main([str(run.folder)]) == 2


def test_a_run_that_cannot_be_locked_leaves_no_folder(run, monkeypatch, tmp_path):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", lockf)
    new = replace(with_steps(run, 60), run=RunConfig(folder=str(tmp_path / "new")))
    with pytest.raises(DistattnError, match="new: cannot be locked: No locks available"):
        run_locally.run_locally(new, json_lines=True, logs=True)
    assert not (tmp_path / "new").exists()
    # a run that cannot report its progress leaves no folder either
    with pytest.raises(TypeError):
        start_run(new, None)
    assert not (tmp_path / "new").exists()


def test_a_signal_while_the_launcher_takes_its_lock_has_the_sentence_of_the_start(run, monkeypatch, tmp_path):
    def stop(*_):
        raise CommandStopped(signal.SIGTERM)

    # imitate a signal that arrives while the launcher waits for the lease of a launcher on another machine
    monkeypatch.setattr(run_locally, "RunLock", stop)
    with pytest.raises(CommandStopped, match="stopped by SIGTERM before training; the run is unchanged"):
        resume_command.main([str(run.folder)])
    new = replace(with_steps(run, 60), run=RunConfig(folder=str(tmp_path / "new")))
    with pytest.raises(CommandStopped, match="stopped by SIGTERM before training; nothing is left behind"):
        run_locally.run_locally(new, json_lines=True)
    assert not (tmp_path / "new").exists()


def test_what_a_killed_launcher_has_proposed_is_removed(run):
    dead = Proposal(run, f"{writer_name().partition('-')[0]}-{2**22 + 1}-1")
    resume_run(run, with_steps(run, 60), no_progress, dead)
    resume_run(run, configuration.load(run.config_file), no_progress, Proposal(run, "another"))
    assert run.proposals() == []


def test_a_step_that_is_asked_for_is_chosen_by_the_ranks(run, monkeypatch):
    monkeypatch.setattr(run_locally, "run_ranks_and_finish", lambda *_: 2)
    Manifest(2, 38, "2026-01-01T00:00:00+00:00", 4, "2.13.0", {}, []).write(folder_of(run, 38))
    before = content_of(run.folder)
    assert resume_command.main([str(run.folder), "--step=34"]) == 2
    after = content_of(run.folder)
    assert {file for file in before if before[file] != after.get(file)} == {run.secret_file}
    assert set(after) == set(before)


def test_a_resume_says_which_checkpoints_are_set_aside(run, monkeypatch, capsys):
    monkeypatch.setattr(run_locally, "run_ranks_and_finish", lambda *_: 2)
    for serial, step in ((2, 36), (3, 38)):
        Manifest(serial, step, "2026-01-01T00:00:00+00:00", 4, "2.13.0", {}, []).write(folder_of(run, step))
    # imitate the state left by a launcher that was killed while its ranks were loading
    with choose_step(run.checkpoints, 34):
        pass
    assert resume_command.main([str(run.folder)]) == 2
    assert capsys.readouterr().out == (
        f"run folder: {run.folder}, checkpoint of step 34; later ones are set aside: --step 38 continues from the last of them\n"
    )
    assert resume_command.main([str(run.folder), "--step=38"]) == 2
    assert capsys.readouterr().out == f"run folder: {run.folder}, checkpoint of step 38\n"
    # the run has continued from the chosen step
    Manifest(4, 35, "2026-01-01T00:00:00+00:00", 4, "2.13.0", {}, []).write(folder_of(run, 35))
    assert resume_command.main([str(run.folder)]) == 2
    assert capsys.readouterr().out == f"run folder: {run.folder}, checkpoint of step 35\n"


@pytest.mark.parametrize(
    ("arguments", "ranks_and_nodes"),
    [
        (["--parallel.ranks", "2"], (2, 0)),
        (["--parallel.ranks=2", "--parallel.devices-per-node=1"], (2, 1)),
        (["--train.learning_rate=0.5"], (4, 4)),
    ],
)
def test_ranks_of_a_node_are_derived_anew_where_a_resume_has_other_ranks(arguments, ranks_and_nodes, run, ranks):
    resume_command.main([str(run.folder), *arguments])
    assert (ranks[0].parallel.ranks, ranks[0].parallel.devices_per_node) == ranks_and_nodes


def test_progress_is_counted_from_the_checkpoint_that_ranks_go_on_from(run, monkeypatch):
    step = run.checkpoints / "step-00000020"
    step.mkdir()
    # this checkpoint was saved after that of step 34, because the run went back
    Manifest(2, 20, "2026-01-01T00:00:00+00:00", 4, "2.13.0", {}, []).write(step)
    counted = []
    monkeypatch.setattr(
        supervised,
        "run_supervised",
        lambda ranks, attempts, restarts, preload: counted.append(restarts.progress()) or 2,
    )
    assert run_locally.run_ranks_and_finish(run, configuration.load(run.config_file), no_progress, False) == 2
    assert counted == [20]


def test_a_node_refuses_a_job_of_another_size_than_the_run(run):
    config = configuration.load(run.config_file)
    check_places(run, config, nodes=1)
    with pytest.raises(DistattnError, match="the run has 4 ranks, 4 a node, but this job has 2 nodes"):
        check_places(run, config, nodes=2)
