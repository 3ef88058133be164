"""Updates that destroy the weights: good checkpoints stay, rollbacks go back far enough, and a refused streak is
reported once.
"""

import dataclasses
import errno
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run_on_ranks
from tiny_runs import new_run, tiny_config

from distattn.checkpoints import checkpoints
from distattn.checkpoints.checkpoint_folder import by_preference, choose_step, list_checkpoints
from distattn.checkpoints.manifest import Manifest
from distattn.checkpoints.verdicts import GOOD, REFUSED, SET_ASIDE, UNTESTED, CheckpointVerdict
from distattn.ir.errors import RunStopped
from distattn.launch import finish_run as finishing
from distattn.launch.run_status import status
from distattn.training.config.run_file import Config, RunConfig, TrainConfig
from distattn.training.config.sections import CheckpointConfig, WatchConfig
from distattn.training.engines.fsdp2 import Fsdp2Engine
from distattn.training.loop import train
from distattn.training.run_checkpoints import RunCheckpoints
from distattn.training.run_folder import EVALUATION, RunFolder, StepMetrics
from distattn.training.watch.numerics_watch import ROLLBACK, Streak, Verdict

STEPS = 12


@pytest.fixture
def config(texts, tmp_path) -> Config:
    return tiny_config(
        texts,
        tmp_path / "run",
        data=dict(tokens_per_step=128, context_length=128),
        model=dict(num_layers=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24),
        ranks=1,
        train=TrainConfig(steps=STEPS),
        checkpoint=CheckpointConfig(every_steps=1, keep_last=2),
    )


def _train(rank: int, folder: Path, config: Config, ruined: tuple[int, ...] = (), factor: float = float("nan")) -> None:
    """Train. ruined: the updates, counted from 1 across rollbacks, that multiply the weights by `factor`."""
    update, done = Fsdp2Engine.update, []

    def ruin(self, rate):
        update(self, rate)
        done.append(rate)
        if len(done) in ruined:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(factor)

    Fsdp2Engine.update = ruin
    train(RunFolder(folder), config, True, torch.device("cpu"))


def trained(config: Config, *fault, run: RunFolder | None = None) -> RunFolder:
    if run is None:
        run = new_run(config)
    run_on_ranks(1, _train, run.folder, config, *fault)
    return run


def verdicts(run: RunFolder) -> dict[int, str]:
    return {checkpoint.step: checkpoint.verdict.kind for checkpoint in list_checkpoints(run.checkpoints)}


def test_a_destroyed_run_keeps_its_good_checkpoints_and_continues_from_them(config, capsys, monkeypatch):
    # a different test covers the report page
    monkeypatch.setattr(finishing, "write_report", lambda *args: None)
    finish_run = finishing.finish_run
    run = trained(config, (6,))
    # the sixth update destroyed the weights, which were saved before any step could reveal it. After that, only the
    # final checkpoint was saved
    assert verdicts(run) == {5: GOOD, 6: REFUSED, STEPS: REFUSED}
    checkpoints = {checkpoint.step: checkpoint for checkpoint in list_checkpoints(run.checkpoints)}
    assert "step 7, computed from it, was refused: the loss is nan" in checkpoints[6].verdict.text
    assert "saved after refused steps, from 7 on" in checkpoints[STEPS].verdict.text and checkpoints[5].verdict.kept
    assert checkpoints[STEPS].manifest.facts["loss"] == "nan" and float(checkpoints[5].manifest.facts["loss"]) < 7
    # the first refused step is examined and reported, and then the entire streak
    refused = [event["text"] for event in run.events() if event["kind"] == "refused"]
    assert len(refused) == 2 and refused[0].startswith("the loss is nan. In a second run: ")
    assert "the update of step 6 made weight model.embed_tokens.weight of rank 0 infinite or NaN" in refused[0]
    assert refused[1] == "The run ends with refused steps: 6 steps in a row were refused, 7 to 12."
    assert [path.name for path in (run.folder / "evidence").iterdir()] == ["step-6"]
    # a run whose last loss is NaN ends with an error
    assert finish_run(run, config, lambda line: None, json_lines=True) == 1
    printed = capsys.readouterr().err
    assert "the loss of the last step, 12, is nan: steps from 7 on were refused" in printed
    assert f"distattn resume {run.folder} --step 5 continues" in printed
    # a resumed run loads the newest good checkpoint
    trained(config, run=run)
    assert [event["text"] for event in run.events() if event["kind"] == "resumed"] == ["Resumed from step-00000005."]
    steps = run.metrics()
    assert not any(step.skipped for step in steps) and len(steps) == STEPS and steps[-1].loss < steps[0].loss
    # the run has passed the step for which the older checkpoint was kept
    assert verdicts(run) == {STEPS - 1: GOOD, STEPS: UNTESTED}
    assert finish_run(run, config, lambda line: None, json_lines=True) == 0


def test_steps_that_a_run_with_fewer_steps_has_abandoned_are_not_reported(config, capsys, monkeypatch):
    reported = []
    monkeypatch.setattr(finishing, "write_report", lambda *args: None)
    # imitate `distattn resume --step 1 --train.steps 2` on a run of four steps, the last of which were destroyed
    config = dataclasses.replace(config, train=TrainConfig(steps=2))
    run = RunFolder.create(config)
    for step, loss in ((1, 3.0), (2, 2.5), (3, math.nan), (4, math.nan), (2, 2.0)):
        run.append(run.metrics_file, StepMetrics(step, loss, 1.0, 1, 1.0).as_dict())
        run.append(run.losses_file, {"step": step, "split": EVALUATION, "loss": loss})
    assert finishing.finish_run(run, config, reported.append, json_lines=True) == 0
    assert json.loads(capsys.readouterr().out)["last_loss"] == 2.0
    assert reported[0] == "loss 3.000 to 2.000 in 2 steps"
    assert [row["step"] for row in run.losses(EVALUATION, 2)] == [1, 2]
    assert status(run)["steps"] == 2


def test_a_rollback_goes_further_back_where_the_first_step_is_bad_again(config, tmp_path):
    config = dataclasses.replace(config, watch=WatchConfig(action="rollback"))
    run = trained(config, (6,))
    resumed = [event["text"] for event in run.events() if event["kind"] == "resumed"]
    assert resumed == ["Resumed from step-00000006.", "Resumed from step-00000005."]
    other = trained(dataclasses.replace(config, run=RunConfig(folder=str(tmp_path / "other"), seed=3)))
    losses = [[(step.step, step.loss, step.skipped) for step in run_.metrics()] for run_ in (run, other)]
    assert losses[0] == losses[1] and not any(skipped for *_, skipped in losses[0])
    # no checkpoint is kept for the refused step any more, because the run has passed it
    assert verdicts(run) == {STEPS - 1: GOOD, STEPS: UNTESTED}


def test_a_new_level_is_taken_as_usual_but_the_checkpoint_from_before_stays(config):
    steps, watch = STEPS + 6, WatchConfig(spike_window=8, spike_threshold=5.0)
    config = dataclasses.replace(config, watch=watch, train=TrainConfig(steps=steps))
    run = trained(config, (8,), 10.0)
    refused = [step.step for step in run.metrics() if step.skipped]
    assert refused and refused[0] == 9 and refused[-1] < steps - 2
    events = [event["text"] for event in run.events() if event["kind"] == "refused"]
    assert events[0].startswith("the loss is ") and "have become usual" in events[1]
    # there are two later checkpoints, and the checkpoint before the new level is kept permanently
    newest = by_preference(list_checkpoints(run.checkpoints))
    assert [checkpoint.step for checkpoint in newest[:2]] == [steps, steps - 1]
    assert [checkpoint.step for checkpoint in newest if checkpoint.verdict.kept] == [7]


def _train_and_fail_to_save(rank: int, folder: Path, config: Config, failing: int) -> None:
    """Train. The save after step `failing` fails as on a full disk."""
    new_unfinished = checkpoints.new_unfinished

    def refuse(place, step):
        if step == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return new_unfinished(place, step)

    checkpoints.new_unfinished = refuse
    train(RunFolder(folder), config, True, torch.device("cpu"))


def test_a_run_does_not_take_an_older_checkpoint_of_its_last_step_for_its_own(config):
    config = dataclasses.replace(
        config, train=TrainConfig(steps=3), checkpoint=CheckpointConfig(every_steps=1, keep_last=9)
    )
    run = trained(config)
    with choose_step(run.checkpoints, 1):
        pass
    before = verdicts(run)
    with pytest.raises(AssertionError, match="last step's checkpoint could not be saved; .* trains from step 2 on"):
        run_on_ranks(1, _train_and_fail_to_save, run.folder, config, 3)
    assert before[3] == SET_ASIDE and verdicts(run)[3] == SET_ASIDE


def _train_until_stopped(rank: int, runs: list[RunFolder], config: Config) -> list[str]:
    """Train `runs`. Update n of run n destroys its weights and asks it to stop. Return the runs' messages."""
    update, messages = Fsdp2Engine.update, []
    for ruined, run in enumerate(runs, 1):
        done = []

        def ruin(self, rate, ruined=ruined, run=run, done=done):
            update(self, rate)
            done.append(rate)
            if len(done) == ruined:
                run.ask_to_stop("test")
                with torch.no_grad():
                    for parameter in self.model.parameters():
                        parameter.mul_(math.nan)

        Fsdp2Engine.update = ruin
        with pytest.raises(RunStopped) as stopped:
            train(run, config, True, torch.device("cpu"))
        messages.append(str(stopped.value))
    # the first run continues from bad weights
    with pytest.raises(RunStopped):
        train(runs[0], config, True, torch.device("cpu"))
    return messages


def test_a_run_stopped_amid_refused_steps_says_where_it_will_continue(config, capfd):
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=1, keep_last=9))
    runs = [new_run(config) for _ in range(2)]
    ((first, second),) = run_on_ranks(1, _train_until_stopped, runs, config)
    # if all checkpoints are in doubt, the newest is loaded, with a message
    assert verdicts(runs[0]) == {1: REFUSED, 2: REFUSED, 3: REFUSED}
    assert first.startswith("stopped after step 2,") and first.endswith("distattn resume goes on from there.")
    doubt = "refused: it was saved after refused steps, from 2 on: the loss is nan"
    (resumed,) = [event["text"] for event in runs[0].events() if event["kind"] == "resumed"]
    assert resumed == f"Resumed from step-00000002; it is in doubt ({doubt})."
    assert (
        f"Resuming from step-00000002 anyway: it is in doubt, but no other can be loaded ({doubt})."
        in capfd.readouterr().err
    )
    assert verdicts(runs[1]) == {1: GOOD, 2: REFUSED, 3: REFUSED}
    assert second.startswith("stopped after step 3,") and second.endswith("distattn resume goes on from step 1.")


def _train_with_a_bad_step(rank: int, run: RunFolder, config: Config, bad: int, stops: bool, flips: bool) -> str:
    """Train. The loss of step `bad`, counted from 1, is NaN once. Return the message if the run is asked to stop then.

    flips: flip a bit of the state in the following step.
    """
    backward, update, updates, steps = Fsdp2Engine.backward, Fsdp2Engine.update, [], []

    def spoil(self, *args):
        losses = backward(self, *args)
        steps.append(None)
        # flip a bit in the step after the bad step. The watch computes the bad step twice, so this is call bad + 2
        if flips and len(steps) == bad + 2:
            weight = next(part for kind, _, part in self.state_tensors() if kind == "weight")
            weight.view(torch.uint8).view(-1)[0] ^= 1
        return [losses[0] * math.nan] if len(steps) == bad else losses

    def ask(self, rate):
        update(self, rate)
        updates.append(None)
        if stops and len(updates) == bad - 1:
            run.ask_to_stop("test")

    Fsdp2Engine.backward, Fsdp2Engine.update = spoil, ask
    if not stops:
        train(run, config, True, torch.device("cpu"))
        return ""
    with pytest.raises(RunStopped) as stopped:
        train(run, config, True, torch.device("cpu"))
    return str(stopped.value)


def with_a_bad_step(config: Config, folder: Path, bad: int, stops: bool = False, flips: bool = False):
    run = new_run(dataclasses.replace(config, run=RunConfig(folder=str(folder), seed=3)))
    (message,) = run_on_ranks(1, _train_with_a_bad_step, run, config, bad, stops, flips)
    return run, message


def losses_of(run: RunFolder) -> list[tuple]:
    return [(step.step, str(step.loss), step.skipped) for step in run.metrics()]


def test_a_stop_amid_one_refused_step_loses_nothing(config, tmp_path):
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=4))
    run, message = with_a_bad_step(config, tmp_path / "stopped", 6, stops=True)
    assert message.startswith("stopped after step 6,") and message.endswith("distattn resume goes on from there.")
    assert verdicts(run) == {4: GOOD, 6: UNTESTED}
    run.forget_requests()
    trained(config, run=run)
    assert [event["text"] for event in run.events() if event["kind"] == "resumed"] == ["Resumed from step-00000006."]
    whole, _ = with_a_bad_step(config, tmp_path / "whole", 6)
    assert losses_of(run) == losses_of(whole) and [step for step, _, skipped in losses_of(run) if skipped] == [6]
    # no later step could test the last checkpoint
    run, _ = with_a_bad_step(config, tmp_path / "last", STEPS)
    assert verdicts(run) == {4: GOOD, 8: GOOD, STEPS: REFUSED}
    # one refused step does not discredit the checkpoint it was computed from
    run, message = with_a_bad_step(config, tmp_path / "saved before", 5, stops=True)
    assert message.endswith("distattn resume goes on from there.") and verdicts(run) == {4: UNTESTED, 5: UNTESTED}


def test_a_checkpoint_whose_state_was_whole_after_the_save_outlives_damage(config, tmp_path):
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=4))
    run, _ = with_a_bad_step(config, tmp_path / "flipped", 5, flips=True)
    events = [(event["kind"], event["text"]) for event in run.events() if event["kind"] in ("damaged state", "resumed")]
    assert [kind for kind, _ in events] == ["damaged state", "resumed"]
    assert "between the update of step 4 and the update of step 6" in events[0][1]
    # the state was compared in step 5, after the copy
    assert events[1][1] == "Resumed from step-00000004."
    assert losses_of(run) == losses_of(trained(config))


def test_a_checkpoint_that_a_step_refuses_is_not_kept_as_the_newest_good_one(tmp_path):
    for step in (4, 8):
        checkpoint = tmp_path / f"step-{step:08d}"
        checkpoint.mkdir()
        Manifest(step, step, "2026-11-25T12:00:00+00:00", 1, "2.13.0", {}, []).write(checkpoint)
        CheckpointVerdict(GOOD).write(checkpoint)
    keeper = object.__new__(RunCheckpoints)
    keeper.config = SimpleNamespace(watch=SimpleNamespace(action=ROLLBACK))
    keeper.checkpoints = SimpleNamespace(note=lambda change, step=None: change(tmp_path))
    # a rollback has loaded the checkpoint of step 8, from which training had continued well
    keeper._saved_step, keeper._loaded = 8, SimpleNamespace(step=8)
    keeper.judge_refused(Verdict(8, ROLLBACK, "the loss rose.", Streak(8, 8, 1, "the loss rose.", {})))
    older, newer = (checkpoint.verdict for checkpoint in list_checkpoints(tmp_path))
    assert (newer.kind, newer.kept) == (REFUSED, "") and older.kind == GOOD and older.kept


def _train_and_count(rank: int, run: RunFolder, config: Config) -> list[int]:
    """Train. Return the number of steps that `status` counts during each step's forward pass."""
    backward, counted = Fsdp2Engine.backward, []

    def count(self, *args):
        counted.append(status(run)["steps"])
        return backward(self, *args)

    Fsdp2Engine.backward = count
    train(run, config, True, torch.device("cpu"))
    return counted


def test_status_counts_from_the_checkpoint_that_a_run_continues_from(config):
    config = dataclasses.replace(
        config, train=TrainConfig(steps=4), checkpoint=CheckpointConfig(every_steps=1, keep_last=9)
    )
    run = trained(config)
    with choose_step(run.checkpoints, 1):
        pass
    assert status(run)["steps"] == 4
    assert run_on_ranks(1, _train_and_count, run, config) == [[1, 2, 3]]
    assert status(run)["steps"] == 4
