"""Slurm's own commands, and what they say of jobs and nodes."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence

from distattn.ir.errors import DistattnError

# of nodes that take no step; a node that does not answer has a star behind its state
_UNUSABLE = ("down", "fail", "error", "power", "reboot", "unknown")

# a controller that another one takes over for; how long that may take, and how often it is asked
_UNANSWERED = re.compile(r"[Uu]nable to contact|timed out|[Cc]onnection refused|connect failure|Zero Bytes")
OUTAGE_SECONDS, _PAUSE_SECONDS = 120.0, 2.0


class SlurmError(DistattnError):
    """Slurm refuses, or does not answer. answer: its own words."""

    def __init__(self, command: str, answer: str):
        super().__init__(f"{command} refused: {answer}")
        self.answer = answer


def ask_slurm(*command: str, patience: float = 0.0) -> str:
    """What a command of Slurm's prints. Raises SlurmError with its own words where it refuses.

    patience: seconds in which it is asked again where its controller does not answer.
    """
    ends = time.monotonic() + patience
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise DistattnError(f"there is no {command[0]} here: run this on a machine of a Slurm cluster.") from None
        if not done.returncode:
            return done.stdout.strip()
        words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        if time.monotonic() >= ends or not _UNANSWERED.search(words):
            raise SlurmError(command[0], words)
        time.sleep(_PAUSE_SECONDS)


def expand_hosts(names: str) -> list[str]:
    """The nodes of a list as Slurm writes it: node[1-2,7] is node1, node2, node7."""
    return ask_slurm("scontrol", "show", "hostnames", names).split() if "[" in names or "," in names else [names]


def host_address(host: str) -> str:
    """Where a node listens, which need not be its name."""
    words = ask_slurm("scontrol", "show", "node", host, patience=OUTAGE_SECONDS).split()
    return next((word.removeprefix("NodeAddr=") for word in words if word.startswith("NodeAddr=")), host)


def unusable_hosts(hosts: Sequence[str]) -> set[str]:
    """Those of some nodes that Slurm knows to be down, or that do not answer it."""
    command = "sinfo", "--noheader", "--Node", f"--nodes={','.join(hosts)}", "--format=%N %T"
    lines = ask_slurm(*command, patience=OUTAGE_SECONDS).splitlines()
    states = [line.split() for line in lines if len(line.split()) == 2]
    return {host for host, state in states if state.endswith("*") or state.startswith(_UNUSABLE)}


def usable_hosts(partition: str) -> set[str]:
    """The nodes of a partition, empty for all of the cluster, on which jobs may begin once these are free."""
    command = ["sinfo", "--noheader", "--Node", "--format=%N %T", *([f"--partition={partition}"] if partition else [])]
    lines = ask_slurm(*command, patience=OUTAGE_SECONDS).splitlines()
    states = [line.split() for line in lines if len(line.split()) == 2]
    unusable = *_UNUSABLE, "drain", "maint"
    return {host for host, state in states if not state.endswith("*") and not state.startswith(unusable)}


def avoided_hosts(job: str) -> list[str]:
    """The nodes on which a job must not begin."""
    words = ask_slurm("scontrol", "show", "job", job, patience=OUTAGE_SECONDS).split()
    found = next((word.removeprefix("ExcNodeList=") for word in words if word.startswith("ExcNodeList=")), "(null)")
    return [] if found in ("", "(null)") else expand_hosts(found)


def avoid_hosts(job: str, hosts: Sequence[str]) -> None:
    """Have a job that waits begin on none of these nodes, nor on those that it avoids already."""
    avoided = dict.fromkeys([*avoided_hosts(job), *hosts])
    ask_slurm("scontrol", "update", f"jobid={job}", f"excnodelist={','.join(avoided)}", patience=OUTAGE_SECONDS)


def job_state(job: str, patience: float = 0.0) -> str:
    """Slurm's word for the state of a job, such as RUNNING; empty once Slurm has forgotten it. patience: see `ask_slurm`."""
    try:
        return ask_slurm("squeue", "--noheader", "--jobs", job, "--format=%T", patience=patience)
    except SlurmError as error:
        # Slurm forgets a job some minutes after its end
        if "Invalid job id" not in error.answer:
            raise
        return ""


def end_steps(job: str) -> None:
    """Kill the steps of a job, but not its batch script."""
    command = "squeue", "--noheader", "--steps", "--jobs", job, "--format=%i"
    steps = ask_slurm(*command, patience=OUTAGE_SECONDS).split()
    if numbered := [step for step in steps if step.rpartition(".")[2].isdecimal()]:
        ask_slurm("scancel", "--signal=KILL", *numbered, patience=OUTAGE_SECONDS)
