"""A schedule of context lengths: the packs of each phase, runs resumed in the middle of each phase, and its display."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import run_on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import new_run, tiny_config, train_on_rank

from distattn.ir.errors import DistattnError
from distattn.launch.command_line import no_progress
from distattn.launch.plan_command import main as plan_command
from distattn.launch.start_run import start_run
from distattn.training import loop
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config, TrainConfig
from distattn.training.config.sections import CheckpointConfig, ContextPhase
from distattn.training.loop import train
from distattn.training.reporting.report import _curves
from distattn.training.run_data import open_data, planned_packs
from distattn.training.run_folder import RunFolder

STEPS = 6
PHASES = (ContextPhase(64, 2), ContextPhase(128, 2), ContextPhase(256))
CONTEXTS = [64, 64, 128, 128, 256, 256]


@pytest.fixture
def config(texts, tmp_path) -> Config:
    return tiny_config(
        texts,
        tmp_path / "run",
        data=dict(max_document_tokens=200, context_schedule=PHASES),
        model=dict(num_layers=1),
        train=TrainConfig(steps=STEPS),
        checkpoint=CheckpointConfig(every_steps=1, keep_last=9),
    )


def _rows(run: RunFolder) -> list[tuple[int, int, float, float]]:
    return [(step.step, step.context_length, step.loss, step.grad_norm) for step in run.metrics()]


@pytest.mark.full
def test_a_run_continues_bitwise_from_the_middle_of_each_phase(config, tmp_path):
    run = new_run(config)
    plan = open_data(run, config).plan
    for step, context in enumerate(CONTEXTS):
        packs = plan.step(step).packs
        # short contexts cut documents, but every step has the same number of tokens
        assert all(sum(pack.lengths) <= context for pack in packs) and len(packs) == 256 // context
    assert any(max(pack.lengths) > 128 for pack in plan.step(STEPS - 1).packs)
    run_on_ranks(2, train_on_rank, run.folder, config)
    assert [context for _, context, _, _ in _rows(run)] == CONTEXTS
    for middle in (1, 3, 5):
        copy = RunFolder(shutil.copytree(run.folder, tmp_path / f"again-{middle}"))
        for checkpoint in copy.checkpoints.glob("step-*"):
            if int(checkpoint.name.removeprefix("step-")) > middle:
                shutil.rmtree(checkpoint)
        run_on_ranks(2, train_on_rank, copy.folder, config)
        assert _rows(copy) == _rows(run) and len(_rows(run)) == STEPS
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("context_length")] == list(enumerate(CONTEXTS, 1))
    assert _curves(run.metrics(), [], None)["labels"]["context_length"] == "context length"
    assert "context_length" not in _curves(run.metrics()[:2], [], None)["labels"]


def _told(rank: int, folder: Path, config: Config) -> list[tuple[int, float]]:
    """Return (step, seconds until its next heartbeat is due) for each step."""
    tell, limits = loop.set_activity, []

    def note(activity, **fields):
        if activity == "forward and backward":
            limits.append((fields["step"], fields["seconds"]))
        tell(activity, **fields)

    loop.set_activity = note
    train(RunFolder(folder), config, True, torch.device("cpu"))
    return limits


def test_the_first_step_of_a_phase_may_take_as_long_as_the_first_of_a_run(config):
    run = new_run(config)
    longer = config.supervision.starting_seconds
    wanted = [(0, 0), (1, 0), (2, longer), (3, 0), (4, longer), (5, 0)]
    assert run_on_ranks(2, _told, run.folder, config) == [wanted] * 2


def test_a_plan_shows_every_phase(config, tmp_path, capsys):
    file = tmp_path / "run.toml"
    configuration.save(config, file)
    assert configuration.load(file).data.context_schedule == PHASES
    options = [str(file), "--cluster", "laptop-1x2", "--strategy", "ring", "--parallel.devices_per_node", "2"]
    assert plan_command(options) == 0
    shown = capsys.readouterr().out
    for line in (
        "from step 1: context length 64",
        "from step 3: context length 128",
        "from step 5: context length 256",
    ):
        assert line in shown
    assert plan_command([*options, "--json"]) == 0
    phases = json.loads(capsys.readouterr().out)["phases"]
    assert [(phase["first_step"], phase["context_length"]) for phase in phases] == [(0, 64), (2, 128), (4, 256)]
    assert all(phase["candidates"][0]["strategy"] == "ring" for phase in phases)


def test_a_shorter_run_has_the_phases_that_it_reaches(config):
    shorter = dataclasses.replace(config, train=TrainConfig(steps=3))
    with planned_packs(config) as plan, planned_packs(shorter) as beginning:
        assert beginning.steps == 3
        for step in range(2):
            assert [pack.lengths for pack in beginning.step(step).packs] == [
                pack.lengths for pack in plan.step(step).packs
            ]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "steps = 3\ncontext_length = 96",
            "data.tokens_per_step: 256 is not a multiple of data.context_schedule.0.context_length 96",
        ),
        (
            "steps = 3\ncontext_length = 64",
            "data.context_schedule.0.steps: all phases have 3 steps, and train.steps is 8",
        ),
        (
            "context_length = 64\n[[data.context_schedule]]\ncontext_length = 256",
            "data.context_schedule.0.steps: only the last phase may have 0",
        ),
        ("steps = -1\ncontext_length = 256", "data.context_schedule.0.steps: at least 0, not -1"),
        (
            "context_length = 128",
            "data.max_document_tokens: 200 tokens do not fit into a pack of 128; at most data.context_schedule",
        ),
        ("context_length = 256\ncontext = 1", "data.context_schedule.0.context: unknown key"),
    ],
)
def test_an_impossible_schedule_is_refused_by_key_and_line(config, tmp_path, text, sentence):
    file = tmp_path / "run.toml"
    head = "[data]\ntokens_per_step = 256\nmax_document_tokens = 200\n[train]\nsteps = 8\n[parallel]\nranks = 2\n"
    file.write_text(f"{head}[[data.context_schedule]]\n{text}\n")
    with pytest.raises(DistattnError) as caught:
        configuration.load(file)
    assert sentence in str(caught.value), caught.value


def test_the_command_line_changes_no_schedule(config, tmp_path):
    configuration.save(config, tmp_path / "run.toml")
    with pytest.raises(DistattnError, match="data.context_schedule: its tables .* can only be set in the run file"):
        configuration.load(tmp_path / "run.toml", ["--data.context_schedule", "3"])


def test_packs_that_are_planned_already_have_no_other_schedule(config):
    planned = dataclasses.replace(config, data=dataclasses.replace(config.data, path="packs.toml", context_length=64))
    problems = [str(problem) for problem in configuration.problems_of(planned)]
    assert any(problem.startswith("data.context_schedule: packs are planned already") for problem in problems)
    assert any(
        problem.startswith("data.context_length: does nothing here: packs are planned already") for problem in problems
    )


def test_a_schedule_beside_a_context_length_is_refused(config):
    combined = dataclasses.replace(config, data=dataclasses.replace(config.data, context_length=64))
    (problem,) = configuration.problems_of(combined)
    assert str(problem).startswith("data.context_length: data.context_schedule has the context length by step")


def test_a_later_phase_that_cannot_be_planned_is_refused_before_ranks_start(config):
    parallel = dataclasses.replace(config.parallel, max_buffer_bytes=8_000)
    # the first phase alone can be planned
    start_run(dataclasses.replace(config, parallel=parallel, train=TrainConfig(steps=2)), no_progress)
    with pytest.raises(DistattnError, match="max_buffer_bytes"):
        start_run(dataclasses.replace(config, parallel=parallel), no_progress)
