"""What rank 0 prints reaches its log and the console, and a console that takes nothing keeps nobody waiting."""

import contextlib
import fcntl
import os
import subprocess
import sys
import termios
from pathlib import Path

from waiting import eventually

from distattn.launch.ranks import copy_output

# more than pipes hold
LINES = b"".join(b"step %d\n" % number for number in range(100000))


def copying(*files, **how) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-IS", copy_output.__file__, *map(str, files)], stdin=subprocess.PIPE, **how
    )


def test_a_paused_console_keeps_nobody_waiting(tmp_path):
    with copying(tmp_path / "log", stdout=subprocess.PIPE) as copy:
        fcntl.fcntl(copy.stdout, fcntl.F_SETPIPE_SZ, 4096)
        # tee would block here
        copy.stdin.write(LINES)
        copy.stdin.close()
        assert copy.stdout.read() == LINES
    assert copy.returncode == 0 and (tmp_path / "log").read_bytes() == LINES


def test_a_console_that_does_not_block_is_waited_for():
    console, end = os.pipe()
    os.set_blocking(end, False)
    with copying(stdout=end) as copy, open(console, "rb") as read:
        os.close(end)
        copy.stdin.write(LINES)
        copy.stdin.close()
        assert read.read() == LINES
    assert copy.returncode == 0


def test_a_full_disk_leaves_the_console():
    with copying("/dev/full", stdout=subprocess.PIPE) as copy:
        copy.stdin.write(LINES)
        copy.stdin.close()
        assert copy.stdout.read() == LINES
    assert copy.returncode == 0


def test_a_pager_that_was_left_leaves_the_log(tmp_path):
    with copying(tmp_path / "log", stdout=subprocess.PIPE) as copy:
        copy.stdout.close()
        copy.stdin.write(LINES)
    assert copy.returncode == 0 and (tmp_path / "log").read_bytes() == LINES


PRINTING = """
import sys
from pathlib import Path
from distattn.launch.ranks.rank import redirected_output
with redirected_output(Path("logs")):
    for number in range(100000):
        print("step", number)
    Path("printed").touch()
print("the end")
"""


def test_a_paused_terminal_does_not_hold_up_rank_0(tmp_path):
    reader, terminal = os.openpty()
    # Ctrl-S, and later Ctrl-Q
    termios.tcflow(terminal, termios.TCOOFF)
    environment = os.environ | {"RANK": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", PRINTING], cwd=tmp_path, stdout=terminal, env=environment) as rank:
        eventually((tmp_path / "printed").exists, "rank 0 waits for the terminal")
        termios.tcflow(terminal, termios.TCOON)
        os.close(terminal)
        shown = bytearray()
        # of a terminal that nobody has open any more
        with contextlib.suppress(OSError):
            while chunk := os.read(reader, 1 << 16):
                shown += chunk
    os.close(reader)
    # where the terminal was paused for long, it does not come last
    assert rank.returncode == 0 and shown.replace(b"\r\n", b"\n").replace(b"the end\n", b"") == LINES
