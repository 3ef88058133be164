"""The actor on a node of a Ray cluster, which starts `distattn.launch.run_node` as its child and waits for it.

The ranks, their supervision and their records are the same as on Slurm; Ray places the actors and reports lost ones.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import ray
from ray.util import get_node_ip_address

from distattn.checkpoints.owner import JOB_VARIABLE
from distattn.launch.attempts import Attempts
from distattn.training.run_folder import RunFolder

# seconds between two checks that no later attempt has begun
_LOOK_SECONDS = 1.0


class NodePlace(NamedTuple):
    """The place of an agent. node: Ray's id of the node; port: a free port at its address."""

    node: str
    address: str
    port: int


def child_environment() -> dict[str, str]:
    """Return the environment of a process that an actor or a task starts, so that it imports the same distattn."""
    environment = dict(os.environ)
    # Ray sets it to the number of CPUs; ranks are forked from a process that must have one thread
    environment.pop("OMP_NUM_THREADS", None)
    package = find_spec("distattn")
    assert package is not None and package.origin is not None
    folders = [str(Path(package.origin).parents[1]), environment.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


class NodeAgent:
    """The actor on one node for one attempt. Its process ends with the driver's process, and its child ends with it."""

    def place(self) -> NodePlace:
        """Return where this agent runs."""
        address = get_node_ip_address()
        with socket.socket() as free:
            free.bind((address, 0))
            return NodePlace(ray.get_runtime_context().get_node_id(), address, free.getsockname()[1])

    def run(self, folder: Path, job: str, attempt: int, *arguments: str) -> int:
        """Run `run_node FOLDER ARGUMENTS`. Return its exit code, -N if signal N killed it. attempt: 0 for the report.

        The agent of a node that was given up but still lives kills its ranks when a later attempt begins.
        """
        environment = child_environment() | {JOB_VARIABLE: job}
        module = "distattn.launch.run_node"
        command = [
            sys.executable,
            "-m",
            "distattn.launch.ranks.die_with_launcher",
            str(os.getpid()),
            module,
            str(folder),
        ]
        # a terminal's signals are for the driver
        child = subprocess.Popen([*command, *arguments], env=environment, start_new_session=True)
        attempts = Attempts(RunFolder(folder).attempts)
        while True:
            try:
                return child.wait(_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                if attempt and attempts.latest > attempt:
                    child.kill()
