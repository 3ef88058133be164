"""`distattn launch`: start a run on this machine or on Slurm; look after one that was submitted."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distattn.data.text import find_files
from distattn.ir.errors import DistattnError
from distattn.launch import slurm
from distattn.launch.machine_limits import check_run_fits
from distattn.launch.start_run import prepare
from distattn.planning.compare_strategies import cluster_of
from distattn.training import config as configuration
from distattn.training.run_folder import Run, plan_of

USAGE = """usage: distattn launch local CONFIG [--gpus N] [--section.key value ...] [--dry-run] [--json]
       distattn launch slurm CONFIG [--nodes N] [--gpus N] [--section.key value ...] [--dry-run] [--json]
       distattn launch status|cancel RUN [--json]
       distattn launch logs RUN [--rank N]

local starts one process per rank here: rank 0 on the console, a log file for each rank in the run folder.
slurm writes a batch script into the run folder and submits it; --dry-run prints it and leaves nothing behind.
--nodes and --gpus set parallel.ranks and parallel.devices_per_node; --gpus is the number of ranks on a node.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise DistattnError(f"launch: {message}. See distattn launch --help.")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    command = arguments[0]
    if command in ("local", "slurm"):
        return _start(command, arguments[1:])
    if command in ("status", "logs", "cancel"):
        return _look_after(command, arguments[1:])
    raise DistattnError(f"launch: there is no {command!r}; there are local, slurm, status, logs and cancel.")


def _start(where: str, arguments: Sequence[str]) -> int:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("config", nargs="?")
    for name in ("nodes", "gpus"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("dry-run", "json"):
        parser.add_argument(f"--{name}", action="store_true")
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(USAGE)
        return 0
    if not arguments or arguments[0].startswith("-"):
        raise DistattnError(f"launch {where}: a configuration comes first, such as configs/tiny.toml.")
    given, overrides = parser.parse_known_args(arguments)
    config = configuration.load(
        given.config, [*overrides, *_sizes(where, given.nodes, given.gpus, given.config, overrides)]
    )
    if config.cluster.description:
        cluster_of(config, config.cluster.description)
    # everything that can be wrong is found before anything is left behind
    plan_of(config, [config.data.max_document_tokens])
    if where == "local":
        check_run_fits(config)
    if given.dry_run:
        find_files(config.data.path, config.data.suffix, config.data.exclude)
        folder = Path(config.run.folder).absolute()
        text = slurm.script(config, folder)
        if where == "local":
            text = f"{config.parallel.ranks} processes here, logs in {folder}/logs\n"
        sys.stdout.write(json.dumps({"script": text}) + "\n" if given.json else text)
        return 0
    if where == "local":
        from distattn.launch.run_locally import run_here

        return run_here(config, given.json, logs=True)
    slurm.require()
    # the script names the folder from other machines
    run = prepare(replace(config, run=replace(config.run, folder=str(Path(config.run.folder).absolute()))), given.json)
    try:
        run.logs.mkdir()
        job = slurm.submit(config, run)
    except slurm.SubmittedError:
        raise
    except BaseException:
        shutil.rmtree(run.folder)
        raise
    facts = {"run": str(run.folder), "job": job, "script": str(run.script_file)}
    sys.stdout.write(json.dumps(facts) + "\n" if given.json else f"job {job}: distattn launch status {run.folder}\n")
    return 0


def _sizes(where: str, nodes: int | None, gpus: int | None, path: str, overrides: Sequence[str]) -> list[str]:
    """--nodes and --gpus as overrides of the configuration."""
    if nodes is None and gpus is None:
        return []
    parallel = configuration.load(path, overrides).parallel
    if where == "local" and nodes not in (None, 1):
        raise DistattnError(f"launch local: --nodes is 1 on this machine, not {nodes}; see distattn launch slurm.")
    for name, value in (("nodes", nodes), ("gpus", gpus)):
        if value is not None and value < 1:
            raise DistattnError(f"launch: --{name}: at least 1, not {value}.")
    per_node = gpus or parallel.devices_per_node or parallel.ranks
    if nodes is None and where == "slurm" and parallel.ranks % per_node:
        raise DistattnError(f"launch: {parallel.ranks} ranks do not fill nodes of {per_node}; say --nodes, too.")
    count = nodes or (1 if where == "local" else max(parallel.ranks // per_node, 1))
    return [f"--parallel.ranks={count * per_node}", f"--parallel.devices_per_node={per_node}"]


def _look_after(command: str, arguments: Sequence[str]) -> int:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("run")
    if command == "logs":
        parser.add_argument("--rank", type=int)
    else:
        parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    run = Run(Path(given.run))
    if not run.config_file.exists():
        raise DistattnError(f"{given.run}: this is no run folder; there is no {run.config_file.name} in it.")
    if command == "logs":
        return _logs(run, given.rank)
    if command == "cancel":
        job = slurm.cancel(run)
        sys.stdout.write(
            json.dumps({"job": job, "cancelled": True}) + "\n" if given.json else f"job {job} is cancelled\n"
        )
        return 0
    facts = slurm.status(run)
    line = f"job {facts['job']}: {facts['state']}, {facts['steps']} steps done\n"
    sys.stdout.write(json.dumps(facts) + "\n" if given.json else line)
    return 0


def _logs(run: Run, rank: int | None) -> int:
    """The batch script's own log, or one rank's."""
    files = sorted(run.folder.glob("slurm-*.out")) if rank is None else [run.log_file(rank)]
    files = [file for file in files if file.exists()]
    if not files and rank is None:
        files = [run.log_file(0)]
    if not files or not files[0].exists():
        raise DistattnError(f"{run.folder}: there are no logs of {'the job' if rank is None else f'rank {rank}'} yet.")
    for file in files:
        sys.stdout.write(file.read_text("utf-8", "replace"))
    return 0
