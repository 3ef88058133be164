"""The attempts of a run on a Ray cluster: `python -m distattn.launch.ray.attempts RUN`, which goes on with the run of a folder.

`distattn launch ray` does the same with a new run. Where a node is lost, or ranks are killed or hang, the next attempt follows on
nodes that are left, or that were added. Needs a Ray cluster whose nodes share the run folder, and neither torch nor a GPU here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from distattn.ir.errors import DistattnError
from distattn.launch.command_line import say
from distattn.launch.node_needs import node_needs
from distattn.launch.ray import driver as ray_driver
from distattn.launch.ray.run import RayRun, new_job, stopping
from distattn.launch.ray.sweep import run_sweep
from distattn.launch.run_status import sweep_runs
from distattn.training import config as configuration
from distattn.training.config import Config
from distattn.training.run_folder import RunFolder


@contextmanager
def connected(configs: Sequence[Config], quiet: bool) -> Iterator[None]:
    """Around runs, which name the same cluster: see `ray.driver.connected`."""
    with ray_driver.connected(configs[0].ray.address, quiet, lambda: _cores_here(configs)):
        yield


def _cores_here(configs: Sequence[Config]) -> int:
    """CPUs of a Ray on this machine alone. Raises DistattnError for runs of several nodes."""
    needs = [node_needs(config) for config in configs]
    nodes = max(config.parallel.ranks // need.ranks for config, need in zip(configs, needs, strict=True))
    if nodes > 1:
        raise DistattnError(
            f"launch ray: {nodes} nodes want a Ray cluster, and a new one here has one: name another "
            "(--ray.address=HOST:PORT), or start it (ray start)."
        )
    # ranks may share cores here, as those of `distattn launch local`
    return max(os.cpu_count() or 1, *(need.cpus for need in needs))


def run_attempts(run: RunFolder, config: Config) -> int:
    """Run attempts of a run on the cluster that this process is connected to. Returns the exit code, 75 where it was stopped."""
    one = RayRun(run, config, new_job())
    with stopping(one.stop):
        return one.train()


def main(arguments: Sequence[str]) -> int:
    """Go on with the run, or the runs of the sweep, of a folder. Returns the exit code."""
    run = RunFolder(Path(arguments[0]))
    try:
        if sweep := sweep_runs(run.folder):
            configs = [configuration.load(one.config_file) for one in sweep]
            with connected(configs, quiet=False):
                return run_sweep(run, list(zip(sweep, configs, strict=True)))
        config = configuration.load(run.config_file)
        with connected([config], quiet=False):
            return run_attempts(run, config)
    except DistattnError as error:
        say(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
