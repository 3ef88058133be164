"""Attempts on several nodes: which failures lead to another attempt. Stand-ins replace the nodes."""

import shutil
import signal

import pytest

from distattn.checkpoints.checkpoint_folder import choose_step
from distattn.checkpoints.manifest import Manifest
from distattn.ir.errors import DistattnError
from distattn.launch.attempt_end import AttemptEnd
from distattn.launch.attempts import Attempts
from distattn.launch.node_attempts import NodeAttempts
from distattn.training.config.run_file import Config, RunConfig
from distattn.training.run_folder import RunFolder

KILLED, REFUSED = ("killed", 137), ("refused", 2)


class Nodes:
    """Two nodes. ends: (kind, exit code, steps done) of the second node's ranks in each attempt; later attempts
    succeed.
    """

    def __init__(self, run, *ends):
        self._run, self._ends, self.blamed, self.asked, self.report = run, list(ends), [], [], 0

    def choose(self):
        return ["a", "b"]

    def run(self, hosts, attempt):
        self.asked.append(self._run.stop_file.exists())
        if not self._ends:
            return AttemptEnd(0, {"a": 0, "b": 0})
        kind, code, steps = self._ends.pop(0)
        facts = {"why": f"rank 1 {kind}", "exit_code": code, "nodes": [1], "kind": kind, "steps": steps}
        Attempts(self._run.attempts).report_node(attempt, 1, facts)
        return AttemptEnd(code, {"b": code, "a": 4 if kind == "killed" else code})

    def finish(self, hosts):
        return self.report

    def blame(self, hosts, end):
        self.blamed += hosts

    def give_back(self):
        return ""

    def shortage(self):
        raise AssertionError


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(Config(run=RunConfig(folder=str(tmp_path / "run"))))


@pytest.mark.parametrize(
    ("ends", "code", "attempts", "blamed"),
    [
        ([(*REFUSED, 0)], 2, 1, []),
        # ranks may refuse what the previous attempt left behind, and no node is blamed for that
        ([(*KILLED, 5), (*REFUSED, 0)], 0, 3, ["b"]),
        ([(*KILLED, 5), (*REFUSED, 3)], 2, 2, ["b"]),
        ([(*KILLED, 5), *[(*REFUSED, 0)] * 3], 2, 4, ["b"]),
    ],
)
def test_ranks_that_refuse_before_the_first_step_of_a_later_attempt_are_tried_again(run, ends, code, attempts, blamed):
    nodes = Nodes(run, *ends)
    assert NodeAttempts(run, nodes, 3, {}).run().code == code
    assert len(Attempts(run.attempts).rows()) == attempts and nodes.blamed == blamed


def test_checkpoints_that_were_set_aside_do_not_count_as_progress(run, monkeypatch, capsys):
    def save(serial, step):
        checkpoint = run.checkpoints / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        Manifest(serial, step, "2026-01-01T00:00:00+00:00", 4, "2.13.0", {}, []).write(checkpoint)

    save(1, 20)
    save(2, 40)
    with choose_step(run.checkpoints, 20):
        pass
    nodes = Nodes(run, (*KILLED, 5), (*KILLED, 5))
    end_of_attempt = nodes.run

    def run_and_save(hosts, attempt):
        save(2 + attempt, 20 + 5 * attempt)
        return end_of_attempt(hosts, attempt)

    nodes.run = run_and_save
    assert NodeAttempts(run, nodes, 1, {}).run().code == 0
    printed = capsys.readouterr().err
    assert [f"start again from step {step} (restart 1 of 1)" in printed for step in (25, 30)] == [True, True]


def test_a_signal_that_comes_before_the_first_attempt_is_not_forgotten(run):
    nodes = Nodes(run)
    attempts = NodeAttempts(run, nodes, 3, {})
    attempts.stop(signal.SIGTERM)
    attempts.run()
    assert nodes.asked == [True]


def test_a_report_that_a_signal_has_ended_is_written_later(run):
    nodes = Nodes(run)
    nodes.report = 143
    attempts = NodeAttempts(run, nodes, 3, {})
    assert attempts.run() == (143, False)
    attempts.stop(signal.SIGTERM)
    assert attempts.run() == (143, True)


def test_no_attempt_recreates_part_of_a_deleted_folder(run):
    nodes = Nodes(run, (*KILLED, 5))
    end_of_attempt = nodes.run

    def run_and_delete(*args):
        end = end_of_attempt(*args)
        shutil.rmtree(run.folder)
        return end

    nodes.run = run_and_delete
    with pytest.raises(DistattnError, match="was deleted meanwhile, or moved elsewhere; put it back"):
        NodeAttempts(run, nodes, 3, {}).run()
    assert not run.folder.exists()
