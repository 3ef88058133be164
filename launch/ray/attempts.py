"""The attempts of a run on a Ray cluster: `python -m distattn.launch.ray.attempts RUN [--ray.address=HOST:PORT]`.

This command continues a run on the cluster in its configuration or on another one. `distattn launch ray` does the same with a
new run. After a node is lost, or ranks are killed or hang, the next attempt runs on the remaining and newly added nodes. Needs
a Ray cluster whose nodes share the run folder, but neither torch nor a GPU on this machine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from distattn.ir.errors import DistattnError
from distattn.ir.text_format import print_message
from distattn.launch.command_line import CommandParser
from distattn.launch.node_needs import node_needs
from distattn.launch.ray import driver as ray_driver
from distattn.launch.ray.head import resume_command, watch_head
from distattn.launch.ray.run import RayRun, new_job, stopping
from distattn.launch.ray.sweep import run_sweep
from distattn.launch.run_status import sweep_runs
from distattn.launch.stop_signals import CommandStopped, stop_on_signals, stopped
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config
from distattn.training.run_folder import RunFolder


@contextmanager
def connected(configs: Sequence[Config], quiet: bool) -> Iterator[None]:
    """Connect to the cluster that the configurations name. See `ray.driver.connected`."""
    with ray_driver.connected(configs[0].ray.address, quiet, lambda: _cores_here(configs)):
        yield


def _cores_here(configs: Sequence[Config]) -> int:
    """Return the number of CPUs for a new cluster of this machine alone. Raises DistattnError for runs on several nodes."""
    needs = [node_needs(config) for config in configs]
    nodes = max(config.parallel.ranks // need.ranks for config, need in zip(configs, needs, strict=True))
    if nodes > 1:
        raise DistattnError(
            f"launch ray: {nodes} nodes need a Ray cluster, and a new one here has one node: name another "
            "(--ray.address=HOST:PORT), or start it (ray start)."
        )
    # on one machine, ranks may share cores, as with `distattn launch local`
    return max(os.cpu_count() or 1, *(need.cpus for need in needs))


def run_attempts(run: RunFolder, config: Config) -> int:
    """Run a run's attempts on the connected cluster. Return the exit code, which is 75 if the run was stopped."""
    ray_run = RayRun(run, config, new_job())
    then = f"{resume_command(run.folder)} continues from the newest checkpoint"
    with stopped("on Ray", then), stopping(ray_run.stop), watch_head(run.folder):
        return ray_run.train()


def main(arguments: Sequence[str]) -> int:
    """Continue the run in a folder, or all runs of a sweep. Return the exit code."""
    parser = CommandParser("ray.attempts")
    parser.add_argument("run", type=Path)
    parser.add_argument("--ray.address", dest="address")
    try:
        options = parser.parse_args(arguments)
        with stop_on_signals():
            return _continue(RunFolder(options.run), options.address)
    except (CommandStopped, DistattnError) as error:
        print_message(str(error))
        return error.exit_code


def _continue(run: RunFolder, address: str | None) -> int:
    def load(folder: RunFolder) -> Config:
        config = configuration.load(folder.config_file)
        return config if address is None else replace(config, ray=replace(config.ray, address=address))

    if sweep := sweep_runs(run.folder):
        configs = [load(folder) for folder in sweep]
        with connected(configs, quiet=False):
            return run_sweep(run, list(zip(sweep, configs, strict=True)))
    config = load(run)
    with connected([config], quiet=False):
        return run_attempts(run, config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
