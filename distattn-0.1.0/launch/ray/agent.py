"""What runs on a node of a Ray cluster: an actor that starts `distattn.launch.run_node` as its child, and waits for it.

The ranks, what watches them and what is kept of them are the same as on Slurm; Ray places the actors, and tells of lost ones.
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

# how often an agent looks whether its attempt is still the one that goes on
_LOOK_SECONDS = 1.0


class NodePlace(NamedTuple):
    """Where an agent is. node: Ray's name of the node; port: one that is free at its address."""

    node: str
    address: str
    port: int


def child_environment() -> dict[str, str]:
    """The environment of a process that an actor or a task starts: it imports the same distattn, wherever Ray has it from."""
    environment = dict(os.environ)
    # Ray sets it to the number of CPUs; ranks are forked from a process that must have one thread
    environment.pop("OMP_NUM_THREADS", None)
    package = find_spec("distattn")
    assert package is not None and package.origin is not None
    places = [str(Path(package.origin).parents[1]), environment.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, places))}


class NodeAgent:
    """Of one node, for one attempt. An actor's class: its process ends with the driver's, and its child with it."""

    def place(self) -> NodePlace:
        """Where this agent is."""
        address = get_node_ip_address()
        with socket.socket() as free:
            free.bind((address, 0))
            return NodePlace(ray.get_runtime_context().get_node_id(), address, free.getsockname()[1])

    def run(self, folder: Path, job: str, attempt: int, *words: str) -> int:
        """Run `run_node FOLDER WORDS` for an attempt of a job, 0 for none. Returns its exit code, -N where signal N killed it.

        An agent of a node that was given up, but still lives, kills its ranks: a later attempt has them now.
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
        # signals of a terminal are for the driver
        child = subprocess.Popen([*command, *words], env=environment, start_new_session=True)
        attempts = Attempts(RunFolder(folder).attempts)
        while True:
            try:
                return child.wait(_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                if attempt and attempts.latest > attempt:
                    child.kill()
