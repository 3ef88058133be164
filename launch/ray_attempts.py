"""The attempts of a run on a Ray cluster: `python -m distattn.launch.ray_attempts RUN`, which goes on with the run of a folder.

`distattn launch ray` does the same with a new run. Where a node is lost, or ranks are killed or hang, the next attempt follows on
nodes that are left, or that were added. Needs a Ray cluster whose nodes share the run folder, and neither torch nor a GPU here.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray

from distattn.checkpoints.owner import JOB_VARIABLE
from distattn.ir.errors import DistattnError, RunStopped
from distattn.launch.command_line import say
from distattn.launch.elastic_run import ElasticRun
from distattn.launch.node_attempts import NodeAttempts, Outcome
from distattn.launch.node_needs import node_needs
from distattn.launch.ray_nodes import NodeCounts, RayNodes
from distattn.launch.run_status import ray_facts
from distattn.training import config as configuration
from distattn.training.config import Config
from distattn.training.run_folder import RunFolder

# of ray.address: a new cluster on this machine
_HERE = "local"


@contextmanager
def connected(config: Config, quiet: bool) -> Iterator[None]:
    """Around a run: this process is a driver of a Ray cluster, of a new one here where none was named or found.

    quiet: nothing of what processes of the cluster print appears here. Raises DistattnError where no cluster can be had.
    """
    given: dict[str, Any] = {"log_to_driver": not quiet, "logging_level": "ERROR"}
    if config.ray.address == _HERE or not _joined(config.ray.address, given):
        needs = node_needs(config)
        if config.parallel.ranks > needs.ranks:
            raise DistattnError(
                f"launch ray: {config.parallel.ranks // needs.ranks} nodes want a Ray cluster, and a new one here has one: name "
                "another (--ray.address=HOST:PORT), or start it (ray start)."
            )
        # ranks may share cores here, as those of `distattn launch local`
        cores = max(os.cpu_count() or 1, needs.cpus)
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **given)
    try:
        yield
    finally:
        ray.shutdown()


def _joined(address: str, given: dict[str, Any]) -> bool:
    """Become a driver of a cluster; False where none was named and none is there. Raises DistattnError."""
    try:
        ray.init(address=address or "auto", **given)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address:
            raise DistattnError(f"ray.address: no cluster at {address}: {_first_line(error)}") from None
        return False
    return True


def run_attempts(run: RunFolder, config: Config) -> int:
    """Run attempts of a run on the cluster that this process is connected to. Returns the exit code.

    SIGTERM and Ctrl-C have the ranks save and end, with exit code 75; a second Ctrl-C ends them at once.
    """
    needs, context = node_needs(config), ray.get_runtime_context()
    job = f"Ray job {context.get_job_id()} ({secrets.token_hex(4)})"
    facts = {"cluster": context.gcs_address, "host": socket.gethostname(), "launcher": os.getpid()}
    last = ray_facts(run) if run.ray_file.exists() else {}
    elastic = ElasticRun(run, config, last.get("nodes", 0), facts)
    noted = {"job": context.get_job_id(), **facts, "nodes": elastic.counts[0]}
    run.ray_file.write_text(json.dumps(noted) + "\n", "utf-8")
    run.state_file.write_text("running\n", "utf-8")
    # the folder is this job's, too, while its configuration is changed
    os.environ[JOB_VARIABLE] = job
    size = NodeCounts(elastic.counts, config.ray.waiting_seconds, config.ray.shrink_seconds, elastic.resize)
    nodes = RayNodes(run, job, needs, size)
    attempts = NodeAttempts(run, nodes, config.supervision.max_restarts, elastic.facts)

    def stop(number: int, frame: FrameType | None) -> None:
        attempts.stop(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    outcome, before = Outcome(1), {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        for name in before:
            signal.signal(name, stop)
        outcome = attempts.run()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
        nodes.close()
        run.state_file.write_text(f"ended {outcome.code}\n", "utf-8")
    if outcome.code == RunStopped.exit_code:
        say(f"python -m distattn.launch.ray_attempts {run.folder} goes on from the newest checkpoint.")
    return outcome.code


def main(arguments: Sequence[str]) -> int:
    """Go on with the run of a folder. Returns the exit code."""
    run = RunFolder(Path(arguments[0]))
    try:
        config = configuration.load(run.config_file)
        with connected(config, quiet=False):
            return run_attempts(run, config)
    except DistattnError as error:
        say(str(error))
        return error.exit_code


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
