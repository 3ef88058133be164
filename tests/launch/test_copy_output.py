"""rank 0's output reaches its log and the console, and a console that accepts no output delays no rank."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

import psutil
import pytest
from waiting import eventually

from distattn.launch.ranks import copy_output
from distattn.supervision.culprits import process_state

ROOT = Path(__file__).parents[2]
# more output than a pipe can hold
LINES = b"".join(b"step %d\n" % number for number in range(100000))
RANK = """
import os, sys, time
from pathlib import Path
from distattn.launch.ranks.rank import keep_log
keep_log(Path("."))
for number in range(100000):
    print("step", number)
sys.stdout.flush()
Path("printed").touch()
if "stay" in sys.argv:
    time.sleep(1000)
# as a library does that is not written in Python
os.write(2, b"the end\\n")
"""


def started_copiers(rank):
    """Return the copiers that have already exec'd. Stopping a copier before that would keep its parent blocked in
    vfork.
    """
    children = psutil.Process(rank).children()
    return [child for child in children if any(word.endswith("copy_output.py") for word in child.cmdline())]


@contextlib.contextmanager
def killed_at_last(command, **how):
    """Start a process that is killed at the end, so that a failed test does not wait for it."""
    with subprocess.Popen(command, **how) as process:
        try:
            yield process
        finally:
            process.kill()


def copying(log, **how):
    return killed_at_last([sys.executable, "-SP", copy_output.__file__, str(log)], stdin=subprocess.PIPE, **how)


def test_a_paused_console_blocks_no_rank(tmp_path):
    with copying(tmp_path / "log", stdout=subprocess.PIPE) as copy:
        fcntl.fcntl(copy.stdout, fcntl.F_SETPIPE_SZ, 4096)
        # tee would block here
        copy.stdin.write(LINES)
        copy.stdin.close()
        assert copy.stdout.read() == LINES and copy.wait() == 0
    assert (tmp_path / "log").read_bytes() == LINES


def test_a_console_that_does_not_block_is_waited_for(tmp_path):
    console, end = os.pipe()
    os.set_blocking(end, False)
    with copying(tmp_path / "log", stdout=end) as copy, open(console, "rb") as read:
        os.close(end)
        copy.stdin.write(LINES)
        copy.stdin.close()
        assert read.read() == LINES and copy.wait() == 0


@pytest.mark.parametrize(
    ("log", "why"),
    [("/dev/full", "No space left on device"), ("no such folder/log", "No such file or directory")],
)
def test_a_log_that_cannot_be_written_leaves_the_console_which_says_so_once(log, why):
    with copying(log, stdout=subprocess.PIPE) as copy:
        copy.stdin.write(LINES)
        copy.stdin.close()
        shown = copy.stdout.read()
        assert copy.wait() == 0
    sentence = f"distattn: {log} lacks lines: {why}; the console has them.\n".encode()
    assert shown.count(sentence) == 1 and shown.replace(sentence, b"") == LINES


def test_a_pager_that_was_left_leaves_the_log(tmp_path):
    with copying(tmp_path / "log", stdout=subprocess.PIPE) as copy:
        copy.stdout.close()
        copy.stdin.write(LINES)
        copy.stdin.close()
        assert copy.wait() == 0
    assert (tmp_path / "log").read_bytes() == LINES


@pytest.mark.parametrize("end", ["ends", "is killed"])
def test_a_paused_terminal_does_not_hold_up_rank_0(end, tmp_path):
    reader, terminal = os.openpty()
    # Ctrl-S, followed later by Ctrl-Q
    termios.tcflow(terminal, termios.TCOOFF)
    command = [sys.executable, "-c", RANK, *(["stay"] if end == "is killed" else [])]
    how = dict(stdout=terminal, stderr=terminal, env=os.environ | {"RANK": "0", "PYTHONPATH": str(ROOT)})
    with killed_at_last(command, cwd=tmp_path, **how) as rank:
        eventually((tmp_path / "printed").exists, "rank 0 waits for the terminal")
        if end == "is killed":
            rank.kill()
        assert rank.wait() == (-signal.SIGKILL if end == "is killed" else 0)
        termios.tcflow(terminal, termios.TCOON)
        os.close(terminal)
        shown = bytearray()
        # the read fails once no process has the terminal open, so the copier has ended too
        with contextlib.suppress(OSError):
            while chunk := os.read(reader, 1 << 16):
                shown += chunk
    os.close(reader)
    wanted = LINES + (b"the end\n" if end == "ends" else b"")
    assert shown.replace(b"\r\n", b"\n") == wanted == (tmp_path / "rank-0.log").read_bytes()


# the rank waits 3 s before it replaces a stopped copier, which could continue in that time
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
def test_a_copier_that_is_lost_is_replaced_and_named(how, tmp_path):
    pipes = dict(stdout=subprocess.PIPE, stdin=subprocess.PIPE, env=os.environ | {"RANK": "0", "PYTHONPATH": str(ROOT)})
    rank_0 = RANK.replace("for number", "input()\nfor number", 1)
    with killed_at_last([sys.executable, "-c", rank_0], cwd=tmp_path, **pipes) as rank:
        (copier,) = eventually(lambda: started_copiers(rank.pid), "no copier is started")
        copier.send_signal(how)
        eventually(lambda: process_state(copier.pid) in "ZTX", "the signal has no effect")
        rank.stdin.write(b"\n")
        rank.stdin.close()
        shown = rank.stdout.read()
        assert rank.wait() == 0
    why = "was killed by SIGKILL" if how == signal.SIGKILL else "is stopped (SIGSTOP or a debugger)"
    lost = f"distattn: the copier of rank 0's output (process {copier.pid}) {why}"
    sentence = f"{lost}: another one goes on, without lines that this one held.\n".encode()
    # the copier held no data when it was lost
    assert sentence in shown and shown.replace(sentence, b"") == LINES + b"the end\n"
    assert (tmp_path / "rank-0.log").read_bytes() == shown
