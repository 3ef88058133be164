"""Full or read-only locations are named with advice, and do not end a run that can continue without them."""

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from distattn.ir.errors import DistattnError
from distattn.launch.ranks import attempt
from distattn.supervision.heartbeats import HeartbeatBoard
from distattn.supervision.rank_watch import Patience

ROOT = Path(__file__).parents[2]
LOG = """
import os, sys
from pathlib import Path
from distattn.launch.ranks.rank import keep_log
keep_log(Path(sys.argv[1]))
print("a line")
"""
STACKS = """
import os, signal, sys
from pathlib import Path
from distattn.supervision.evidence import answer_with_stacks
answer_with_stacks(Path(sys.argv[1]), 1)
os.kill(os.getpid(), signal.SIGUSR2)
"""


@pytest.fixture
def no_folder(tmp_path):
    """Return a path at which nothing can be created."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "folder"


def run(script, place):
    return subprocess.run(
        [sys.executable, "-c", script, str(place)], env={"RANK": "1"}, cwd=ROOT, capture_output=True, text=True
    )


def test_a_log_of_another_rank_that_cannot_be_opened_leaves_the_console(no_folder):
    done = run(LOG, no_folder)
    assert done.returncode == 0 and done.stdout == "a line\n", done.stderr
    sentence = "rank-1.log: cannot be opened: Not a directory; the console has the output of rank 1."
    assert done.stderr == f"distattn: {no_folder}/{sentence}\n"


def test_a_log_on_a_full_disk_ends_no_rank_that_prints(tmp_path):
    (tmp_path / "rank-1.log").symlink_to("/dev/full")
    done = run(f"{LOG}print('another')\nsys.stderr.write('and another')", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_stacks_that_cannot_be_kept_are_printed(no_folder):
    done = run(STACKS, no_folder)
    assert done.returncode == 0, done.stderr
    first, *others = done.stderr.splitlines()
    assert first.endswith("cannot be created: Not a directory; the stacks of rank 1 are printed instead.")
    assert others[0].startswith("Current thread 0x")


def attempted(folder, monkeypatch, launch):
    """Run a single-rank attempt without its processes. launch: replaces torchrun."""
    monkeypatch.setattr(attempt, "elastic_launch", lambda config, function: launch)
    monkeypatch.setattr(attempt, "RankWatch", lambda *_: SimpleNamespace(close=lambda: None))
    for name in ("_start_server", "_server", "_tracker"):
        monkeypatch.setattr(attempt, name, lambda *_: None)
    ranks = attempt.Ranks(1, "module:function", [], Patience(60.0, 60.0))
    with closing(HeartbeatBoard.make(1)) as board:
        return attempt.run_attempt(ranks, 1, folder, board)


def test_an_attempt_without_a_folder_for_its_evidence_goes_on(no_folder, monkeypatch, capsys):
    ran = []
    attempted(no_folder, monkeypatch, lambda *args: ran.append(args))
    assert len(ran) == 1
    assert (
        "cannot be created: Not a directory; no evidence of ranks that hang is kept there." in capsys.readouterr().err
    )


def test_shared_memory_without_room_is_named_with_what_helps(tmp_path, monkeypatch):
    def launch(*_):
        # multiprocessing raises it in this form
        raise OSError(28, "No space left on device")

    with pytest.raises(DistattnError, match=r"^/dev/shm: has no room for the semaphores of ranks.*--shm-size=8g"):
        attempted(tmp_path, monkeypatch, launch)


def test_other_places_without_room_keep_their_names(tmp_path, monkeypatch):
    def launch(*_):
        raise OSError(28, "No space left on device", "/tmp/torchelastic")

    with pytest.raises(OSError, match="/tmp/torchelastic"):
        attempted(tmp_path, monkeypatch, launch)
