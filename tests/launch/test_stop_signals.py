"""Every signal that ends a run has its own sentence and exit code in every phase. An ignored signal stays ignored."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from tiny_runs import write_run_file
from waiting import LIMIT_SECONDS

from distattn.launch import cli, finish_run, run_locally, start_run
from distattn.launch.ranks import supervised
from distattn.launch.ranks.local import RanksInterrupted, restore_process_state
from distattn.launch.stop_signals import STOPPING, CommandStopped, stop_on_signals, stopped

ROOT = Path(__file__).parents[2]
# imitate a batch system that repeats its signal
OFTEN = 40
SECTIONS = """
[train]
steps = 6
[reference_check]
steps = 2
"""
# maps each row of the table in docs/local.md to the function in which the signal arrives. No ranks are started
WHERE = {
    "it starts": (start_run, "_check_plans"),
    "ranks train or save": (supervised, "run_supervised"),
    "it compares": (finish_run, "run_reference_check"),
    "it reports": (finish_run, "_report"),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Create a folder with a configuration, and make it the working directory."""
    monkeypatch.chdir(tmp_path)
    write_run_file(tmp_path, SECTIONS)
    return tmp_path


def documented() -> dict[str, str]:
    """Return the sentences in docs/local.md, keyed by phase."""
    page = (ROOT / "docs" / "local.md").read_text()
    return dict(re.findall(r"^\| ([^|]+?) \| `(stopped by [^`]+)` \|", page, re.M))


def documented_codes() -> dict[str, int]:
    page = (ROOT / "docs" / "local.md").read_text()
    return {name: int(code) for name, code in re.findall(r"`(SIG[A-Z0-9]+)` \((\d+)\)", page)}


def send(number: int) -> None:
    for _ in range(OFTEN):
        os.kill(os.getpid(), number)
    # reached only if the signal had no effect
    os._exit(99)


def in_a_fork(work) -> tuple[int, str]:
    """Run `work` in a forked process. Return its exit code and its standard error output."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 2)
        os.close(write)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)
        try:
            work()
        except SystemExit as end:
            os._exit(end.code)
        except BaseException as error:
            os.write(2, repr(error).encode())
        os._exit(98)
    os.close(write)
    with open(read) as output:
        text = output.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def test_the_table_has_all_phases_and_codes():
    assert set(documented()) == set(WHERE)
    assert documented_codes() == {number.name: 128 + number for number in STOPPING}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("phase", WHERE)
@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_signal_has_its_sentence_and_code_in_every_phase(number, phase, place):
    def launch() -> None:
        with contextlib.ExitStack() as patches:
            for at, (module, name) in WHERE.items():
                # the start is not replaced unless the signal arrives in it
                if at == phase:
                    patches.enter_context(patch.object(module, name, lambda *_, **__: send(number)))
                elif at != "it starts":
                    patches.enter_context(patch.object(module, name, lambda *_, **__: None))
            # the run has a checkpoint of step 4
            patches.enter_context(patch.object(run_locally, "preferred_step", lambda folder: 4))
            sys.argv = ["distattn", "launch", "local", "run.toml"]
            cli.entry()

    code, output = in_a_fork(launch)
    sentence = documented()[phase].replace("SIGTERM", number.name).replace("RUN", "run")
    assert (code, output) == (128 + number, f"distattn: {sentence}\n")
    # the folder's state matches the sentence
    assert (place / "run").exists() == (phase != "it starts")


def test_a_signal_that_was_ignored_stays_ignored(place):
    def ignore() -> None:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        with stop_on_signals(), restore_process_state():
            for number in STOPPING:
                os.kill(os.getpid(), number)
        sys.exit(7)

    assert in_a_fork(ignore) == (7, "")


def test_signals_handled_by_the_caller_are_left_to_it():
    asked = []
    before = signal.signal(signal.SIGUSR1, lambda *_: asked.append("by the caller"))
    try:
        with stop_on_signals():
            os.kill(os.getpid(), signal.SIGUSR1)
            again = stop_on_signals(), stopped("here", "there is more"), stopped("")
            expected_stop = pytest.raises(CommandStopped, match="stopped by SIGTERM here; there is more.")
            with expected_stop, again[0], again[1], again[2]:
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert asked == ["by the caller"]


def test_torchrun_ends_its_ranks_by_a_signal_that_they_take():
    with stop_on_signals(), pytest.raises(RanksInterrupted) as interrupted, restore_process_state():
        os.kill(os.getpid(), signal.SIGHUP)
    assert interrupted.value.sigval == signal.SIGINT and interrupted.value.stop.exit_code == 129


def test_a_process_that_was_forked_meanwhile_ends_as_by_itself():
    def fork() -> None:
        with stop_on_signals():
            if not (child := os.fork()):
                send(signal.SIGTERM)
            sys.exit(-os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    assert in_a_fork(fork) == (signal.SIGTERM, "")


@pytest.mark.full
@pytest.mark.waits
def test_a_run_bears_a_closed_terminal_after_nohup_and_one_stopped_in_its_comparison_is_completed(place):
    command = [sys.executable, "-m", "distattn.launch.cli"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    how = dict(cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)

    run = subprocess.Popen([*command, "launch", "local", "run.toml"], start_new_session=True, preexec_fn=nohup, **how)
    for line in run.stdout:
        if line.startswith("step 1/"):
            # closing a terminal signals the launcher and all of its processes
            os.killpg(run.pid, signal.SIGHUP)
        if line.startswith("the first"):
            break
    # a signal sent many times is answered only once
    for _ in range(OFTEN):
        run.send_signal(signal.SIGQUIT)
    _, error = run.communicate(timeout=LIMIT_SECONDS)
    sentence = documented()["it compares"].replace("SIGTERM", "SIGQUIT").replace("RUN", "run")
    assert (run.returncode, error) == (131, f"distattn: {sentence}\n")
    shown = subprocess.run([*command, "launch", "status", "run"], **how)
    assert "compares and reports" in shown.stdout.splitlines()[0], shown
    completing = re.search(r"python -m (\S+) run", shown.stdout)[1]
    done = subprocess.run([sys.executable, "-m", completing, "run"], **how)
    assert done.returncode == 0 and (place / "run" / "report.html").exists(), done.stderr
