"""The attempts of a run inside one Slurm job: `python -m distattn.launch.slurm.attempts RUN ... -- srun ...`, on its first node.

The batch script execs this process. Each attempt is a job step on as many nodes as the run needs, with its own address. After
a lost node or killed ranks, the next attempt runs on the remaining nodes. When Slurm signals the time limit or a preemption,
the ranks save and end with exit code 75, and the job is requeued. Needs neither torch nor a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from distattn.ir.errors import DistattnError, RunStopped
from distattn.ir.text_format import print_message
from distattn.launch.attempt_end import OTHERS_SECONDS, AttemptEnd, LeftOut
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
    unusable_hosts,
    usable_hosts,
)
from distattn.supervision.helper_processes import shell_exit_code
from distattn.training.run_folder import RunFolder

# a step is killed OTHERS_SECONDS after its first failure; srun is killed if the step has not ended this many seconds
# after that
_ENDING_SECONDS = 15.0
# srun's messages about tasks and nodes
_TASK_ENDED = re.compile(r"srun: error: (\S+): tasks? [\d,\[\]-]+: (?:Exited with exit code (\d+)|(\w[^\n]*))")
_NO_STEP = re.compile(r"srun: error: Unable to create step for job \S+: (.*\S)")
_NODE_LOST = re.compile(r"srun: error: (?:Node failure on|[^\n]*failed on node) ([\w.,\[\]-]+)")


class _Job(NamedTuple):
    """The Slurm job of this process. requeues: how often it was requeued; at most max_requeues.

    name: its name in Slurm's commands; for an array task, the name of this task, not of the array.
    """

    number: str
    requeues: int
    max_requeues: int
    name: str
    partition: str


class JobNodes:
    """Runs each attempt as a step on the nodes of a job.

    command: srun and the command that it starts. hosts: all nodes of the job. wanted: number of nodes per attempt.
    """

    def __init__(self, job: _Job, command: Sequence[str], hosts: Sequence[str], wanted: int):
        self._job, self._command, self._hosts, self._wanted = job, list(command), list(hosts), wanted
        self._left_out = LeftOut()

    def choose(self) -> list[str] | None:
        """Return the first usable nodes in Slurm's order, or None if there are too few."""
        unusable = unusable_hosts(self._hosts)
        usable = [host for host in self._hosts if host not in self._left_out.hosts and host not in unusable]
        return usable[: self._wanted] if len(usable) >= self._wanted else None

    def run(self, hosts: Sequence[str], attempt: int) -> AttemptEnd:
        """Run the attempt as a job step, with an address of its own."""
        address = f"{host_address(hosts[0])}:{_port(int(self._job.number), attempt)}"
        print_message(f"attempt {attempt} of job {self._job.number} on {' '.join(hosts)}, led by {address}")
        return self._step(hosts, address)

    def finish(self, hosts: Sequence[str]) -> int:
        """Write the report in a step on the first host. Return its exit code."""
        return self._step(hosts[:1], "finish").code

    def blame(self, hosts: Sequence[str], end: AttemptEnd) -> None:
        """Leave hosts out of later attempts. See `LeftOut.blame`."""
        self._left_out.blame(hosts, end, spare=len(self._hosts) - len(self._left_out.hosts) - self._wanted)

    def give_back(self) -> str:
        """Return a clause that names the repeatedly failing nodes that no spare replaces; the job is then requeued without them.

        Return "" if there are no such nodes, if no requeues are left, or if Slurm has too few other nodes.
        """
        stuck = [host for host in self._left_out.failing if host not in self._left_out.hosts]
        if self._job.requeues >= self._job.max_requeues or not stuck or not self.to_avoid():
            return ""
        return f"{' '.join(stuck)} failed repeatedly and is given back"

    def to_avoid(self) -> list[str]:
        """Return the nodes that failed repeatedly, or [] if Slurm has too few others."""
        if not (failing := self._left_out.failing):
            return []
        others = usable_hosts(self._job.partition) - {*failing, *avoided_hosts(self._job.name)}
        return failing if len(others) >= len(self._hosts) else []

    def shortage(self) -> str:
        """Return a sentence that says how many nodes are needed and which nodes the job has."""
        return f"fewer than {self._wanted} nodes are left of {' '.join(self._hosts)}"

    def _step(self, hosts: Sequence[str], argument: str) -> AttemptEnd:
        """Run a job step on these hosts, and read srun's messages as they arrive. argument: the last argument of `run_node`."""
        placement = [f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", f"--nodelist={','.join(hosts)}"]
        process = subprocess.Popen(
            [self._command[0], *placement, *self._command[1:], argument],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
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
            # ignore tasks that end after the step was killed: they did not fail by themselves
            if _read_srun_line(end, line, tasks=not killed) and not failed_at:
                failed_at = time.monotonic()
            waited = time.monotonic() - failed_at if failed_at else 0.0
            if waited > OTHERS_SECONDS and not killed:
                killed = True
                try:
                    end_steps(self._job.name)
                except SlurmError as error:
                    # the step may have ended by now
                    print_message(str(error))
            if waited > OTHERS_SECONDS + _ENDING_SECONDS:
                process.kill()
        end.code = shell_exit_code(process.wait())
        return end


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit code of the batch script."""
    split = arguments.index("--")
    options = _parsed(arguments[:split])
    run = RunFolder(options.run)
    job = _noted_job(run, options.max_requeues)
    outcome, nodes = Outcome(1), None
    try:
        hosts = expand_hosts(os.environ["SLURM_JOB_NODELIST"])
        nodes = JobNodes(job, arguments[split + 1 :], hosts, options.nodes)
        facts = {"job": int(job.number), "requeues": job.requeues}
        attempts = NodeAttempts(run, nodes, options.max_restarts, facts)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, attempts.stop)
        if options.asked:
            attempts.stop(signal.Signals[options.asked])
        outcome = attempts.run()
    except SlurmError as error:
        # Slurm is at fault, not the run, so let the run continue later
        print_message(str(error))
        outcome = Outcome(RunStopped.exit_code, again=True)
    except DistattnError as error:
        print_message(str(error))
        outcome = Outcome(error.exit_code)
    finally:
        # write this before requeuing the job, which ends this process
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
    # a signal that the batch script received before it started this process
    parser.add_argument("--asked", default="")
    for name in ("nodes", "max-restarts", "max-requeues"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args(arguments)


def _noted_job(run: RunFolder, max_requeues: int) -> _Job:
    """Read the job from Slurm's environment variables, record it in the folders of the run and its sweep, and return it."""
    number = name = os.environ["SLURM_JOB_ID"]
    notes: list[tuple[RunFolder, int | str]] = [(run, int(number))]
    if task := os.environ.get("SLURM_ARRAY_TASK_ID"):
        # SLURM_JOB_ID does not identify the task: one of the tasks has the same number as the array
        array = os.environ["SLURM_ARRAY_JOB_ID"]
        name = f"{array}_{task}"
        notes = [(run, name), (RunFolder(run.folder.parent), int(array))]
    for folder, job in notes:
        # a script that the user submits again gets a new number; all tasks of a sweep record the same array number
        with contextlib.suppress(OSError):
            folder.note_job(job)
    requeues = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return _Job(number, requeues, max_requeues, name, os.environ.get("SLURM_JOB_PARTITION", ""))


def _queue_again(job: _Job, nodes: JobNodes | None) -> None:
    if job.requeues >= job.max_requeues:
        times = (
            f"was queued again {job.requeues} times, slurm.max_requeues" if job.max_requeues else "is not queued again"
        )
        print_message(
            f"job {job.number} {times}; sbatch RUN/job.sbatch continues from the newest checkpoint, if there is one."
        )
        return
    try:
        # a job that was cancelled, or that Slurm requeues by itself, is no longer running
        if job_state(job.name, OUTAGE_SECONDS) == "RUNNING":
            avoid = nodes.to_avoid() if nodes is not None else []
            # Slurm sends SIGTERM to all processes of a requeued job, including scontrol, which inherits this disposition
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            ask_slurm("scontrol", "requeue", job.name, patience=OUTAGE_SECONDS)
            if avoid:
                # Slurm accepts this only for a pending job, and does not kill this process before KillWait has passed
                avoid_hosts(job.name, avoid)
                print_message(
                    f"job {job.number} starts again without {' '.join(avoid)}; scontrol update excnodelist= allows all nodes."
                )
    except DistattnError as error:
        print_message(f"job {job.number} is not queued again: {error}")


def _read_srun_line(end: AttemptEnd, line: str, tasks: bool) -> bool:
    """Add the facts in a line of srun's output to `end`, and return whether it reports a failure.

    tasks: False to ignore ends of tasks.
    """
    if match := _NO_STEP.search(line):
        end.unstarted = match[1]
        return True
    if match := _NODE_LOST.search(line):
        end.lost += [host for host in expand_hosts(match[1]) if host not in end.lost]
        return True
    if not tasks or not (match := _TASK_ENDED.search(line)):
        return False
    code = int(match[2]) if match[2] else None
    failed = [end.add(host, code, f"was {match[3].lower()}" if code is None else "") for host in expand_hosts(match[1])]
    return any(failed)


def _pass_on(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        sys.stderr.write(line)
        sys.stderr.flush()
        lines.put(line)
    lines.put(None)


def _port(job: int, attempt: int) -> int:
    """Return the first node's port. It differs between attempts, since ranks of the previous attempt may still hold its port."""
    return 20_000 + (job + 1_009 * attempt) % 20_000


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
