"""Ranks that are killed or hang are noticed, named and started again; real processes over gloo."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANKS, STEPS = 3, 12
# in a process of its own: a launcher changes how the process forks, and its environment
LAUNCH = """
import json, sys
from pathlib import Path
from distattn.launch.supervised_ranks import Restarts, run_supervised
from distattn.supervision.rank_watch import Patience
folder, ranks, steps, limit, running = Path(sys.argv[1]), *map(int, sys.argv[2:5]), float(sys.argv[5])
file = folder / "losses.jsonl"
progress = lambda: len(file.read_text().splitlines()) if file.exists() else 0
sys.exit(run_supervised(ranks, "faulty_ranks:run", [str(folder), steps], attempts=folder / "attempts",
    restarts=Restarts(limit, progress), patience=Patience(60, running), preload=["faulty_ranks"]))
"""


def launched(folder, fault=None, limit=3, running=2.0):
    folder.mkdir()
    if fault:
        (folder / "fault.json").write_text(json.dumps(fault))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    command = [sys.executable, "-c", LAUNCH, folder, *map(str, (RANKS, STEPS, limit, running))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    file = folder / "attempts" / "attempts.jsonl"
    return done, [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done, attempts = launched(folder)
    assert done.returncode == 0, done.stderr
    assert [attempt["exit_code"] for attempt in attempts] == [0] and done.stderr == ""
    return (folder / "losses.jsonl").read_text()


KINDS = {
    "kill": "rank 1 was killed: computing",
    "stop": r"rank 1 is stopped \(SIGSTOP or a debugger\): step 6, computing",
    "lock": "rank 1 neither waits for others nor goes on: step 6, reading shard 12",
    "read": "rank 1 neither waits for others nor goes on: step 6, reading never",
    "interpreter": "rank 1 neither waits for others nor goes on: step 6, computing",
    "message": "rank 1 waits for what no other does: step 6, key/value move 3 of layer 17 from rank 2; "
    "the others: all-reduce of the loss",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_is_killed_or_hangs_is_named_and_the_run_goes_on(kind, whole, tmp_path):
    folder = tmp_path / "run"
    done, attempts = launched(folder, {"rank": 1, "step": 5, "kind": kind})
    assert done.returncode == 0, done.stderr
    assert re.search(KINDS[kind], done.stderr) and "start again from step 5" in done.stderr, done.stderr
    # bit for bit that of a run that nothing happened to
    assert (folder / "losses.jsonl").read_text() == whole
    first, last = attempts
    assert first["ranks"] == [1] and first["hung"] == (kind != "kill") and last["exit_code"] == 0
    told = folder / "attempts" / "001" / "heartbeats.jsonl"
    assert told.exists() == (kind != "kill")
    if kind in ("lock", "read", "interpreter", "message"):
        assert "faulty_ranks.py" in (folder / "attempts" / "001" / "stacks-1.txt").read_text()


def test_a_rank_that_says_why_it_ends_is_not_started_again(tmp_path):
    done, attempts = launched(tmp_path / "run", {"rank": 2, "step": 3, "kind": "refused"})
    assert done.returncode == 1 and len(attempts) == 1
    assert "rank 2 failed: tokens.bin: token 7 is not in the vocabulary." in done.stderr


def test_a_rank_that_is_killed_again_and_again_ends_the_run(tmp_path):
    done, attempts = launched(tmp_path / "run", {"rank": 0, "step": 3, "kind": "kill"}, limit=0)
    assert done.returncode == 128 + 9 and len(attempts) == 1
    assert "rank 0 was killed: computing; the other ranks were stopped." in done.stderr


def test_ranks_end_with_their_launcher(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "fault.json").write_text(json.dumps({"rank": 1, "step": 5, "kind": "lock"}))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCH, folder, "3", "12", "0", "600"], env=environment)
    while not (folder / "losses.jsonl").exists() or len((folder / "losses.jsonl").read_text().splitlines()) < 5:
        assert launcher.poll() is None
        time.sleep(0.05)
    assert processes_of(folder)
    launcher.kill()
    launcher.wait()
    while processes_of(folder):
        time.sleep(0.05)


def processes_of(folder):
    """Ranks that have a file of the folder open."""
    found = set()
    for one in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(one).startswith(str(folder)):
                found.add(one.parts[2])
        except OSError:
            continue
    return found
