"""Helper processes of ranks are watched: one that is killed or stopped is named, and is replaced or ends the ranks with
it.
"""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from waiting import eventually

from distattn.ir.errors import DistattnError
from distattn.supervision import helper_processes, rank_watch
from distattn.supervision.culprits import process_state
from distattn.supervision.heartbeats import HeartbeatBoard
from distattn.supervision.helper_processes import Helper
from distattn.supervision.rank_watch import Patience, RankWatch
from distattn.training.watch import reference_check

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
TRACKED = """
import multiprocessing, os, signal, time
from multiprocessing import resource_tracker
from distattn.launch.ranks.attempt import _tracker

kept = multiprocessing.get_context("spawn").Lock()
tracker = _tracker()
tracker.kill()
assert tracker.start_again(tracker.end()).endswith("was killed by SIGKILL: another one is started")
assert tracker.pid == resource_tracker._resource_tracker._pid
# a terminal that closes ends this process first
os.kill(tracker.pid, signal.SIGHUP)
time.sleep(0.1)
assert not tracker.end()
"""
HOW = {
    signal.SIGKILL: "was killed by SIGKILL",
    signal.SIGSTOP: "is stopped (SIGSTOP or a debugger)",
}


@pytest.fixture
def sleeping():
    """Yield a function that starts a sleeping process. All of them end with the test."""
    processes = []

    def start() -> int:
        processes.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        return processes[-1].pid

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(pid: int, how: signal.Signals) -> None:
    eventually(lambda: process_state(pid) in ("Z" if how == signal.SIGKILL else "T"), "the signal has no effect")


@pytest.mark.parametrize("how", HOW, ids=lambda how: how.name)
def test_ranks_that_end_with_a_helper_are_not_to_blame(how, sleeping, tmp_path):
    rank, server, board = sleeping(), Helper("the fork server", sleeping()), HeartbeatBoard.make(1)
    with patch.object(os, "getpid", lambda: rank):
        board.writer(0, 1)("forward and backward", 0, 0.0, False)
    with patch.object(rank_watch, "LOOK_SECONDS", 0.0), patch.object(helper_processes, "LOOK_SECONDS", 0.1):
        watch = RankWatch(board, range(4, 5), Patience(600.0, 0.2), tmp_path, helpers=[server])
        os.kill(server.pid, how)
        trouble = eventually(lambda: watch.trouble, "the helper's end is not noticed")
        watch.close()
    assert str(trouble) == f"the fork server (process {server.pid}) {HOW[how]}"
    assert (trouble.kind, trouble.exit_code) == (("killed", 137) if how == signal.SIGKILL else ("hung", 1))
    # the trouble names this node but no rank
    assert trouble.facts()["ranks"] == [] and trouble.culprits[0].rank == 4
    eventually(lambda: process_state(rank) == "Z", "the rank goes on")
    assert process_state(server.pid) == "Z"
    board.close()


def test_a_rank_that_dies_in_the_same_moment_as_the_helper_is_not_to_blame(sleeping, tmp_path):
    rank, server, board = sleeping(), Helper("the fork server", sleeping()), HeartbeatBoard.make(1)
    with patch.object(os, "getpid", lambda: rank):
        board.writer(0, 1)("forward and backward", 0, 0.0, False)
    for pid in (server.pid, rank):
        os.kill(pid, signal.SIGKILL)
        wait_for(pid, signal.SIGKILL)
    watch = RankWatch(board, range(1), Patience(600.0, 600.0), tmp_path, helpers=[server])
    assert str(watch.close()) == f"the fork server (process {server.pid}) was killed by SIGKILL"
    board.close()


@pytest.mark.parametrize("how", HOW, ids=lambda how: how.name)
def test_a_replaceable_helper_is_replaced(how, sleeping, tmp_path):
    sentences, first = [], sleeping()
    helper, board = Helper("the resource tracker", first, sleeping), HeartbeatBoard.make(1)
    with patch.object(rank_watch, "LOOK_SECONDS", 0.0), patch.object(helper_processes, "LOOK_SECONDS", 0.1):
        watch = RankWatch(board, range(1), Patience(600.0, 0.2), tmp_path, helpers=[helper], notify=sentences.append)
        os.kill(first, how)
        eventually(lambda: sentences, "nothing is said")
        assert watch.close() is None
    assert sentences == [f"the resource tracker (process {first}) {HOW[how]}: another one is started."]
    assert helper.pid != first and process_state(helper.pid) in "RS" and process_state(first) == "Z"
    board.close()


def test_a_helper_that_cannot_be_replaced_now_is_replaced_later(sleeping, tmp_path):
    sentences, tries = [], []
    first, board = sleeping(), HeartbeatBoard.make(1)

    def replace():
        tries.append(len(sentences))
        if len(tries) < 3:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return sleeping()

    helper = Helper("the resource tracker", first, replace)
    with patch.object(rank_watch, "LOOK_SECONDS", 0.0):
        watch = RankWatch(board, range(1), Patience(600.0, 600.0), tmp_path, helpers=[helper], notify=sentences.append)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: helper.pid != first and len(sentences) == 2, "it is not replaced")
        assert watch.close() is None
    name = f"the resource tracker (process {first}) was killed by SIGKILL"
    assert sentences == [
        f"{name}, and cannot be replaced now: Resource temporarily unavailable; distattn tries again.",
        f"{name}: another one is started.",
    ]
    board.close()


def test_a_new_resource_tracker_knows_the_semaphores_that_are_there():
    # use a separate process, since no other test may use its tracker
    done = subprocess.run([sys.executable, "-c", TRACKED], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


FAULTY_REPLAY = """
import os, pathlib, signal, sys
tries = pathlib.Path(sys.argv[1])
with tries.open("a") as file:
    file.write("x")
if tries.stat().st_size <= int(sys.argv[2]):
    os.kill(os.getpid(), int(sys.argv[3]))
sys.exit("the last words")
"""


@pytest.mark.parametrize("how", HOW, ids=lambda how: how.name)
@pytest.mark.parametrize("faults", [1, 100])
def test_a_replay_that_dies_or_stops_begins_again_a_few_times(how, faults, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reference_check, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(helper_processes, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(reference_check, "_STOPPED_SECONDS", 1.0)
    command = [sys.executable, "-c", FAULTY_REPLAY, str(tmp_path / "tries"), str(faults), str(int(how))]
    named = rf"the replay in plain transformers \(process \d+\) {re.escape(HOW[how])}"
    if faults == 1:
        assert reference_check._run_watched(command) == (1, "the last words\n")
    elif how == signal.SIGSTOP:
        with pytest.raises(DistattnError, match=rf"{named}; compare again later\."):
            reference_check._run_watched(command)
    else:
        assert reference_check._run_watched(command) == (-signal.SIGKILL, "")
    began_again = min(faults, helper_processes.MOST_REPLACEMENTS)
    error_lines = capsys.readouterr().err.splitlines()
    assert len(error_lines) == began_again
    assert all(re.fullmatch(rf"distattn: {named}; it begins again\.", line) for line in error_lines), error_lines
    assert (tmp_path / "tries").read_text() == "x" * (began_again + 1)


def test_a_replay_that_ends_between_two_looks_has_not_failed():
    command = [sys.executable, "-c", "import time; time.sleep(0.3)"]
    look = Helper.fault

    def late(helper, patience):
        # it ends after `communicate` has timed out and before the watch looks
        eventually(helper.end, "the replay goes on")
        return look(helper, patience)

    with patch.object(reference_check, "LOOK_SECONDS", 0.01), patch.object(Helper, "fault", late):
        assert reference_check._run_watched(command) == (0, "")
