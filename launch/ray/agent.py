"""The Ray actor on each node, which starts `distattn.launch.run_node` as its child process and waits for it.

Ranks, supervision and records are the same as on Slurm. Ray only places the actors and reports lost ones.
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

# seconds between checks for a later attempt
_LOOK_SECONDS = 1.0


class NodePlace(NamedTuple):
    """The location of an agent. node: Ray's node id. address: the node's address. port: a free port at that address."""

    node: str
    address: str
    port: int


def child_environment() -> dict[str, str]:
    """Return the environment for a process started by an actor or task, so that it imports the same distattn."""
    environment = dict(os.environ)
    # Ray sets it to the number of CPUs, but the process from which ranks are forked must have only one thread
    environment.pop("OMP_NUM_THREADS", None)
    package = find_spec("distattn")
    assert package is not None and package.origin is not None
    folders = [str(Path(package.origin).parents[1]), environment.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


class NodeAgent:
    """The actor on one node for one attempt. The actor's process ends with the driver, and the child process with the actor's."""

    def place(self) -> NodePlace:
        """Return the location of this agent, with a port that is free now."""
        address = get_node_ip_address()
        with socket.socket() as free:
            free.bind((address, 0))
            return NodePlace(ray.get_runtime_context().get_node_id(), address, free.getsockname()[1])

    def run(self, folder: Path, job: str, attempt: int, *arguments: str) -> int:
        """Run `run_node FOLDER ARGUMENTS`. Return its exit code, or -N if signal N killed it.

        attempt: its number, or 0 for the report. An agent that the driver has given up on but that is still alive kills its ranks
        when a later attempt begins.
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
        # in a session of its own, since a terminal's signals are meant for the driver
        child = subprocess.Popen([*command, *arguments], env=environment, start_new_session=True)
        attempts = Attempts(RunFolder(folder).attempts)
        while True:
            try:
                return child.wait(_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                if attempt and attempts.latest > attempt:
                    child.kill()
