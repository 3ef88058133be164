"""The attempts of a run inside one Slurm job: `python -m distattn.launch.slurm_attempts RUN ... -- srun ...`, on its first node.

The batch script ends in it. Each attempt is a step of the job on as many of its nodes as the run wants, with an address of its
own. Where a node is lost, or ranks are killed, the next attempt follows on nodes that are left. When Slurm tells of the time
limit or a preemption, the ranks save and end with exit code 75, and the job is queued again. Needs neither torch nor a GPU.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from distattn.checkpoints.checkpoint_folder import list_checkpoints
from distattn.ir.errors import DistattnError, RunStopped
from distattn.launch.attempts import Attempts
from distattn.launch.slurm_commands import OUTAGE_SECONDS, ask_slurm, end_steps, expand_hosts, host_address, job_state
from distattn.launch.slurm_steps import JobHosts, StepEnd
from distattn.training.run_folder import RunFolder

# after the first failure of a step: for those of other nodes, then for Slurm to end the step
_OTHERS_SECONDS, _ENDING_SECONDS = 5.0, 15.0
_STOPPED = RunStopped.exit_code


class _Job(NamedTuple):
    """This job. requeues: how often it was queued again. name: by which Slurm's commands know it alone, not the whole array."""

    number: str
    requeues: int
    name: str


class _Outcome(NamedTuple):
    """How a job ends. again: whether it is to be queued again."""

    code: int
    again: bool = False


class JobAttempts:
    """Runs attempts until the run has ended, can go on in another job only, or not at all. command: srun and what it starts."""

    def __init__(self, run: RunFolder, job: _Job, command: Sequence[str], hosts: JobHosts, max_restarts: int):
        self._run, self._job, self._command, self._hosts = run, job, list(command), hosts
        self._max_restarts = max_restarts
        self._attempts = Attempts(run.attempts)
        # the signal that asks this job to stop
        self._signal = ""

    def stop(self, number: int, frame: FrameType | None = None) -> None:
        """Have the ranks save and end: a handler of Slurm's signals."""
        self._signal = signal.Signals(number).name
        try:
            self._run.ask_to_stop(self._signal)
        except OSError as error:
            _say(f"the ranks cannot be asked to stop: {error}; the run goes on from its newest checkpoint.")

    def run(self) -> _Outcome:
        """Attempt after attempt."""
        self._attempts.end_open("ended with its job, before anybody could tell why")
        self._run.stop_file.unlink(missing_ok=True)
        restarts, furthest = 0, self._progress()
        while (hosts := self._hosts.choose()) is not None:
            number = self._attempts.begin(job=int(self._job.number), requeues=self._job.requeues, hosts=hosts)
            address = f"{host_address(hosts[0])}:{_port(int(self._job.number), number)}"
            _say(f"attempt {number} of job {self._job.number} on {' '.join(hosts)}, led by {address}")
            end = self._step(hosts, address)
            asked = self._asked()
            if end.code == 0:
                self._attempts.end(number, 0, "ended well")
                return _Outcome(self._step(hosts[:1], "finish").code)
            if end.code == _STOPPED:
                self._attempts.end(number, _STOPPED, f"stopped, asked by {asked or 'a file in the run folder'}")
                return _Outcome(_STOPPED, again=asked.startswith("SIG"))
            why, blamed = end.cause(hosts, self._attempts.told(number))
            self._attempts.end(number, end.code, why, blamed=blamed)
            if end.is_final():
                _say(f"{why}; the other ranks were stopped.")
                return _Outcome(end.code)
            now = self._progress()
            restarts, furthest = (1, now) if now > furthest else (restarts + 1, furthest)
            if asked or restarts > self._max_restarts:
                _say(f"{why}; {'the job was to stop' if asked else f'{restarts} attempts came no further'}.")
                return _Outcome(end.code, again=asked.startswith("SIG"))
            self._hosts.blame(blamed, end)
            _say(f"{why}; all ranks start again from step {now:,} (restart {restarts} of {self._max_restarts}).")
        _say(f"of {' '.join(self._hosts.hosts)} fewer than {self._hosts.wanted} nodes are left.")
        return _Outcome(_STOPPED, again=True)

    def _asked(self) -> str:
        """Who asked the ranks to stop, empty where nobody has. Nodes are told by Slurm, too, and write the signal's name."""
        try:
            return self._signal or self._run.stop_file.read_text("utf-8").strip()
        except FileNotFoundError:
            return ""

    def _progress(self) -> int:
        return max((one.step for one in list_checkpoints(self._run.checkpoints)), default=0)

    def _step(self, hosts: Sequence[str], what: str) -> StepEnd:
        """One step of the job on these hosts; what srun says is read as it comes."""
        places = [f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", f"--nodelist={','.join(hosts)}"]
        process = subprocess.Popen(
            [self._command[0], *places, *self._command[1:], what], stderr=subprocess.PIPE, text=True, errors="replace"
        )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_pass_on, args=(process, lines), daemon=True).start()
        end, failed_at, killed = StepEnd(), 0.0, False
        while True:
            try:
                line = lines.get(timeout=0.2)
            except queue.Empty:
                line = ""
            if line is None:
                break
            # what becomes of tasks after the step was ended is our doing
            if end.read(line, tasks=not killed) and not failed_at:
                failed_at = time.monotonic()
            waited = time.monotonic() - failed_at if failed_at else 0.0
            if waited > _OTHERS_SECONDS and not killed:
                killed = True
                end_steps(self._job.name)
            if waited > _OTHERS_SECONDS + _ENDING_SECONDS:
                process.kill()
        code = process.wait()
        end.code = code if code >= 0 else 128 - code
        return end


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code of the batch script."""
    split = arguments.index("--")
    parser = argparse.ArgumentParser("slurm_attempts")
    parser.add_argument("run", type=Path)
    for name in ("nodes", "max-restarts", "max-requeues"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args(arguments[:split])
    run = RunFolder(given.run)
    name = os.environ["SLURM_JOB_ID"]
    if task := os.environ.get("SLURM_ARRAY_TASK_ID"):
        # one task's number is that of the array
        name = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    job = _Job(os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0")), name)
    outcome = _Outcome(1)
    try:
        hosts = JobHosts(expand_hosts(os.environ["SLURM_JOB_NODELIST"]), given.nodes)
        attempts = JobAttempts(run, job, arguments[split + 1 :], hosts, given.max_restarts)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, attempts.stop)
        outcome = attempts.run()
    except DistattnError as error:
        _say(str(error))
        outcome = _Outcome(error.exit_code)
    finally:
        # before the job is queued again, which ends this process
        run.state_file.write_text(f"ended {outcome.code}\n", "utf-8")
    if outcome.again:
        _queue_again(job, given.max_requeues)
    return outcome.code


def _queue_again(job: _Job, most: int) -> None:
    if job.requeues >= most:
        times = f"was queued again {job.requeues} times, slurm.max_requeues" if most else "is not queued again"
        _say(f"job {job.number} {times}; sbatch RUN/job.sbatch goes on from the newest checkpoint, if there is one.")
        return
    try:
        # a job that was cancelled, or that Slurm itself queues again, is not running any more
        if job_state(job.name, OUTAGE_SECONDS) == "RUNNING":
            ask_slurm("scontrol", "requeue", job.name, patience=OUTAGE_SECONDS)
    except DistattnError as error:
        _say(f"job {job.number} is not queued again: {error}")


def _pass_on(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        sys.stderr.write(line)
        sys.stderr.flush()
        lines.put(line)
    lines.put(None)


def _port(job: int, attempt: int) -> int:
    """Where the first node listens: a port of each attempt's own, since ranks of the one before may still hold theirs."""
    return 20_000 + (job + 1_009 * attempt) % 20_000


def _say(text: str) -> None:
    sys.stderr.write(f"distattn: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
