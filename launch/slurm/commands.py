"""Runs Slurm's commands, and parses what they report about jobs and nodes."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence

from distattn.ir.errors import DistattnError

# states of nodes that cannot run a step; Slurm appends a star to the state of a node that does not respond
_UNUSABLE = ("down", "fail", "error", "power", "reboot", "unknown")

# messages about an unresponsive controller, as when a backup takes over; seconds that this may take; seconds between requests
_UNANSWERED = re.compile(r"[Uu]nable to contact|timed out|[Cc]onnection refused|connect failure|Zero Bytes")
OUTAGE_SECONDS, _PAUSE_SECONDS = 120.0, 2.0


class SlurmError(DistattnError):
    """An error of a Slurm command: Slurm refused the request or did not respond. answer: Slurm's message."""

    def __init__(self, command: str, answer: str):
        super().__init__(f"{command} refused: {answer}")
        self.answer = answer


def ask_slurm(*command: str, patience: float = 0.0) -> str:
    """Run a Slurm command and return its output. Raises SlurmError with Slurm's message if the command fails.

    patience: seconds during which the command is retried while the controller does not respond.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise DistattnError(f"there is no {command[0]} here: run this on a machine of a Slurm cluster.") from None
        if not done.returncode:
            return done.stdout.strip()
        message = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        if time.monotonic() >= deadline or not _UNANSWERED.search(message):
            raise SlurmError(command[0], message)
        time.sleep(_PAUSE_SECONDS)


def expand_hosts(names: str) -> list[str]:
    """Return the nodes in a list in Slurm's notation, in which node[1-2,7] means node1, node2 and node7."""
    return ask_slurm("scontrol", "show", "hostnames", names).split() if "[" in names or "," in names else [names]


def host_address(host: str) -> str:
    """Return the address of a node, which may differ from its name."""
    fields = ask_slurm("scontrol", "show", "node", host, patience=OUTAGE_SECONDS).split()
    return next((field.removeprefix("NodeAddr=") for field in fields if field.startswith("NodeAddr=")), host)


def unusable_hosts(hosts: Sequence[str]) -> set[str]:
    """Return the nodes in `hosts` that are down or do not respond to Slurm."""
    states = _node_states(f"--nodes={','.join(hosts)}")
    return {host for host, state in states if state.endswith("*") or state.startswith(_UNUSABLE)}


def usable_hosts(partition: str) -> set[str]:
    """Return the nodes of a partition that can run jobs, whether busy or free. partition: "" for the entire cluster."""
    states = _node_states(*([f"--partition={partition}"] if partition else []))
    unusable = *_UNUSABLE, "drain", "maint"
    return {host for host, state in states if not state.endswith("*") and not state.startswith(unusable)}


def _node_states(*options: str) -> list[list[str]]:
    """Return [node, state] for each node that sinfo reports. A node in several partitions occurs several times."""
    lines = ask_slurm("sinfo", "--noheader", "--Node", *options, "--format=%N %T", patience=OUTAGE_SECONDS).splitlines()
    return [line.split() for line in lines if len(line.split()) == 2]


def avoided_hosts(job: str) -> list[str]:
    """Return the nodes that a job excludes."""
    fields = ask_slurm("scontrol", "show", "job", job, patience=OUTAGE_SECONDS).split()
    hosts = next((field.removeprefix("ExcNodeList=") for field in fields if field.startswith("ExcNodeList=")), "(null)")
    return [] if hosts in ("", "(null)") else expand_hosts(hosts)


def avoid_hosts(job: str, hosts: Sequence[str]) -> None:
    """Exclude more nodes for a pending job, in addition to those that it excludes already."""
    avoided = dict.fromkeys([*avoided_hosts(job), *hosts])
    ask_slurm("scontrol", "update", f"jobid={job}", f"excnodelist={','.join(avoided)}", patience=OUTAGE_SECONDS)


def job_state(job: str, patience: float = 0.0) -> str:
    """Return a job's state in Slurm, such as RUNNING; "" if Slurm has forgotten the job. patience: see `ask_slurm`."""
    try:
        return ask_slurm("squeue", "--noheader", "--jobs", job, "--format=%T", patience=patience)
    except SlurmError as error:
        # Slurm forgets a job some minutes after it ends
        if "Invalid job id" not in error.answer:
            raise
        return ""


def end_steps(job: str) -> None:
    """Kill the steps of a job, but not its batch script."""
    command = "squeue", "--noheader", "--steps", "--jobs", job, "--format=%i"
    steps = ask_slurm(*command, patience=OUTAGE_SECONDS).split()
    if numbered := [step for step in steps if step.rpartition(".")[2].isdecimal()]:
        ask_slurm("scancel", "--signal=KILL", *numbered, patience=OUTAGE_SECONDS)
