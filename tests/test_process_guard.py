"""Checks that no process started by tests or benchmarks outlives them, however they end."""

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import eventually

ROOT = Path(__file__).parents[1]
# a runner that starts two processes: a program in its own session, which starts another program and ends, and a fork in
# its own session
RUNNER = """
import os, subprocess, sys, time
from pathlib import Path
from process_guard import guard_processes

guard_processes()
guard_processes()
sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
daemon = f"import subprocess; print(subprocess.Popen({sleep!r}, stdout=subprocess.DEVNULL, start_new_session=True).pid)"
pids = [int(subprocess.run([sys.executable, "-c", daemon], stdout=subprocess.PIPE, text=True).stdout)]
pids.append(subprocess.Popen(sleep, start_new_session=True).pid)
if not (child := os.fork()):
    os.setsid()
    print(*pids, os.getpid(), subprocess.Popen(sleep).pid, flush=True)
    time.sleep(1000)
{end}
"""
STARTS = re.compile(r"\b(subprocess|multiprocessing)\b")


@pytest.mark.parametrize("end", ["is killed", "is ended", "ends"])
def test_nothing_outlives_a_guarded_process(end):
    last = "sys.stdin.read()" if end == "ends" else "time.sleep(1000)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    command = [sys.executable, "-c", RUNNER.replace("{end}", last)]
    with subprocess.Popen(command, env=environment, **pipes) as runner:
        pids = list(map(int, runner.stdout.readline().split()))
        assert len(pids) == 4 and all(map(runs, pids))
        if end != "ends":
            runner.send_signal(signal.SIGKILL if end == "is killed" else signal.SIGTERM)
        runner.stdin.close()
        runner.wait()
    eventually(lambda: not any(map(runs, pids)), "what it has started lives on")


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except OSError:
        return False


def test_this_test_runner_is_guarded():
    assert "guard-" in os.environ["DISTATTN_GUARDS"]


def test_every_benchmark_that_starts_processes_is_guarded():
    unguarded = []
    for file in (ROOT / "benchmarks").glob("*.py"):
        tree = ast.parse(file.read_text())
        starts = any(
            isinstance(node, ast.Import | ast.ImportFrom) and STARTS.search(ast.unparse(node))
            for node in ast.walk(tree)
        )
        main = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
        if starts and main and "guard_processes()" not in ast.unparse(main[0]):
            unguarded.append(file.name)
    assert unguarded == ["process_guard.py"]
