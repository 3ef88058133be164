"""`distattn launch`: start a run on this machine, on Slurm or on Ray, and manage started runs."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from distattn.data.files.text import find_files
from distattn.ir.errors import DistattnError
from distattn.ir.text_format import plural, print_message, readable_bytes
from distattn.kernels.registry import AUTO, CPU_KERNELS
from distattn.launch.command_keys import refuse_keys_that_do_nothing
from distattn.launch.command_line import CommandParser, array_words, no_progress, print_line
from distattn.launch.elastic_run import node_counts
from distattn.launch.ranks.machine_limits import (
    check_device_holds_state,
    check_nodes_hold_ranks,
    check_run_fits,
    gpu_count,
)
from distattn.launch.run_status import cancel, state_of_ended, status, status_lines, sweep_runs
from distattn.launch.slurm import jobs as slurm
from distattn.launch.start_run import preflight_alone, start_run
from distattn.planning.compare_strategies import cluster_for_run
from distattn.training.config import run_file as configuration
from distattn.training.config.plan_settings import PlanSettings
from distattn.training.config.run_file import Config
from distattn.training.run_data import first_packs, pack_config, planned_packs
from distattn.training.run_folder import RunFolder
from distattn.training.state_bytes import state_bytes

USAGE = """usage: distattn launch local CONFIG [--gpus N] [--section.key value ...] [--dry-run] [--json]
       distattn launch slurm CONFIG [--nodes N] [--spare N] [--gpus N] [--array KEY=VALUE,VALUE...]
                             [--section.key value ...] [--dry-run] [--json]
       distattn launch ray CONFIG [--nodes N] [--gpus N] [--ray.address HOST:PORT] [--array KEY=VALUE,VALUE...]
                           [--section.key value ...] [--dry-run] [--json]
       distattn launch folder CONFIG [--nodes N] [--gpus N] [--section.key value ...] [--dry-run] [--json]
       distattn launch status|cancel RUN [--json]
       distattn launch logs RUN [--rank N]

local starts one process per rank here: rank 0 on the console, a log file for each rank in the run folder.
slurm writes a batch script into the run folder and submits it; --dry-run prints it and leaves nothing behind.
ray runs on nodes of a Ray cluster until the run has ended, like slurm on the nodes of a job; without a cluster one starts here.
--nodes and --gpus set parallel.ranks and parallel.devices_per_node; --gpus is the number of ranks on a node, each with a GPU
if parallel.kernel computes on GPUs. --spare N of the nodes stay idle until another one fails (Slurm only). --array starts one
run for each value of a key, in folders 0, 1, ... of a new run folder.
folder only makes the run folder, for ranks that another scheduler starts (docs/kubernetes.md). status shows a run's attempts
and why each ended. With --preflight.action=only the ranks compare and measure each other as before the first step of any run, and
the run ends, in the folder RUN-preflight; such a run is not restarted or requeued.
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    command = arguments[0]
    if command in ("local", "slurm", "ray", "folder"):
        return _start(command, arguments[1:])
    if command in ("status", "logs", "cancel"):
        return _manage_run(command, arguments[1:])
    raise DistattnError(
        f"launch: there is no {command!r}; there are local, slurm, ray, folder, status, logs and cancel."
    )


def _start(where: str, arguments: Sequence[str]) -> int:
    """Start a run, or only show what would be started. where: local, slurm, ray, or folder (only create the run folder)."""
    parser = CommandParser("launch")
    parser.add_argument("config", nargs="?")
    for name in ("nodes", "spare", "gpus"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--array")
    for name in ("dry-run", "json"):
        parser.add_argument(f"--{name}", action="store_true")
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(USAGE)
        return 0
    if not arguments or arguments[0].startswith("-"):
        raise DistattnError(f"launch {where}: CONFIG is missing; for example: distattn launch {where} tiny")
    options, overrides = parser.parse_known_args(arguments)
    if where != "slurm" and options.spare is not None:
        raise DistattnError(f"launch {where}: --spare is for Slurm; see distattn launch slurm.")
    if where not in ("slurm", "ray") and options.array is not None:
        raise DistattnError(f"launch {where}: --array is for Slurm and Ray; see distattn launch slurm.")
    # one override per task of a sweep
    task_overrides = array_words(options.array) if options.array is not None else []
    refuse_keys_that_do_nothing(f"launch {where}", [*overrides, *task_overrides])
    if options.spare is not None:
        overrides = [*overrides, f"--slurm.spare_nodes={options.spare}"]
    overrides = [*overrides, *_size_overrides(where, options.nodes, options.gpus, options.config, overrides)]
    config = preflight_alone(configuration.load(options.config, overrides, print_message))
    sweep = [preflight_alone(configuration.load(options.config, [*overrides, word])) for word in task_overrides]
    for word, run_config in zip(task_overrides, sweep, strict=True):
        if where == "slurm" and _commands(run_config, config) != _commands(config, config):
            raise DistattnError(
                f"launch: --array: {word[2:]} needs another batch script, but all runs of a sweep share one; submit it alone."
            )
        if run_config.ray.address != config.ray.address:
            raise DistattnError(
                f"launch: --array: {word[2:]} names another cluster; all runs of a sweep are on one cluster."
            )
    # a run file's cluster is meant for `distattn plan`, so ignore it for a launch of a different size
    named = any(word.startswith("--cluster.description") for word in overrides)
    if config.cluster.description and (named or not (options.nodes or options.gpus)):
        check_device_holds_state(config, cluster_for_run(config, config.cluster.description))
    if where == "ray":
        # refuse impossible node counts before anything starts
        for run_config in sweep or [config]:
            node_counts(run_config)
    if options.dry_run:
        return _dry_run(where, config, sweep, options.json)
    if where == "slurm":
        return _submit(config, sweep, options.json)
    if where == "ray":
        return _run_on_ray(config, sweep, options.json)
    if where == "folder":
        run = start_run(config, no_progress if options.json else print_line)
        run.logs.mkdir()
        sys.stdout.write(json.dumps({"run": str(run.folder)}) + "\n" if options.json else "")
        return 0
    from distattn.launch.run_locally import run_locally

    return run_locally(config, options.json, logs=True)


def _dry_run(where: str, config: Config, sweep: Sequence[Config], json_output: bool) -> int:
    """Print what would be started, or raise the error that a run would raise. Leaves nothing behind."""
    if where == "local":
        check_run_fits(config)
    for run_config in sweep or [config]:
        if pack_config(run_config) is None:
            PlanSettings.of_config(run_config).plan([run_config.data.max_document_tokens])
            find_files(run_config.data.path, run_config.data.suffix, run_config.data.exclude)
        else:
            with planned_packs(run_config) as plan:
                PlanSettings.of_config(run_config).plan(*first_packs(plan, run_config))
    folder = _new_folder(config, sweep)
    if where == "slurm":
        text = slurm.batch_script(config, folder, len(sweep))
    else:
        lines = _sweep_that_would_start(where, sweep, folder) if sweep else _run_that_would_start(where, config, folder)
        text = "".join(f"{line}\n" for line in lines)
    sys.stdout.write(json.dumps({"script": text}) + "\n" if json_output else text)
    return 0


def _run_that_would_start(where: str, config: Config, folder: Path) -> list[str]:
    """Return lines that describe a run and name its folder."""
    note = "; it exists already, so a number is added" if folder.exists() else ""
    return [*_facts_before_start(where, config), f"run folder: {folder}{note}; logs in its folder logs"]


def _sweep_that_would_start(where: str, sweep: Sequence[Config], folder: Path) -> list[str]:
    """Return lines that describe the runs of a sweep, one for each group of equal runs, and name their folders."""
    alike: dict[str, list[str]] = {}
    for number, config in enumerate(sweep):
        alike.setdefault("; ".join(_facts_before_start(where, config)), []).append(str(number))
    groups = [f"{'run' if len(runs) == 1 else 'runs'} {', '.join(runs)}: {facts}" for facts, runs in alike.items()]
    return [
        f"{plural(len(sweep), 'run')}, one for each value of --array",
        *groups,
        f"run folders: 0 to {len(sweep) - 1} in {folder}; logs in the folder logs of each",
    ]


def _facts_before_start(where: str, config: Config) -> list[str]:
    """Return lines with a run's ranks and devices, its steps, and the bytes of state per rank."""
    data, kernel = config.data, config.parallel.kernel
    place = {"local": "here", "ray": "on nodes of Ray", "folder": "that another scheduler starts"}[where]
    # another machine's GPUs are not known here
    on_gpus = kernel not in CPU_KERNELS and (kernel != AUTO or where != "local" or gpu_count() > 0)
    devices = "a GPU each" if on_gpus else "on the CPU"
    amount = data.path if data.path.endswith(".toml") else f"at most {data.tokens_per_step:,} tokens each"
    planned = f"{plural(config.train.steps, 'step')} of {amount}"
    steps = "the preflight alone" if config.preflight.action == "only" else planned
    return [
        f"{plural(config.parallel.ranks, 'rank')} {place}, {devices}, {config.parallel.strategy} attention",
        steps,
        f"{readable_bytes(state_bytes(config))} of weights, gradients and optimizer a rank",
    ]


def _submit(config: Config, sweep: Sequence[Config], json_output: bool) -> int:
    """Create the run folders and submit their batch script. If Slurm rejects the job, the folders are removed."""
    slurm.require_slurm()
    largest = slurm.node_bytes(config.slurm.partition)
    for run_config in sweep or [config]:
        check_nodes_hold_ranks(run_config, largest)
    with _new_runs(config, sweep, json_output) as (folder, runs):
        job = slurm.submit(config, folder, runs)
    facts = {"run": str(folder), "job": job, "script": str(RunFolder(folder).script_file)}
    if sweep:
        facts["runs"] = [str(run.folder) for run in runs]
    print_line(json.dumps(facts) if json_output else f"job {job}: distattn launch status {folder}")
    return 0


def _run_on_ray(config: Config, sweep: Sequence[Config], json_output: bool) -> int:
    """Run on a Ray cluster to the end, and write the report. A sweep has one run for each configuration in `sweep`."""
    if importlib.util.find_spec("ray") is None:
        raise DistattnError("launch ray needs ray: pip install 'distattn[ray]'.")
    from distattn.launch.ray.attempts import connected, run_attempts
    from distattn.launch.ray.sweep import run_sweep

    with connected(sweep or [config], quiet=json_output):
        with _new_runs(config, sweep, json_output) as (folder, runs):
            # leave the context at once, because it removes the folders if its block fails; they record any later failure
            pass
        if sweep:
            code = run_sweep(RunFolder(folder), [(run, configuration.load(run.config_file)) for run in runs])
        else:
            code = run_attempts(runs[0], config)
    facts = {"run": str(folder), "exit_code": code} | ({"runs": [str(run.folder) for run in runs]} if sweep else {})
    sys.stdout.write(json.dumps(facts) + "\n" if json_output else "")
    return code


@contextmanager
def _new_runs(config: Config, sweep: Sequence[Config], json_output: bool) -> Iterator[tuple[Path, list[RunFolder]]]:
    """Create a new run's folder, or a sweep's folder with its runs in folders 0, 1, ...; yield the folder and the runs.

    Removes everything if a run cannot be created, or if the block raises (unless Slurm has accepted the job).
    """
    folder = _new_folder(config, sweep)
    places = [folder / str(task) for task in range(len(sweep))] if sweep else [folder]
    runs: list[RunFolder] = []
    try:
        for run_config, place in zip(sweep or [config], places, strict=True):
            run_config = replace(run_config, run=replace(run_config.run, folder=str(place)))
            runs.append(start_run(run_config, no_progress if json_output else print_line))
            runs[-1].logs.mkdir()
        # a number may have been added to the name of a single run's folder
        yield folder if sweep else runs[0].folder, runs
    except slurm.SubmittedError:
        raise
    except BaseException:
        for new_folder in [folder] if sweep else [run.folder for run in runs]:
            shutil.rmtree(new_folder, ignore_errors=True)
        raise


def _new_folder(config: Config, sweep: Sequence[Config]) -> Path:
    """Return the absolute path of a new run's or sweep's folder. Raises DistattnError if a sweep's folder exists already."""
    # absolute, since batch scripts and Ray actors use it on other machines
    folder = Path(config.run.folder).absolute()
    if sweep and folder.exists():
        raise DistattnError(f"run.folder: {folder} exists already; name another one for the sweep.")
    return folder


def _commands(config: Config, sweep: Config) -> list[str]:
    """Return the lines of the batch script for `config` in the sweep's folder, without comments."""
    lines = slurm.batch_script(config, Path(sweep.run.folder).absolute(), tasks=1).splitlines()
    return [line for line in lines if not line.startswith("# ")]


def _size_overrides(where: str, nodes: int | None, gpus: int | None, path: str, overrides: Sequence[str]) -> list[str]:
    """Return the overrides of parallel.ranks and parallel.devices_per_node for --nodes and --gpus."""
    if nodes is None and gpus is None:
        return []
    config = configuration.load(path, overrides)
    parallel, spare = config.parallel, config.slurm.spare_nodes if where == "slurm" else 0
    if where == "local" and nodes not in (None, 1):
        raise DistattnError(f"launch local: --nodes must be 1 on this machine, not {nodes}; see distattn launch slurm.")
    for name, value in (("nodes", nodes), ("gpus", gpus)):
        if value is not None and value < 1:
            raise DistattnError(f"launch: --{name}: must be at least 1, not {value}.")
    per_node = gpus or parallel.devices_per_node or parallel.ranks
    if nodes is not None and nodes <= spare:
        raise DistattnError(
            f"launch: --nodes={nodes}: {spare} spare nodes leave no node for ranks (--spare, slurm.spare_nodes)."
        )
    if nodes is None and where != "local" and parallel.ranks % per_node:
        raise DistattnError(f"launch: {parallel.ranks} ranks do not fill nodes of {per_node}; give --nodes, too.")
    count = nodes - spare if nodes else (1 if where == "local" else max(parallel.ranks // per_node, 1))
    return [f"--parallel.ranks={count * per_node}", f"--parallel.devices_per_node={per_node}"]


def _manage_run(command: str, arguments: Sequence[str]) -> int:
    """Show the status or the logs of a started run or sweep, or cancel it."""
    parser = CommandParser("launch")
    parser.add_argument("run")
    if command == "logs":
        parser.add_argument("--rank", type=int)
    else:
        parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    run = RunFolder(Path(options.run))
    sweep = sweep_runs(run.folder)
    if not run.config_file.exists() and (command == "logs" or not sweep):
        where = (
            f"name one of its runs, such as {sweep[0].folder}" if sweep else f"there is no {run.config_file.name} in it"
        )
        raise DistattnError(f"{options.run}: this is not a run folder; {where}.")
    if command == "logs":
        return _print_logs(run, options.rank)
    if command == "cancel":
        if (state := state_of_ended(run)) is not None:
            facts = {"run": str(run.folder), "state": state, "cancelled": False}
            sentence = f"{run.folder} has ended, so there is nothing to cancel: {state}\n"
            sys.stdout.write(json.dumps(facts) + "\n" if options.json else sentence)
            return 0
        kind, number = cancel(run)
        facts = {kind: number, "cancelled": True}
        sys.stdout.write(json.dumps(facts) + "\n" if options.json else f"{kind} {number} is cancelled\n")
        return 0
    for sweep_run in sweep or [run]:
        facts = status(sweep_run)
        sys.stdout.write(json.dumps(facts) + "\n" if options.json else status_lines(facts))
    return 0


def _print_logs(run: RunFolder, rank: int | None) -> int:
    """Print the log of a rank. rank: None for the batch script's log or, if there is no such log, rank 0's."""
    files = sorted(run.folder.glob("slurm-*.out")) if rank is None else [run.log_file(rank)]
    files = [file for file in files if file.exists()]
    if not files and rank is None:
        files = [run.log_file(0)]
    if not files or not files[0].exists():
        if not run.logs.is_dir() and rank is None:
            raise DistattnError(
                f"{run.folder}: the run has no logs: distattn train prints to the console; use launch local."
            )
        if rank is not None and not 0 <= rank < (ranks := configuration.load(run.config_file).parallel.ranks):
            has = f"ranks 0 to {ranks - 1}" if ranks > 1 else "rank 0 only"
            raise DistattnError(f"launch logs: --rank {rank}: {run.folder} has {has}.")
        raise DistattnError(f"{run.folder}: there are no logs of {'the job' if rank is None else f'rank {rank}'} yet.")
    texts = [file.read_text("utf-8", "replace") for file in files]
    if not any(texts):
        names = " and ".join(str(file) for file in files)
        print_message(f"{names}: empty, nothing was printed yet; distattn launch status shows what the ranks do.")
    sys.stdout.write("".join(texts))
    return 0
