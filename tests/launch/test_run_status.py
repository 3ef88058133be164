"""`distattn launch status` and `cancel` for a run started on this machine."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from unittest.mock import patch

import pytest

from distattn.checkpoints.owner import JOB_VARIABLE, Owner, writer_name
from distattn.checkpoints.run_lock import LAUNCHER, RunLock
from distattn.ir.errors import DistattnError
from distattn.launch import cli
from distattn.launch.attempts import Attempts
from distattn.launch.run_status import cancel, status, status_lines
from distattn.launch.slurm import jobs as slurm
from distattn.supervision.heartbeats import HeartbeatBoard
from distattn.training.run_folder import RunFolder, StepMetrics


@pytest.fixture
def job_in_state(tmp_path, monkeypatch):
    """Return a function that creates the run of job 7 and a Slurm that reports the given state for the job."""

    def make(state):
        run = RunFolder(tmp_path)
        run.config_file.touch()
        run.note_job(7)
        monkeypatch.setattr(slurm, "job_state", lambda job: state)
        return run

    return make


def test_a_run_under_another_scheduler_shows_its_owner_and_the_reports_of_nodes(tmp_path, capsys, monkeypatch):
    run = RunFolder(tmp_path)
    run.config_file.touch()
    run.append(run.metrics_file, asdict(StepMetrics(1, 2.0, 1.0, 64, 0.5)))
    monkeypatch.setenv(JOB_VARIABLE, "sky-7")
    begun = "begun by another scheduler, no attempts are recorded"
    with RunLock(tmp_path):
        assert cli.main(["launch", "status", str(tmp_path)]) == 0
        output = capsys.readouterr().out
        host = f"process {os.getpid()} on {socket.gethostname()}, sky-7, since "
        assert output.startswith(f"{begun}, running: {host}") and output.endswith(", 1 step done\n")
        # the owner's machine has been silent for longer than its lease
        owner = json.loads((tmp_path / "owner.json").read_text())
        elsewhere = json.dumps(owner | {"machine": "another"})
    (tmp_path / "owner.json").write_text(elsewhere)
    assert status(run)["state"].startswith(f"{begun}, running: ")
    os.utime(tmp_path / "owner.json", (0, 0))
    assert status(run)["state"].startswith(f"{begun}, was killed: ")
    (tmp_path / "owner.json").unlink()
    # run_node reports it in this form
    Attempts(run.attempts).report_node(1, 3, {"why": "rank 6 was killed by SIGKILL: step 2"})
    assert cli.main(["launch", "status", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert (
        output
        == f"{begun}, no ranks work on it, 1 step done\n  last report of node 3: rank 6 was killed by SIGKILL: step 2\n"
    )
    run.report_file.touch()
    assert status(run)["state"] == f"{begun}, its report is written"


def test_a_run_whose_launcher_was_killed_in_the_comparison_says_what_completes_it(tmp_path, capsys):
    run = RunFolder(tmp_path)
    run.config_file.touch()
    attempts, facts = Attempts(run.attempts), {"host": socket.gethostname(), "launcher": 1}
    run.append(run.metrics_file, asdict(StepMetrics(1, 2.0, 1.0, 64, 0.5)))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as launcher:
        with patch.object(os, "getpid", lambda: launcher.pid):
            attempts.end(attempts.begin(**facts, process=writer_name()), 0, "ended well")
        assert status(run)["state"] == "all steps are done, its launcher compares and reports"
        launcher.kill()
    wanted = "ended, exit code 0, all steps are done, but not reported: "
    wanted += f"python -m distattn.launch.finish_run {tmp_path} compares and reports"
    assert status(run)["state"] == wanted
    assert cli.main(["launch", "status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"{wanted}\n")
    run.report_file.touch()
    assert status(run)["state"] == "ended, exit code 0"
    # the report is from before the run was resumed for more steps
    os.utime(run.report_file, (0, 0))
    assert status(run)["state"] == wanted
    # on Ray the launcher has recorded that it reports, and on Slurm that it has ended
    run.ray_file.write_text(json.dumps({"host": socket.gethostname(), "launcher": launcher.pid, "cluster": "a:1"}))
    run.state_file.write_text("running\n")
    assert status(run)["state"] == wanted.replace("ended, exit code 0", "killed with its launcher")
    # the launcher was killed before all steps were done
    attempts.begin(**facts)
    wanted = f"killed with its launcher, python -m distattn.launch.ray.attempts {tmp_path} continues"
    assert status(run)["state"] == wanted


@pytest.mark.parametrize(
    "state",
    ["FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "CANCELLED", "COMPLETED"],
)
def test_a_job_that_has_ended_by_itself_is_not_cancelled(state, job_in_state, capsys):
    run = job_in_state(state)
    with patch.object(slurm, "ask_slurm", lambda *command: pytest.fail(f"{command} was run")):
        assert cli.main(["launch", "cancel", str(run.folder)]) == 0
    sentence = f"{run.folder} has ended, so there is nothing to cancel: {state}\n"
    assert capsys.readouterr().out == sentence


@pytest.mark.parametrize("state", ["RUNNING", "REQUEUE_HOLD", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"])
def test_a_job_that_still_has_work_to_do_is_cancelled(state, job_in_state, capsys):
    run, commands = job_in_state(state), []
    with patch.object(slurm, "ask_slurm", lambda *command: commands.append(command)):
        assert cli.main(["launch", "cancel", str(run.folder)]) == 0
    assert commands == [("scancel", "7")] and capsys.readouterr().out == "job 7 is cancelled\n"


def test_a_run_of_this_machine_tells_its_attempts_and_what_its_ranks_do(tmp_path, capsys):
    run = RunFolder(tmp_path)
    run.config_file.touch()
    assert status(run)["state"] == "not begun"
    with pytest.raises(DistattnError, match="no ranks of this machine work on it"):
        cancel(run)
    # start a launcher with a board for its ranks
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    board, attempts = HeartbeatBoard.make(2), Attempts(run.attempts)
    facts = {"host": socket.gethostname(), "launcher": launcher.pid, "board": str(board.path)}
    number = attempts.begin(**facts)
    board.writer(1, number)("key/value move 3 of layer 17 from rank 0", 11, 0.0, True)
    assert cli.main(["launch", "status", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert (
        output.startswith("running, 0 steps done\n  attempt 1: runs, at step 12\n")
        and "  rank 1: step 12, key/value move 3" in output
    )
    assert cli.main(["launch", "cancel", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"launcher": launcher.pid, "cancelled": True}
    assert launcher.wait() == -15 and status(run)["state"] == "killed with its launcher"
    assert status_lines(status(run)).endswith("  attempt 1: was killed\n")
    attempts.end(number, 143, "stopped by SIGTERM")
    shown = status(run)
    assert shown["state"] == "ended, exit code 143" and shown["attempts"][0]["why"] == "stopped by SIGTERM"
    # the second time there is nothing to cancel
    capsys.readouterr()
    assert cli.main(["launch", "cancel", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (f"{tmp_path} has ended, so there is nothing to cancel: ended, exit code 143\n")
    assert cli.main(["launch", "cancel", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cancelled"] is False
    attempts.begin(**facts | {"launcher": os.getpid(), "host": "elsewhere"})
    assert status(run)["ranks"] == {}
    # the descriptor of a closed board may now belong to another file
    attempts.begin(**facts | {"launcher": os.getpid()})
    place = board.path
    assert status(run)["ranks"] and place.exists()
    board.close()
    # a new file gets the lowest free descriptor, which was the board's
    with open(tmp_path / "other", "wb") as other:
        assert other.fileno() == int(place.name) and status(run)["ranks"] == {}


def hold_as_launcher(folder, ready):
    """Hold a run folder like a launcher without ranks, until a signal arrives."""
    with RunLock(folder, LAUNCHER):
        ready.put(True)
        signal.pause()


@pytest.fixture
def launcher(tmp_path):
    """Start a process that holds the folder as a launcher does. It ends with the test."""
    context = multiprocessing.get_context("fork")
    ready = context.SimpleQueue()
    process = context.Process(target=hold_as_launcher, args=(tmp_path, ready))
    process.start()
    assert ready.get()
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize("before", ["new", "killed", "ended", "job"])
def test_a_launcher_that_is_starting_is_said_to_start_and_can_be_cancelled(before, launcher, tmp_path, capsys):
    run, attempts = RunFolder(tmp_path), Attempts(tmp_path / "attempts")
    run.config_file.touch()
    if before in ("killed", "ended"):
        number = attempts.begin(host=socket.gethostname(), launcher=1, process=f"{writer_name().partition('-')[0]}-1-1")
        if before == "ended":
            attempts.end(number, 143, "stopped by SIGTERM", stopped=True)
    elif before == "job":
        run.note_job(7)
    owner = f"process {launcher.pid} on {socket.gethostname()}"
    assert status(run)["state"].startswith(f"starting: {owner}, since ")
    if before == "killed":
        assert status_lines(status(run)).endswith("  attempt 1: was killed\n")
    assert cli.main(["launch", "cancel", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"launcher {launcher.pid} is cancelled\n"
    launcher.join()
    assert launcher.exitcode == -signal.SIGTERM


def test_a_launcher_between_two_attempts_can_be_cancelled(launcher, tmp_path, capsys):
    run, attempts = RunFolder(tmp_path), Attempts(tmp_path / "attempts")
    run.config_file.touch()
    owner = Owner.read(tmp_path / "launcher.json")
    number = attempts.begin(host=socket.gethostname(), launcher=launcher.pid, process=owner.writer_name)
    # another user's ranks cannot be inspected
    assert status(run)["state"] == "running"
    attempts.end(number, 137, "rank 1 was killed by SIGKILL: step 2")
    assert status(run)["state"] == "attempt 1 ended with exit code 137, its launcher continues"
    # a launcher on a full disk may have failed to write its file
    (tmp_path / "launcher.json").rename(tmp_path / "aside")
    assert cli.main(["launch", "cancel", str(tmp_path)]) == 2
    assert f"process {launcher.pid}, which started its ranks, is still alive" in capsys.readouterr().err
    (tmp_path / "aside").rename(tmp_path / "launcher.json")
    assert cli.main(["launch", "cancel", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"launcher": launcher.pid, "cancelled": True}
    launcher.join()
    assert status(run)["state"] == "ended, exit code 137"


def test_a_launcher_on_another_machine_is_cancelled_there(tmp_path, capsys):
    run = RunFolder(tmp_path)
    run.config_file.touch()
    file = tmp_path / "launcher.json"
    replace(Owner.of_this_process(), host="node-7", machine="another", pid=4711).write(file)
    assert status(run)["state"].startswith("starting: process 4711 on node-7")
    assert cli.main(["launch", "cancel", str(tmp_path)]) == 2
    refusal = capsys.readouterr().err
    assert "its launcher, process 4711 on node-7, since 20" in refusal and refusal.endswith(
        "; cancel the run on node-7.\n"
    )
    # the owner has been silent for longer than its lease
    os.utime(file, (0, 0))
    assert status(run)["state"] == "not begun"
