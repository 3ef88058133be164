"""A launcher's proposal is applied once, by rank 0, or not at all."""

import pytest

from distattn.checkpoints.checkpoint_folder import list_checkpoints, preferred_step
from distattn.checkpoints.manifest import Manifest
from distattn.checkpoints.verdicts import GOOD, SET_ASIDE, UNTESTED, CheckpointVerdict
from distattn.ir.errors import DistattnError
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config, RunConfig, TrainConfig
from distattn.training.proposal import Proposal
from distattn.training.rank import on_rank
from distattn.training.run_folder import RunFolder


@pytest.fixture
def run(tmp_path):
    """Create a run with checkpoints of three steps without files."""
    new_run = RunFolder.create(with_rate(tmp_path, 1e-3))
    for serial, step in enumerate((10, 20, 30), 1):
        folder = new_run.checkpoints / f"step-{step:08d}"
        folder.mkdir(parents=True)
        Manifest(serial, step, "2026-01-01T00:00:00+00:00", 1, "2.13.0", {}, []).write(folder)
    CheckpointVerdict(GOOD).write(new_run.checkpoints / "step-00000030")
    return new_run


def with_rate(tmp_path, rate, steps=40):
    return Config(run=RunConfig(folder=str(tmp_path / "run")), train=TrainConfig(learning_rate=rate, steps=steps))


def kinds(run):
    return [checkpoint.verdict.kind for checkpoint in list_checkpoints(run.checkpoints)]


def test_a_proposal_is_applied_once(run, tmp_path):
    config, proposal = with_rate(tmp_path, 1e-4), Proposal(run, "ours")
    proposal.write(config, 10)
    assert proposal.load() == config and proposal.step() == 10
    with proposal.applied(config):
        assert preferred_step(run.checkpoints) == 10
    assert kinds(run) == [UNTESTED, SET_ASIDE, SET_ASIDE]
    # restarted ranks read the run's configuration and continue from their newest checkpoint
    CheckpointVerdict(GOOD).write(run.checkpoints / "step-00000020")
    assert proposal.load() == config and proposal.step() is None
    with proposal.applied(config):
        assert preferred_step(run.checkpoints) == 20
    proposal.remove()
    assert not run.proposals()


def test_a_proposal_refused_while_a_checkpoint_is_loaded_changes_nothing(run, tmp_path):
    config, proposal = with_rate(tmp_path, 1e-4), Proposal(run, "ours")
    proposal.write(config, 10)
    before = {file: file.read_bytes() for file in run.folder.rglob("*") if file.is_file()}
    with pytest.raises(DistattnError, match="refused"), proposal.applied(config):
        assert kinds(run) == [UNTESTED, SET_ASIDE, SET_ASIDE]
        raise DistattnError("refused")
    assert {file: file.read_bytes() for file in run.folder.rglob("*") if file.is_file()} == before


def test_a_configuration_that_was_changed_meanwhile_is_not_overwritten(run, tmp_path):
    config, proposal = with_rate(tmp_path, 1e-4), Proposal(run, "ours")
    proposal.write(config, None)
    run.accept_config(with_rate(tmp_path, 1e-3, steps=60), 30)
    with pytest.raises(DistattnError, match="another command changed it"), proposal.applied(config):
        pass
    assert configuration.load(run.config_file).train.steps == 60


def test_a_rank_refuses_a_proposal_that_is_gone(run, monkeypatch, capsys):
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert on_rank(str(run.folder), lambda *_: 0, "ours") == DistattnError.exit_code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "config.proposed-ours.toml: the proposed configuration is gone" in lines[0]


def test_all_earlier_configurations_are_kept(run, tmp_path):
    rates = (1e-4, 1e-5, 1e-6)
    for rate in rates:
        for _ in range(2):
            run.accept_config(with_rate(tmp_path, rate), 30)
    kept = [run.folder / f"config.until-30{number}.toml" for number in ("", "-2", "-3")]
    assert [configuration.load(file).train.learning_rate for file in kept] == [1e-3, *rates[:2]]
    assert len(list(run.folder.glob("config.until-*"))) == 3
