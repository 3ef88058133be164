"""Slurm's own commands, and what they say of jobs and nodes."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from distattn.ir.errors import DistattnError

# of nodes that take no step; a node that does not answer has a star behind its state
_UNUSABLE = ("down", "fail", "error", "power", "reboot", "unknown")


def ask_slurm(*command: str) -> str:
    """What a command of Slurm's prints. Raises DistattnError with its own words where it refuses."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise DistattnError(f"there is no {command[0]} here: run this on a machine of a Slurm cluster.") from None
    if done.returncode:
        words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise DistattnError(f"{command[0]} refused: {words}")
    return done.stdout.strip()


def expand_hosts(names: str) -> list[str]:
    """The nodes of a list as Slurm writes it: node[1-2,7] is node1, node2, node7."""
    return ask_slurm("scontrol", "show", "hostnames", names).split() if "[" in names or "," in names else [names]


def host_address(host: str) -> str:
    """Where a node listens, which need not be its name."""
    words = ask_slurm("scontrol", "show", "node", host).split()
    return next((word.removeprefix("NodeAddr=") for word in words if word.startswith("NodeAddr=")), host)


def unusable_hosts(hosts: Sequence[str]) -> set[str]:
    """Those of some nodes that Slurm knows to be down, or that do not answer it."""
    lines = ask_slurm("sinfo", "--noheader", "--Node", f"--nodes={','.join(hosts)}", "--format=%N %T").splitlines()
    states = [line.split() for line in lines if len(line.split()) == 2]
    return {host for host, state in states if state.endswith("*") or state.startswith(_UNUSABLE)}


def job_state(job: str) -> str:
    """Slurm's word for the state of a job, such as RUNNING; empty once Slurm has forgotten it."""
    try:
        return ask_slurm("squeue", "--noheader", "--jobs", job, "--format=%T")
    except DistattnError as error:
        # Slurm forgets a job some minutes after its end
        if "Invalid job id" not in str(error):
            raise
        return ""


def end_steps(job: str) -> None:
    """Kill the steps of a job, but not its batch script."""
    steps = ask_slurm("squeue", "--noheader", "--steps", "--jobs", job, "--format=%i").split()
    if numbered := [step for step in steps if step.rpartition(".")[2].isdecimal()]:
        ask_slurm("scancel", "--signal=KILL", *numbered)
