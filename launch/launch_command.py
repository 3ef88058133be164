"""`distattn launch`: start a run on this machine or on Slurm; look after one that was submitted."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distattn.data.text import find_files
from distattn.ir.errors import DistattnError
from distattn.launch import slurm
from distattn.launch.command_line import CommandParser, no_progress, print_line
from distattn.launch.machine_limits import check_device_holds_state, check_nodes_hold_ranks, check_run_fits
from distattn.launch.start_run import start_run
from distattn.planning.compare_strategies import cluster_for_run
from distattn.training import config as configuration
from distattn.training.config import Config
from distattn.training.plan_settings import PlanSettings
from distattn.training.run_data import first_packs, pack_config, planned_packs
from distattn.training.run_folder import RunFolder

USAGE = """usage: distattn launch local CONFIG [--gpus N] [--section.key value ...] [--dry-run] [--json]
       distattn launch slurm CONFIG [--nodes N] [--gpus N] [--section.key value ...] [--dry-run] [--json]
       distattn launch status|cancel RUN [--json]
       distattn launch logs RUN [--rank N]

local starts one process per rank here: rank 0 on the console, a log file for each rank in the run folder.
slurm writes a batch script into the run folder and submits it; --dry-run prints it and leaves nothing behind.
--nodes and --gpus set parallel.ranks and parallel.devices_per_node; --gpus is the number of ranks on a node.
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    command = arguments[0]
    if command in ("local", "slurm"):
        return _start(command, arguments[1:])
    if command in ("status", "logs", "cancel"):
        return _manage_run(command, arguments[1:])
    raise DistattnError(f"launch: there is no {command!r}; there are local, slurm, status, logs and cancel.")


def _start(where: str, arguments: Sequence[str]) -> int:
    """Start a run, `local` or on `slurm`, or show what would be started."""
    parser = CommandParser("launch")
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
        given.config, [*overrides, *_size_overrides(where, given.nodes, given.gpus, given.config, overrides)]
    )
    # a configuration's cluster is for `distattn plan`; it does not bind a launch of another size
    named = any(word.startswith("--cluster.description") for word in overrides)
    if config.cluster.description and (named or not (given.nodes or given.gpus)):
        check_device_holds_state(config, cluster_for_run(config, config.cluster.description))
    if given.dry_run:
        return _dry_run(where, config, given.json)
    if where == "slurm":
        return _submit(config, given.json)
    from distattn.launch.run_locally import run_locally

    return run_locally(config, given.json, logs=True)


def _dry_run(where: str, config: Config, json_output: bool) -> int:
    """Print what would be started. Nothing is left behind, and what a run would refuse is refused."""
    if where == "local":
        check_run_fits(config)
    if pack_config(config) is None:
        PlanSettings.of_config(config).plan([config.data.max_document_tokens])
        find_files(config.data.path, config.data.suffix, config.data.exclude)
    else:
        with planned_packs(config) as plan:
            PlanSettings.of_config(config).plan(*first_packs(plan, config))
    folder = Path(config.run.folder).absolute()
    text = slurm.batch_script(config, folder)
    if where == "local":
        text = f"{config.parallel.ranks} processes here, logs in {folder}/logs\n"
    sys.stdout.write(json.dumps({"script": text}) + "\n" if json_output else text)
    return 0


def _submit(config: Config, json_output: bool) -> int:
    """Make the run folder and submit its batch script. A job that Slurm rejects leaves no folder."""
    slurm.require_slurm()
    check_nodes_hold_ranks(config, slurm.node_bytes(config.slurm.partition))
    # the script names the folder from other machines
    config = replace(config, run=replace(config.run, folder=str(Path(config.run.folder).absolute())))
    run = start_run(config, no_progress if json_output else print_line)
    try:
        run.logs.mkdir()
        job = slurm.submit(config, run)
    except slurm.SubmittedError:
        raise
    except BaseException:
        shutil.rmtree(run.folder)
        raise
    facts = {"run": str(run.folder), "job": job, "script": str(run.script_file)}
    print_line(json.dumps(facts) if json_output else f"job {job}: distattn launch status {run.folder}")
    return 0


def _size_overrides(where: str, nodes: int | None, gpus: int | None, path: str, overrides: Sequence[str]) -> list[str]:
    """Turn --nodes and --gpus into overrides of parallel.ranks and parallel.devices_per_node."""
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


def _manage_run(command: str, arguments: Sequence[str]) -> int:
    """Show the state or the logs of a submitted run, or cancel it."""
    parser = CommandParser("launch")
    parser.add_argument("run")
    if command == "logs":
        parser.add_argument("--rank", type=int)
    else:
        parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    run = RunFolder(Path(given.run))
    if not run.config_file.exists():
        raise DistattnError(f"{given.run}: this is no run folder; there is no {run.config_file.name} in it.")
    if command == "logs":
        return _print_logs(run, given.rank)
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


def _print_logs(run: RunFolder, rank: int | None) -> int:
    """Print one rank's log; for rank None the batch script's own, or rank 0's where there is none."""
    files = sorted(run.folder.glob("slurm-*.out")) if rank is None else [run.log_file(rank)]
    files = [file for file in files if file.exists()]
    if not files and rank is None:
        files = [run.log_file(0)]
    if not files or not files[0].exists():
        raise DistattnError(f"{run.folder}: there are no logs of {'the job' if rank is None else f'rank {rank}'} yet.")
    for file in files:
        sys.stdout.write(file.read_text("utf-8", "replace"))
    return 0
