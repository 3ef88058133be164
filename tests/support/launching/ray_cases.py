"""Simulates failing Ray nodes. `python ray_cases.py ADDRESS FOLDER` prints the result of `RayNodes` in each case.

The agents are real actors. The file FOLDER/NODE says what a node's agent does instead of running a launcher: return an
exit code, die, or stay silent.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray

from distattn.launch.attempts import Attempts
from distattn.launch.node_needs import NodeNeeds
from distattn.launch.ray import agent as ray_agent
from distattn.launch.ray import nodes as ray_nodes
from distattn.training.run_folder import RunFolder

# Ray's workers get only this script's folder in their path
sys.path.append(str(Path(__file__).parents[1]))
from waiting import LIMIT_SECONDS, eventually  # noqa: E402


class Agent(ray_agent.NodeAgent):
    """An agent whose behaviour is read from its node's file."""

    def _says(self) -> str:
        name = ray_nodes.node_names()[ray.get_runtime_context().get_node_id()]
        file = Path(os.environ["CASES"], name)
        return file.read_text() if file.exists() else "0"

    def place(self) -> ray_agent.NodePlace:
        """Return the node's place, or hang if the node's file says "silent"."""
        if self._says() == "silent":
            Path(os.environ["CASES"], f"{ray.get_runtime_context().get_actor_id()}.silent").touch()
            time.sleep(3600)
        return super().place()

    def run(self, folder: Path, job: str, attempt: int, *arguments: str) -> int:
        """Return the exit code in the node's file, or kill this process if the file says "die"."""
        if self._says() == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return int(self._says())


class Clock:
    """A stand-in for the module `time` in `nodes`, which tests advance."""

    seconds = 0.0

    def monotonic(self) -> float:
        """Return the real time plus the seconds that the test has added."""
        return time.monotonic() + self.seconds


class Answers:
    """A stand-in for `nodes._answers` that gives each answering agent as much time as it needs, however busy the
    machine is.
    """

    def __init__(self, folder: Path, clock: Clock):
        self._folder, self._clock, self._truly = folder, clock, ray_nodes._answers

    def __call__(self, asked: list[Any]) -> list[ray_agent.NodePlace | str]:
        def silent() -> list[Path]:
            return list(self._folder.glob("*.silent"))

        def all_known() -> bool:
            return len(ray.wait(asked, num_returns=len(asked), timeout=0)[0]) + len(silent()) == len(asked)

        eventually(all_known, "an agent neither answers nor is silent")
        for file in silent():
            file.unlink()
            self._clock.seconds += 60
        return self._truly(asked)


def main(address: str, folder: str) -> None:
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": {"CASES": folder}})
    run, needs, results = RunFolder(Path(folder)), NodeNeeds(2, 0, 2), {}
    clock = Clock()
    stands_in = {"NodeAgent": Agent, "_answers": Answers(run.folder, clock), "_ANSWER_SECONDS": 1.0, "time": clock}
    with patch.multiple(ray_nodes, **stands_in):

        def size(waiting: float) -> ray_nodes.NodeCounts:
            return ray_nodes.NodeCounts((2,), waiting, 5.0, lambda count: None)

        # even a busy machine finds room in far less time than this
        nodes = ray_nodes.RayNodes(run, "a job", needs, size(LIMIT_SECONDS))

        def attempt(name: str, **says: str) -> None:
            for node, behaviour in says.items():
                Path(folder, node).write_text(behaviour)
            hosts = nodes.choose()
            assert hosts is not None, nodes.shortage()
            end = nodes.run(hosts, 1)
            results[name] = [hosts, end.code, *end.cause(hosts, {})]
            if end.code:
                nodes.blame(end.blamed(hosts), end)

        attempt("ends")
        first, second = results["ends"][0]
        attempt("dies", **{second: "die"})
        attempt("fails twice", **{second: "137"})
        attempt("is left out", **{second: "0"})
        (third,) = set(results["is left out"][0]) - {first}
        results["nodes"] = [first, second, third]
        attempt("is taken again", **{third: "silent"})
        # the agent on the third node, which was slow before, now answers, but the agent on the second node does not
        attempt("was slow", **{third: "0", second: "silent"})
        Path(folder, first).write_text("silent")
        Path(folder, third).write_text("silent")
        nodes._size = size(100.0)
        results["no room"] = [nodes.choose(), nodes.shortage()]
        nodes.close()
    # run an attempt that is no longer the latest
    attempts = Attempts(run.attempts)
    for _ in range(2):
        attempts.end(attempts.begin(), 0, "ended well")
    with patch.object(subprocess, "Popen", lambda *_, popen=subprocess.Popen, **__: popen(["sleep", "3600"])):
        results["given up"] = ray_agent.NodeAgent().run(Path(folder), "a job", 2)
    sys.stdout.write(f"found {json.dumps(results)}\n")


if __name__ == "__main__":
    # actors must import the class from a module other than __main__
    import ray_cases

    ray_cases.main(*sys.argv[1:])
