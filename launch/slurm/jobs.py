"""Runs on Slurm: a readable batch script, which is submitted, monitored and cancelled with Slurm's own commands.

Needs neither torch nor a GPU. The script and the job's number are in the run folder or, for a sweep, in the sweep's folder,
which contains the run folders of its tasks, named by task number.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.launch.attempts import Attempts
from distattn.launch.node_needs import node_needs
from distattn.launch.slurm.commands import ask_slurm, job_state
from distattn.training.config.run_file import Config
from distattn.training.run_folder import RunFolder

_TEMPLATES = Environment(
    loader=PackageLoader("distattn.launch.slurm"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["quote"] = shlex.quote


class SubmittedError(DistattnError):
    """A failure after Slurm has accepted the job. The run folder is kept."""


def batch_script(config: Config, folder: Path, tasks: int = 0) -> str:
    """Return the text of the batch script of a run in `folder`. Raises DistattnError if a setting cannot be written in it.

    tasks: number of runs in a sweep, in the folders 0, 1, ... of `folder`; 0 for a single run.
    """
    node, slurm = node_needs(config), config.slurm
    values = (slurm.partition, slurm.account, slurm.time, slurm.container_image, *slurm.container_mounts)
    for line in (*slurm.setup, *slurm.options, *values, str(folder)):
        if "\n" in line or "\r" in line:
            raise DistattnError(f"slurm: a line of the batch script cannot hold a line break: {line!r}.")
    if "\\" in str(folder):
        raise DistattnError(f"run.folder: sbatch cannot write to a path with a backslash: {folder}.")
    escaped = str(folder).replace("%", "%%")
    options, prefix = _container(config, folder, node.gpus > 0)
    return _TEMPLATES.get_template("job.sbatch.j2").render(
        title=f"{config.parallel.ranks} ranks, {config.parallel.strategy}",
        name=folder.name,
        folder=str(folder),
        output=f"{escaped}/%a/slurm-%A_%a.out" if tasks else f"{escaped}/slurm-%j.out",
        tasks=tasks,
        restarts=config.supervision.max_restarts,
        nodes=config.parallel.ranks // node.ranks,
        gpus=node.gpus,
        cpus=node.cpus,
        container_options=options,
        container_prefix=prefix,
        # a run without checkpoints cannot continue
        requeues=slurm.max_requeues if config.checkpoint.every_steps >= 0 else 0,
        slurm=slurm,
    )


def submit(config: Config, folder: Path, runs: Sequence[RunFolder]) -> int:
    """Write the batch script of a run or sweep into `folder`, submit it, and return the job's number.

    Raises DistattnError with Slurm's message if Slurm rejects the job.
    """
    job_folder = RunFolder(folder)
    tasks = 0 if [run.folder for run in runs] == [folder] else len(runs)
    job_folder.script_file.write_text(batch_script(config, folder, tasks), "utf-8")
    # block signals between submitting the job and recording its number
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        answer = ask_slurm("sbatch", "--parsable", str(job_folder.script_file))
        # the last line is "number" or "number;cluster"; messages of the site may precede it
        number = re.match(r"(\d+)(;|$)", (answer.splitlines() or [""])[-1])
        if number is None:
            raise SubmittedError(f"sbatch took the job and answered {answer!r}: no job number; see squeue --me.")
        job_folder.note_job(int(number[1]))
        for task, run in enumerate(runs if tasks else ()):
            run.note_job(f"{number[1]}_{task}")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return int(number[1])


def require_slurm() -> None:
    """Raise DistattnError if Slurm's commands are missing."""
    if shutil.which("sbatch") is None:
        raise DistattnError(
            "there is no sbatch here: run this on a machine of a Slurm cluster, or add --dry-run to see the script."
        )


def node_bytes(partition: str) -> int | None:
    """Return the bytes of memory of the largest node in a partition; None if Slurm does not know it.

    partition: "" for the entire cluster.
    """
    try:
        output = ask_slurm(
            "sinfo", "--noheader", "--Node", "--format=%m", *([f"--partition={partition}"] if partition else [])
        )
    except DistattnError:
        # sbatch will report a better reason
        return None
    megabytes = [int(word) for word in output.split() if word.isdecimal()]
    # Slurm reports 1 if no memory is configured
    return max(megabytes) << 20 if max(megabytes, default=1) > 1 else None


def status(run: RunFolder) -> dict[str, Any]:
    """Return a job's number and state, the steps done and the attempts (see `Attempts.rows`).

    The state comes from Slurm while Slurm knows the job, and later from the file that the script wrote to the run folder.
    """
    job = _job(run)
    state = job_state(str(job))
    phase = "running" if state == "RUNNING" else "unknown"
    if not state:
        last = run.state_file.read_text("utf-8").split() if run.state_file.exists() else []
        phase = "unknown" if not last else "killed" if last == ["running"] else "ended"
        state = {"unknown": "gone: it never started", "killed": "killed"}.get(phase) or f"ended, exit code {last[1]}"
    return {
        "run": str(run.folder),
        "job": job,
        "state": state,
        "phase": phase,
        "steps": run.steps_done(),
        "attempts": Attempts(run.attempts).rows(),
    }


def cancel(run: RunFolder) -> int | str:
    """Cancel the job of a run or of an entire sweep, and return its number. Ranks may save until Slurm kills them."""
    job = _job(run)
    ask_slurm("scancel", str(job))
    return job


def _container(config: Config, folder: Path, gpus: bool) -> tuple[str, str]:
    """Return srun's container options, and the prefix of commands to run in the container; both "" if no container is set."""
    slurm = config.slurm
    if not slurm.container_image:
        return "", ""
    mounts = ",".join([f"{folder}:{folder}", *slurm.container_mounts])
    if slurm.container_runtime == "pyxis":
        return shlex.join([f"--container-image={slurm.container_image}", f"--container-mounts={mounts}"]), ""
    return "", shlex.join(["apptainer", "exec", *(["--nv"] if gpus else []), f"--bind={mounts}", slurm.container_image])


def _job(run: RunFolder) -> int | str:
    """Return the job's number or, for a task of a sweep, Slurm's name ARRAY_TASK."""
    try:
        job = json.loads(run.job_file.read_text("utf-8"))["job"]
        return job if re.fullmatch(r"\d+_\d+", str(job)) else int(job)
    except FileNotFoundError:
        raise DistattnError(
            f"{run.folder}: nothing was submitted from here; there is no {run.job_file.name}."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise DamagedDataError(f"{run.job_file}: damaged; find the job's number with squeue --me.") from None
