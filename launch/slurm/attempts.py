"""The attempts of a run inside one Slurm job: `python -m distattn.launch.slurm.attempts RUN ... -- srun ...`, on its first node.

The batch script ends in it. Each attempt is a step of the job on as many of its nodes as the run wants, with an address of its
own. Where a node is lost, or ranks are killed, the next attempt follows on nodes that are left. When Slurm tells of the time
limit or a preemption, the ranks save and end with exit code 75, and the job is queued again. Needs neither torch nor a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from distattn.ir.errors import DistattnError, RunStopped
from distattn.launch.attempt_end import OTHERS_SECONDS, AttemptEnd
from distattn.launch.command_line import print_message
from distattn.launch.node_attempts import NodeAttempts, Outcome
from distattn.launch.slurm.commands import (
    OUTAGE_SECONDS,
    SlurmError,
    ask_slurm,
    avoid_hosts,
    avoided_hosts,
    end_steps,
    expand_hosts,
    host_address,
    job_state,
    usable_hosts,
)
from distattn.launch.slurm.steps import JobHosts, read_srun_line
from distattn.training.run_folder import RunFolder

# for Slurm to end a step of which one node has failed, and OTHERS_SECONDS have passed
_ENDING_SECONDS = 15.0


class _Job(NamedTuple):
    """This job. requeues: how often it was queued again, max_requeues at most.

    name: by which Slurm's commands know it alone, not the whole array.
    """

    number: str
    requeues: int
    max_requeues: int
    name: str
    partition: str


class JobNodes:
    """Runs attempts on nodes of a job, each as a step. command: srun and what it starts."""

    def __init__(self, job: _Job, command: Sequence[str], hosts: JobHosts):
        self._job, self._command, self._hosts = job, list(command), hosts

    def choose(self) -> list[str] | None:
        """The hosts of the next attempt: see `JobHosts.choose`."""
        return self._hosts.choose()

    def run(self, hosts: Sequence[str], attempt: int) -> AttemptEnd:
        """Run the attempt's step, at an address of its own."""
        address = f"{host_address(hosts[0])}:{_port(int(self._job.number), attempt)}"
        print_message(f"attempt {attempt} of job {self._job.number} on {' '.join(hosts)}, led by {address}")
        return self._step(hosts, address)

    def finish(self, hosts: Sequence[str]) -> int:
        """Write the report, as a step on the first host."""
        return self._step(hosts[:1], "finish").code

    def blame(self, hosts: Sequence[str], end: AttemptEnd) -> None:
        """See `JobHosts.blame`."""
        self._hosts.blame(hosts, end)

    def give_back(self) -> str:
        """Which node is given back that failed repeatedly and has no spare one: the job is queued again to go on without it."""
        if self._job.requeues >= self._job.max_requeues or not (stuck := self._hosts.stuck) or not self.to_avoid():
            return ""
        return f"{' '.join(stuck)} failed repeatedly and is given back"

    def to_avoid(self) -> list[str]:
        """The nodes that have failed repeatedly, where Slurm has enough others."""
        if not (failing := self._hosts.failing):
            return []
        others = usable_hosts(self._job.partition) - {*failing, *avoided_hosts(self._job.name)}
        return failing if len(others) >= len(self._hosts.hosts) else []

    def shortage(self) -> str:
        """Which nodes the job has."""
        return f"of {' '.join(self._hosts.hosts)} fewer than {self._hosts.wanted} nodes are left"

    def _step(self, hosts: Sequence[str], what: str) -> AttemptEnd:
        """One step of the job on these hosts; what srun says is read as it comes."""
        places = [f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", f"--nodelist={','.join(hosts)}"]
        process = subprocess.Popen(
            [self._command[0], *places, *self._command[1:], what], stderr=subprocess.PIPE, text=True, errors="replace"
        )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_pass_on, args=(process, lines), daemon=True).start()
        end, failed_at, killed = AttemptEnd(), 0.0, False
        while True:
            try:
                line = lines.get(timeout=0.2)
            except queue.Empty:
                line = ""
            if line is None:
                break
            # what becomes of tasks after the step was ended is our doing
            if read_srun_line(end, line, tasks=not killed) and not failed_at:
                failed_at = time.monotonic()
            waited = time.monotonic() - failed_at if failed_at else 0.0
            if waited > OTHERS_SECONDS and not killed:
                killed = True
                try:
                    end_steps(self._job.name)
                except SlurmError as error:
                    # the step may have ended by itself meanwhile
                    print_message(str(error))
            if waited > OTHERS_SECONDS + _ENDING_SECONDS:
                process.kill()
        code = process.wait()
        end.code = code if code >= 0 else 128 - code
        return end


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code of the batch script."""
    split = arguments.index("--")
    given = _parsed(arguments[:split])
    run = RunFolder(given.run)
    job = _noted_job(run, given.max_requeues)
    outcome, nodes = Outcome(1), None
    try:
        hosts = JobHosts(expand_hosts(os.environ["SLURM_JOB_NODELIST"]), given.nodes)
        nodes = JobNodes(job, arguments[split + 1 :], hosts)
        facts = {"job": int(job.number), "requeues": job.requeues}
        attempts = NodeAttempts(run, nodes, given.max_restarts, facts)
        for asked in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(asked, attempts.stop)
        if given.asked:
            attempts.stop(signal.Signals[given.asked])
        outcome = attempts.run()
    except SlurmError as error:
        # nothing is wrong with the run
        print_message(str(error))
        outcome = Outcome(RunStopped.exit_code, again=True)
    except DistattnError as error:
        print_message(str(error))
        outcome = Outcome(error.exit_code)
    finally:
        # before the job is queued again, which ends this process
        try:
            run.state_file.write_text(f"ended {outcome.code}\n", "utf-8")
        except OSError as error:
            print_message(
                f"{run.state_file}: cannot be written: {error.strerror}; the job ended with exit code {outcome.code}."
            )
    if outcome.again:
        _queue_again(job, nodes)
    return outcome.code


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("slurm.attempts")
    parser.add_argument("run", type=Path)
    # a signal that the script was sent before this began
    parser.add_argument("--asked", default="")
    for name in ("nodes", "max-restarts", "max-requeues"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args(arguments)


def _noted_job(run: RunFolder, max_requeues: int) -> _Job:
    """Note the job, as Slurm's variables have it, in the run's folder and in a sweep's; returns it."""
    number = name = os.environ["SLURM_JOB_ID"]
    notes: list[tuple[RunFolder, int | str]] = [(run, int(number))]
    if task := os.environ.get("SLURM_ARRAY_TASK_ID"):
        # one task's number is that of the array
        array = os.environ["SLURM_ARRAY_JOB_ID"]
        name = f"{array}_{task}"
        notes = [(run, name), (RunFolder(run.folder.parent), int(array))]
    for place, noted in notes:
        # another one than launch has noted where somebody submits the script again; the tasks of a sweep note the same
        with contextlib.suppress(OSError):
            place.note_job(noted)
    requeues = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return _Job(number, requeues, max_requeues, name, os.environ.get("SLURM_JOB_PARTITION", ""))


def _queue_again(job: _Job, nodes: JobNodes | None) -> None:
    if job.requeues >= job.max_requeues:
        times = (
            f"was queued again {job.requeues} times, slurm.max_requeues" if job.max_requeues else "is not queued again"
        )
        print_message(
            f"job {job.number} {times}; sbatch RUN/job.sbatch goes on from the newest checkpoint, if there is one."
        )
        return
    try:
        # a job that was cancelled, or that Slurm itself queues again, is not running any more
        if job_state(job.name, OUTAGE_SECONDS) == "RUNNING":
            avoid = nodes.to_avoid() if nodes is not None else []
            # to be queued again all of the job is sent SIGTERM, the command that asks for it included; who ignores it goes on
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            ask_slurm("scontrol", "requeue", job.name, patience=OUTAGE_SECONDS)
            if avoid:
                # Slurm takes this of jobs that wait, and kills this process after its KillWait
                avoid_hosts(job.name, avoid)
                print_message(
                    f"job {job.number} begins again without {' '.join(avoid)}; scontrol update excnodelist= allows all nodes."
                )
    except DistattnError as error:
        print_message(f"job {job.number} is not queued again: {error}")


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
