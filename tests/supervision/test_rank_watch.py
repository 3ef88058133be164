"""How long ranks may be silent, and the report on a rank that sent no heartbeat."""

import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from waiting import eventually

from distattn.launch.ranks.attempt import _ended, _silent_end
from distattn.supervision import heartbeats, rank_watch
from distattn.supervision.culprits import Culprit
from distattn.supervision.heartbeats import HeartbeatBoard
from distattn.supervision.rank_watch import Patience, RankWatch, Trouble


def test_long_silent_steps_are_not_a_hang_but_a_lasting_silence_is(tmp_path):
    # the process that sends heartbeats and is killed at the end
    how = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    sleeper = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], **how)
    assert sleeper.stdout.readline()
    board = HeartbeatBoard.make(1)
    seen, read = [-1], board.read

    def watched(slot):
        beat = read(slot)
        seen[0] = -1 if beat is None else beat.step
        return beat

    board.read = watched
    with_pid = threading.Thread(target=_steps, args=(board, sleeper.pid, seen))
    watch = RankWatch(board, range(1), Patience(starting=600.0, running=0.05, factor=200.0), tmp_path)
    with_pid.start()
    with_pid.join()
    # two steps were done, each with 0.2 s without a heartbeat
    assert watch.trouble is None
    watch.close()
    # now only the configured patience applies
    watch = RankWatch(board, range(1), Patience(starting=0.05, running=0.05), tmp_path)
    eventually(lambda: watch.trouble is not None, "the silence is not noticed")
    assert str(watch.close()) == "rank 0 waits for no other rank and makes no progress: step 4, forward and backward"
    # the rank is asked for its stacks, which it cannot write, and is killed
    assert sleeper.wait() < 0
    board.close()


def _steps(board, pid, seen):
    # send heartbeats on behalf of a different process, which is to be killed
    with patch.object(os, "getpid", lambda: pid):
        write = board.writer(0, 1)
    for step in range(4):
        write("forward and backward", step, 0.0, False)
        # on a busy machine the watch may be late
        eventually(lambda step=step: seen[0] == step, "the watch does not look")
        time.sleep(0.2)


def test_time_in_which_the_machine_was_suspended_is_not_silence(tmp_path):
    rank = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    board = HeartbeatBoard.make(1)
    # seconds for which the machine was suspended, number of looks by the watch, seconds added per look, and total
    # seconds added
    suspended, looks, tick, passed = [0.0], [0], [0.0], [0.0]

    def seconds() -> float:
        return time.monotonic() + suspended[0] + passed[0]

    def look() -> float:
        looks[0] += 1
        passed[0] += tick[0]
        return seconds()

    def wait_for_looks() -> None:
        before = looks[0]
        eventually(lambda: watch.trouble or looks[0] > before + 2, "the watch does not look")

    clock = SimpleNamespace(monotonic_ns=lambda: int(1e9 * seconds()))
    with patch.object(os, "getpid", lambda: rank.pid), patch.object(heartbeats, "time", clock):
        write = board.writer(0, 1)
    write("forward and backward", 0, 0.0, False)
    with patch.object(rank_watch, "time", SimpleNamespace(monotonic=look)):
        watch = RankWatch(board, range(1), Patience(starting=60.0, running=60.0), tmp_path)
        for step in range(1, 5):
            suspended[0] += 1000.0
            wait_for_looks()
            write("forward and backward", step, 0.0, False)
            wait_for_looks()
        assert watch.trouble is None
        # a silence counts once several consecutive looks have seen it
        tick[0] = 0.9
        eventually(lambda: watch.trouble is not None, "the silence is not noticed")
    trouble = watch.close()
    # the thousand seconds of suspension do not count as the time of a step
    assert trouble.kind == "hung" and 60 < trouble.seconds < 1000 and rank.wait() < 0
    board.close()


def test_a_rank_that_ends_before_it_tells_anything_is_named():
    killed = SimpleNamespace(
        failures={1: SimpleNamespace(exitcode=-9, timestamp=1), 0: SimpleNamespace(exitcode=1, timestamp=2)}
    )
    code, trouble = _silent_end(killed)
    assert trouble.kind == "killed" and str(trouble) == "rank 1 was killed by SIGKILL before its first heartbeat"
    assert code == trouble.exit_code == 137
    broken = SimpleNamespace(failures={2: SimpleNamespace(exitcode=1, timestamp=1)})
    code, trouble = _silent_end(broken)
    assert trouble.kind == "raised" and str(trouble) == "rank 2 ended with exit code 1 before its first heartbeat"
    assert code == trouble.exit_code == 1


def test_torchrun_that_waits_for_ranks_that_died_at_their_end_is_interrupted(tmp_path):
    ranks = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    board = HeartbeatBoard.make(2)
    for slot, rank in enumerate(ranks):
        with patch.object(os, "getpid", lambda pid=rank.pid: pid):
            board.writer(slot, 1)("", 13, 0.0, False, state="ended")
    watch = RankWatch(board, range(2), Patience(starting=600.0, running=600.0), tmp_path)
    ranks[0].kill()
    with patch.object(rank_watch, "_TORCHRUN_SECONDS", 0.1), patch.object(os, "kill") as killed:
        ranks[0].wait()
        eventually(lambda: killed.called, "nothing interrupts torchrun")
        killed.assert_called_once_with(os.getpid(), rank_watch.INTERRUPT)
    assert str(watch.close()) == "rank 0 ended without giving a reason: step 14, ended"
    # all ranks that torchrun has released are in this state
    with patch.object(os, "getpid", lambda: ranks[0].pid):
        board.writer(0, 1)("", 13, 0.0, False, state="left")
    watch = RankWatch(board, range(2), Patience(starting=600.0, running=600.0), tmp_path)
    assert watch.close() is None
    ranks[1].kill()
    ranks[1].wait()
    board.close()


@pytest.mark.parametrize(
    ("state", "text", "sentence"), [("left", "", "None"), ("raised", "ValueError: no", "rank 0 raised ValueError: no")]
)
def test_the_last_message_of_a_rank_that_ends_between_two_looks_is_read(state, text, sentence, tmp_path):
    rank = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    board = HeartbeatBoard.make(1)
    with patch.object(os, "getpid", lambda: rank.pid):
        write = board.writer(0, 1)
    write("forward and backward", 13, 0.0, False, state="ended" if state == "left" else "working")
    looked = threading.Event()

    def end_first(pid: int) -> str:
        # the rank writes this heartbeat after the watch has read the previous heartbeat
        write(text, 13, 0.0, False, state=state)
        rank.kill()
        rank.wait()
        looked.set()
        return "X"

    with patch.object(rank_watch, "process_state", end_first):
        watch = RankWatch(board, range(1), Patience(starting=600.0, running=600.0), tmp_path)
        eventually(looked.is_set, "the watch does not look")
        assert str(watch.close()) == sentence
    board.close()


def test_how_a_rank_has_ended_is_what_torchrun_was_told_of_it():
    trouble_of_two = Trouble(
        tuple(Culprit(rank, "ended without giving a reason", "step 3") for rank in (0, 1)), "killed", 2, 0.1
    )

    def said(**codes):
        code, trouble = _ended({int(rank[1:]): number for rank, number in codes.items()}, trouble_of_two)
        return code, str(trouble)

    # torchrun ended rank 0 because of rank 1, before the watch looked
    assert said(r1=-9) == (137, "rank 1 was killed by SIGKILL: step 3")
    assert said(r0=-6, r1=3) == (
        134,
        "rank 0 was killed by SIGABRT: step 3; rank 1 ended with exit code 3 without giving a reason: step 3",
    )
    assert said(r1=255) == (255, "rank 1 ended with exit code 255 without giving a reason: step 3")
    assert said(r1=-40) == (168, "rank 1 was killed by signal 40: step 3")
    # this exit code is that of another rank, which the watch has killed
    assert said(r2=-9) == (1, str(trouble_of_two)) == said()
