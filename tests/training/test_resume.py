"""A run continues from its newest checkpoint as if uninterrupted: bitwise, or on other ranks, strategies and engines."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import run_on_ranks
from tiny_runs import new_run, tiny_config, train_on_rank
from waiting import LIMIT_SECONDS, eventually

from distattn.checkpoints.checkpoint_folder import list_checkpoints, preferred_step
from distattn.checkpoints.run_lock import RunLock
from distattn.ir.errors import DistattnError
from distattn.ir.text_format import plural
from distattn.launch.attempts import Attempts
from distattn.launch.command_line import no_progress
from distattn.launch.start_run import resume_run
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config, ParallelConfig, RunConfig, TrainConfig
from distattn.training.config.sections import (
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    MemoryConfig,
    WatchConfig,
)
from distattn.training.engines.fsdp2 import Fsdp2Engine
from distattn.training.loop import train
from distattn.training.proposal import Proposal
from distattn.training.reporting.json_lines import read_rows
from distattn.training.reporting.step_documents import documents_of_step
from distattn.training.run_data import open_data
from distattn.training.run_folder import EVALUATION, TRAINING, RunFolder

ROOT = Path(__file__).parents[2]
STEPS = 8


@pytest.fixture
def config(texts, tmp_path) -> Config:
    return tiny_config(
        texts,
        tmp_path / "run",
        data=dict(context_length=128),
        model=dict(dtype="float64"),
        train=TrainConfig(steps=STEPS, schedule="cosine", warmup_steps=2, z_loss=1e-4),
        checkpoint=CheckpointConfig(every_steps=3, keep_last=9),
    )


def _train_accepting(rank: int, folder: Path, config: Config) -> None:
    run = RunFolder(folder)
    train(run, config, True, torch.device("cpu"), proposal=Proposal(run, "ours"))


def trained(config: Config) -> RunFolder:
    run = new_run(config)
    run_on_ranks(config.parallel.ranks, train_on_rank, run.folder, config)
    return run


def resumed_at(run: RunFolder, step: int, config: Config, folder: Path) -> RunFolder:
    """Resume a copy of a run from the checkpoint of `step`, without the later checkpoints."""
    shutil.copytree(run.folder, folder)
    copy = RunFolder(folder)
    for checkpoint in copy.checkpoints.glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    run_on_ranks(config.parallel.ranks, train_on_rank, folder, config)
    return copy


def rows(run: RunFolder) -> list[tuple[int, float, float]]:
    return [(step.step, step.loss, step.grad_norm) for step in run.metrics()]


def files_of(run: RunFolder) -> dict[str, str]:
    """Return the digests of the last checkpoint's files."""
    manifest = json.loads((run.checkpoints / f"step-{STEPS:08d}" / "manifest.json").read_text())
    return {file["name"]: file["blocks"] for file in manifest["files"] if file["name"].endswith(".distcp")}


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(config, tmp_path):
    config = dataclasses.replace(config, evaluation=EvaluationConfig(every_steps=4, steps=1))
    run = trained(config)
    assert [path.name for path in sorted(run.checkpoints.glob("step-*"))] == [
        "step-00000003",
        "step-00000006",
        "step-00000008",
    ]
    for step in (3, 6):
        copy = resumed_at(run, step, config, tmp_path / f"again-{step}")
        assert rows(copy) == rows(run) and len(rows(run)) == STEPS
        # weights and averages are also the same, and so are the losses of all steps since the last evaluation
        assert files_of(copy) == files_of(run)
        for split in (TRAINING, EVALUATION):
            assert copy.losses(split) == run.losses(split) and [row["step"] for row in run.losses(split)] == [4, 8]


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    "changes",
    [
        dict(parallel=ParallelConfig(ranks=1)),
        dict(parallel=ParallelConfig(ranks=3, strategy="allgather", layout="zigzag")),
        dict(parallel=ParallelConfig(ranks=4, strategy="cad", data="per_rank", context_parallel_size=2)),
        dict(
            parallel=ParallelConfig(ranks=2, kernel="reference", strategy="ulysses"), engine=EngineConfig(shard_size=1)
        ),
        dict(
            memory=MemoryConfig(
                loss_tile_tokens=24,
                mlp_tile_tokens=16,
                activation_checkpointing="save_attention",
                offload=True,
                state_on_host=True,
            )
        ),
        dict(engine=EngineConfig(name="deepspeed", zero_stage=2), dtype="float32"),
    ],
    ids=["fewer ranks", "more ranks", "per rank", "whole copies", "memory", "deepspeed"],
)
def test_a_run_continues_with_other_ranks_strategies_and_engines(config, tmp_path, changes):
    config = dataclasses.replace(config, evaluation=EvaluationConfig(every_steps=8, steps=1))
    wanted, changes = trained(config), dict(changes)
    if dtype := changes.pop("dtype", ""):
        changes["model"] = dataclasses.replace(config.model, dtype=dtype)
    tolerance = (1e-5, 1e-4) if dtype else (1e-12, 1e-9)
    copy = resumed_at(wanted, 3, dataclasses.replace(config, **changes), tmp_path / "again")
    for (step, loss, norm), (other, other_loss, other_norm) in zip(rows(wanted), rows(copy), strict=True):
        assert step == other and loss == pytest.approx(other_loss, rel=tolerance[0])
        assert norm == pytest.approx(other_norm, rel=tolerance[1])
    event, before = copy.events()[-1], config.parallel.ranks
    ranks = changes.get("parallel", config.parallel).ranks
    assert (event["kind"], event["ranks"], event["saved_on"]) == ("resumed", ranks, before)
    assert (f", on {plural(ranks, 'rank')}; it was saved on {before}." in event["text"]) == (ranks != before)
    # three of the steps in this loss were trained before the resume
    (losses,), (other_losses,) = wanted.losses(TRAINING), copy.losses(TRAINING)
    assert losses["tokens"] == other_losses["tokens"]
    assert losses["loss"] == pytest.approx(other_losses["loss"], rel=tolerance[1])


@pytest.mark.full
def test_what_is_computed_less_often_or_logged_changes_no_number(config, tmp_path):
    """Compare a run with rollbacks, replays and histograms to a run without them."""
    plain = trained(config)
    more = dataclasses.replace(
        config,
        run=RunConfig(folder=str(tmp_path / "more"), seed=3),
        train=dataclasses.replace(config.train, histogram_every=2),
        watch=WatchConfig(action="rollback", replay_every=3),
    )
    assert rows(trained(more)) == rows(plain)


def test_replays_change_no_number_where_an_engine_reduces_gradients_once_a_step(config, tmp_path):
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype="float32"),
        engine=EngineConfig(name="deepspeed", zero_stage=2),
        train=dataclasses.replace(config.train, steps=4),
        checkpoint=CheckpointConfig(every_steps=-1),
    )
    checked = dataclasses.replace(
        config, run=RunConfig(str(tmp_path / "checked"), 3), watch=WatchConfig(replay_every=2)
    )
    assert rows(trained(checked)) == rows(trained(config))


def test_a_run_whose_last_checkpoint_cannot_be_saved_does_not_end_well(config):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    run = new_run(config)
    # put a file where the folder of checkpoints would be
    run.checkpoints.write_text("")
    with pytest.raises(AssertionError, match=r"could not be saved|cannot be"):
        run_on_ranks(2, train_on_rank, run.folder, config)


def test_held_out_documents_are_evaluated(config):
    config = dataclasses.replace(config, evaluation=EvaluationConfig(every_steps=4, steps=2))
    run = trained(config)
    loss_rows = read_rows(run.losses_file)
    assert [(row["step"], row["split"]) for row in loss_rows] == [
        (s, t) for s in (4, 8) for t in ("evaluation", "training")
    ]
    assert all(0 < row["loss"] < 7 and row["by_corpus"] and row["by_position"] for row in loss_rows)


def test_ranks_that_refuse_a_proposal_leave_all_checkpoints_as_they_were(config):
    config = dataclasses.replace(config, parallel=ParallelConfig(ranks=1))
    run = trained(config)
    proposal, verdicts = Proposal(run, "ours"), [checkpoint.verdict for checkpoint in list_checkpoints(run.checkpoints)]
    slower = dataclasses.replace(config, train=dataclasses.replace(config.train, learning_rate=1e-5))
    proposal.write(slower, 3)
    # the ranks refuse this configuration, whose seed differs, after they have read the checkpoint
    other = dataclasses.replace(slower, run=dataclasses.replace(config.run, seed=4))
    with pytest.raises(AssertionError, match="seed"):
        run_on_ranks(1, _train_accepting, run.folder, other)
    assert [
        checkpoint.verdict for checkpoint in list_checkpoints(run.checkpoints)
    ] == verdicts and proposal.file.exists()
    for begin in (3, STEPS):
        # the second time, ranks are restarted, and continue from their own checkpoint
        run_on_ranks(1, _train_accepting, run.folder, slower)
        assert run.events()[-1]["step"] == begin
    assert configuration.load(run.config_file) == slower and not proposal.file.exists()


@pytest.mark.full
def test_a_run_can_continue_for_longer_than_its_packs_were_planned(config):
    """Repeat the text for as many steps as needed. Steps that were already planned stay unchanged."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, schedule="constant"))
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3 * STEPS))
    run = trained(config)
    before, planned = rows(run), open_data(run, config).plan
    assert planned.steps == STEPS
    # ranks also refuse fewer steps than have been done, and the run's configuration stays unchanged
    fewer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    proposal = Proposal(run, "ours")
    proposal.write(fewer, None)
    with pytest.raises(
        AssertionError, match=rf"train\.steps: 2, but \S+ has a checkpoint of step {STEPS}: give {STEPS} or more"
    ):
        run_on_ranks(2, _train_accepting, run.folder, fewer)
    assert configuration.load(run.config_file).train.steps == STEPS and rows(run) == before
    resume_run(run, longer, no_progress, proposal)
    assert not (run.folder / "corpus.longer.packs").exists()
    # the run's own configuration changes only once the ranks have accepted it
    assert configuration.load(run.config_file).train.steps == STEPS
    run_on_ranks(2, _train_accepting, run.folder, proposal.load())
    assert configuration.load(run.config_file).train.steps == 3 * STEPS and not proposal.file.exists()
    assert configuration.load(run.folder / f"config.until-{STEPS}.toml").train.steps == STEPS
    assert len(rows(run)) == 3 * STEPS and rows(run)[:STEPS] == before
    assert open_data(run, longer).plan.order_digest == planned.order_digest
    assert documents_of_step(run.documents_file, 3 * STEPS - 1)


def _train_with_fault(rank: int, folder: Path, config: Config, bad_step: int) -> None:
    """Train. Rank 1's gradient is not finite in step `bad_step`, every time the step is computed."""
    backward, asked = Fsdp2Engine.backward, []

    def broken(self, batches, on_token_losses=None):
        asked.append(self)
        losses = backward(self, batches, on_token_losses)
        if rank == 1 and torch.initial_seed() == seed_of(config, bad_step, rank):
            next(iter(self.model.parameters())).grad.to_local().fill_(float("nan"))
        return losses

    Fsdp2Engine.backward = broken
    train(RunFolder(folder), config, True, torch.device("cpu"))


def seed_of(config: Config, step: int, rank: int) -> int:
    from distattn.data.packing.permutation import derived_key

    return derived_key(config.run.seed, step, rank)


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_step_that_is_not_finite_is_left_out(config, action):
    config = dataclasses.replace(config, watch=WatchConfig(action=action))
    run = new_run(config)
    run_on_ranks(2, _train_with_fault, run.folder, config, 4)
    steps = run.metrics()
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    assert [step.step for step in steps if step.skipped] == [5]
    assert all(step.loss < 7 for step in steps) and steps[-1].loss < steps[0].loss
    assert list((run.folder / "evidence").iterdir())


def test_a_run_stops_where_its_file_says_so_and_continues_later(config):
    config = dataclasses.replace(config, watch=WatchConfig(action="stop"))
    run = new_run(config)
    with pytest.raises(AssertionError, match="the gradient norm is nan"):
        run_on_ranks(2, _train_with_fault, run.folder, config, 4)
    assert len(run.metrics()) == 5 and run.metrics()[-1].skipped
    run_on_ranks(2, train_on_rank, run.folder, config)
    assert len(run.metrics()) == STEPS and not run.metrics()[-1].skipped


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "distattn.launch.cli", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def config_file(config, tmp_path) -> Path:
    file = tmp_path / "small.toml"
    configuration.save(dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=1, keep_last=2)), file)
    return file


@pytest.mark.full
def test_a_rank_that_is_killed_and_a_run_that_is_resumed_by_the_command(config, config_file, tmp_path):
    # train long enough that even on a busy machine the run is killed before it ends
    wanted = trained(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=60)))
    more = (str(config_file), f"--run.folder={tmp_path}/killed", "--supervision.max_restarts=0", "--train.steps=60")
    process = subprocess.Popen(
        command("train", *more), env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    run = RunFolder(tmp_path / "killed")
    eventually(lambda: preferred_step(run.checkpoints) > 1, "two checkpoints")
    beats = Attempts(run.attempts).beats()
    assert beats is not None
    os.kill(beats[1].pid, signal.SIGKILL)
    assert process.wait(LIMIT_SECONDS)
    done = subprocess.run(
        command("resume", str(run.folder)), env=environment(), capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert rows(run) == rows(wanted)
    assert not list(run.checkpoints.glob("*.tmp-*"))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--model.num_layers=3",), "model.num_layers: the run has 2, and resuming with 3 would make it another"),
        (("--run.seed=4",), "run.seed: the run has 3"),
        (
            ("--train.steps=99", "--evaluation.every_steps=2"),
            "train.steps: 99, but the last of the run's 8 planned steps are held out",
        ),
        (("--parallel.strategy=rign",), "parallel.strategy: there is no 'rign'"),
    ],
)
def test_a_resumed_run_cannot_become_another(config, arguments, sentence):
    run = new_run(config)
    before = run.config_file.read_bytes()
    done = subprocess.run(
        command("resume", str(run.folder), *arguments), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    assert run.config_file.read_bytes() == before


def test_folders_that_are_not_runs_are_refused(tmp_path):
    done = subprocess.run(command("resume", str(tmp_path)), env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "this is not a run folder" in done.stderr


def test_a_second_job_on_a_folder_is_refused_and_names_the_owner(config):
    run = new_run(config)
    with RunLock(run.folder), pytest.raises(AssertionError, match=rf"process {os.getpid()}|pid {os.getpid()}"):
        run_on_ranks(2, train_on_rank, run.folder, config)
    assert not run.metrics_file.exists()


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler here")
def test_compiled_layers_have_the_same_curve(config):
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=2),
        model=dataclasses.replace(config.model, num_layers=1),
        parallel=ParallelConfig(ranks=1),
    )
    plain, compiled = new_run(config), new_run(dataclasses.replace(config, engine=EngineConfig(compile=True)))
    for run, engine in ((plain, EngineConfig()), (compiled, EngineConfig(compile=True))):
        run_on_ranks(1, train_on_rank, run.folder, dataclasses.replace(config, engine=engine))
    for (_, loss, norm), (_, other_loss, other_norm) in zip(rows(plain), rows(compiled), strict=True):
        # rotary embeddings are float32, and are rounded differently when compiled
        assert loss == pytest.approx(other_loss, rel=1e-8) and norm == pytest.approx(other_norm, rel=1e-6)


def test_other_data_under_a_resumed_run_are_refused(config):
    run = trained(config)
    shutil.rmtree(run.checkpoints / f"step-{STEPS:08d}")
    content = bytearray((run.folder / "corpus.packs").read_bytes())
    content[-40] ^= 1
    (run.folder / "corpus.packs").write_bytes(content)
    with pytest.raises((AssertionError, DistattnError), match=r"corpus\.packs"):
        run_on_ranks(2, train_on_rank, run.folder, config)
