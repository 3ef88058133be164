"""Runs one run's attempts on a Ray cluster, and records their state in the run folder."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray

from distattn.checkpoints.owner import JOB_VARIABLE
from distattn.ir.errors import DistattnError, RunStopped
from distattn.ir.text_format import print_message
from distattn.launch.elastic_run import ElasticRun
from distattn.launch.node_attempts import NodeAttempts, Outcome
from distattn.launch.node_needs import node_needs
from distattn.launch.ray.head import resume_command
from distattn.launch.ray.nodes import NodeCounts, RayNodes
from distattn.launch.run_status import ray_facts
from distattn.launch.stop_signals import CommandStopped
from distattn.training.config.run_file import Config
from distattn.training.reporting.json_lines import write_whole
from distattn.training.run_folder import RunFolder


class RayRun:
    """The attempts of one run on the connected cluster."""

    def __init__(self, run: RunFolder, config: Config, job: str):
        """Record that the run is waiting. job: the result of `new_job`. Raises the same errors as `ElasticRun`."""
        self.run, self.needs = run, node_needs(config)
        last = ray_facts(run) if run.ray_file.exists() else {}
        elastic = ElasticRun(run, config, last.get("nodes", 0), launcher_facts())
        self.most_nodes = elastic.counts[0]
        note_launcher(run, "waiting", nodes=self.most_nodes)
        size = NodeCounts(elastic.counts, config.ray.waiting_seconds, config.ray.shrink_seconds, elastic.resize)
        self._nodes = RayNodes(run, job, self.needs, size)
        self._attempts = NodeAttempts(run, self._nodes, config.supervision.max_restarts, elastic.facts)

    def stop(self, number: int) -> None:
        """Ask the ranks to save and end with exit code 75. number: number of the signal that requests it."""
        self._attempts.stop(number)

    def train(self) -> int:
        """Run attempts until the run has ended, or cannot continue. Return the exit code."""
        note_state(self.run, "running")
        outcome = Outcome(1)
        try:
            outcome = self._attempts.run()
        except DistattnError as error:
            print_message(str(error))
            outcome = Outcome(error.exit_code)
        except CommandStopped as stop:
            outcome = Outcome(stop.exit_code)
            raise
        finally:
            self._nodes.close()
            try:
                note_state(self.run, f"ended {outcome.code}")
            except OSError as error:
                print_message(
                    f"{self.run.state_file}: cannot be written: {error.strerror}; the run ended with exit code {outcome.code}."
                )
        if outcome.code == RunStopped.exit_code:
            print_message(f"{resume_command(self.run.folder)} continues from the newest checkpoint.")
        return outcome.code


def launcher_facts() -> dict[str, Any]:
    """Return the host and process of this launcher, and the address of its cluster."""
    return {"cluster": ray.get_runtime_context().gcs_address, "host": socket.gethostname(), "launcher": os.getpid()}


def note_launcher(run: RunFolder, state: str, **facts: Any) -> None:
    """Record the launcher and the state in the folder of a run or sweep. facts: additional facts to record."""
    all_facts = {"job": ray.get_runtime_context().get_job_id(), **launcher_facts(), **facts}
    write_whole(run.ray_file, json.dumps(all_facts) + "\n")
    note_state(run, state)


def note_state(run: RunFolder, state: str) -> None:
    """Record the state of a run: "waiting", "running" or "ended CODE"."""
    write_whole(run.state_file, f"{state}\n")


def new_job() -> str:
    """Return a job name for this driver's runs. This process also uses it, because it changes configurations in run folders."""
    job = f"Ray job {ray.get_runtime_context().get_job_id()} ({secrets.token_hex(4)})"
    os.environ[JOB_VARIABLE] = job
    return job


@contextmanager
def stopping(stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop` with the signal's number on SIGTERM and Ctrl-C. A second Ctrl-C ends this process and the ranks."""

    def handle(number: int, frame: FrameType | None) -> None:
        stop(number)
        signal.signal(signal.SIGINT, again)

    def again(number: int, frame: FrameType | None) -> None:
        raise CommandStopped(number)

    before = {name: signal.signal(name, handle) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
