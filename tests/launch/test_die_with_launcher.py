"""Ranks end with their launcher, however it ends. All processes in these tests are real."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import eventually

ROOT = Path(__file__).parents[2]
TRAIN = ("-m", "distattn.launch.cli", "train", str(ROOT / "configs" / "tiny.toml"), "--parallel.ranks=2")
SLEEPER = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
(folder / f"{os.getpid()}.pid").touch()
time.sleep(100000)
"""
LAUNCHER = """
import sys
from distattn.launch.ranks.local import run_ranks
sys.exit(run_ranks(2, "sleeper", sys.argv[1]))
"""
WITHOUT_PRCTL = """
import os, sys, time
from pathlib import Path
from distattn.launch.ranks import die_with_launcher
die_with_launcher.set_parent_death_signal = lambda: False
die_with_launcher.die_with_launcher(os.getppid())
Path(sys.argv[1], f"{os.getpid()}.pid").touch()
time.sleep(100000)
"""


def alive(process: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def started(*arguments: str, folder: Path) -> Iterator[subprocess.Popen]:
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    out = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([sys.executable, *arguments], cwd=folder, env=environment, **out)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def pids(folder: Path) -> list[int]:
    return [int(file.stem) for file in folder.glob("*.pid")]


def children(process: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True).stdout
    return [int(word) for word in listed.split()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], ids=lambda how: how.name)
def test_ranks_end_with_a_launcher_that_is_killed(tmp_path, how):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    with started("-c", LAUNCHER, str(tmp_path), folder=tmp_path) as launcher:
        eventually(lambda: len(pids(tmp_path)) == 2, "the ranks did not start")
        ranks = pids(tmp_path)
        assert all(map(alive, ranks))
        launcher.send_signal(how)
        eventually(lambda: not any(map(alive, ranks)), f"ranks live on after {how.name} of their launcher")


def test_ranks_that_are_still_starting_end_with_their_launcher(tmp_path):
    with started(*TRAIN, f"--run.folder={tmp_path}/run", folder=tmp_path) as launcher:
        eventually(lambda: len(children(launcher.pid)) == 2, "the ranks did not start")
        ranks = children(launcher.pid)
        launcher.kill()
        eventually(lambda: not any(map(alive, ranks)), "ranks that import live on after their launcher")
        assert len(ranks) == 2


@pytest.mark.full
def test_ranks_in_the_middle_of_training_end_with_their_launcher(tmp_path):
    quick = ("--train.steps=100000", "--data.tokens_per_step=1024", "--data.max_document_tokens=900")
    with started(*TRAIN, f"--run.folder={tmp_path}/run", *quick, folder=tmp_path) as launcher:
        metrics = tmp_path / "run" / "metrics.jsonl"
        eventually(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, "the run did not start")
        ranks = children(launcher.pid)
        assert len(ranks) == 2
        launcher.kill()
        eventually(lambda: not any(map(alive, ranks)), "ranks that train live on after their launcher")


def test_without_prctl_the_parent_is_watched(tmp_path):
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"
    with started("-c", parent, WITHOUT_PRCTL, str(tmp_path), folder=tmp_path) as launcher:
        eventually(lambda: pids(tmp_path), "the rank did not start")
        (rank,) = pids(tmp_path)
        assert alive(rank)
        launcher.kill()
        eventually(lambda: not alive(rank), "the rank lives on after its launcher")


def test_a_rank_whose_launcher_died_before_it_could_ask_ends_at_once(tmp_path):
    # the given parent id is not the rank's parent, so its launcher is gone and another process has adopted the rank
    command = [sys.executable, "-m", "distattn.launch.ranks.die_with_launcher", str(1 << 30), "this"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and not done.stdout


def test_a_module_sees_the_arguments_and_the_exit_code_of_python_m(tmp_path):
    (tmp_path / "shown.py").write_text("import sys; print(__name__, sys.argv[1:]); sys.exit(7)")
    command = [sys.executable, "-m", "distattn.launch.ranks.die_with_launcher", str(os.getpid()), "shown", "a", "b c"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "__main__ ['a', 'b c']\n"), done.stderr


def test_threads_that_libraries_leave_do_not_keep_a_rank_that_is_done(tmp_path):
    rank = "import threading; from distattn.launch.ranks import entry; entry._leave(0.2, 3); "
    command = [sys.executable, "-c", f"{rank}threading.Thread(target=threading.Event().wait, name='upload').start()"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == "rank 3 is done, but upload goes on: not waited for any longer.\n"
