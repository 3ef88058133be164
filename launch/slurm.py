"""Runs on Slurm: a batch script that a person can read, submitted, watched and cancelled with Slurm's own commands.

Needs neither torch nor a GPU where it runs. What was submitted is in the run folder: the script and the job's number.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.kernels.registry import CPU_KERNELS
from distattn.training.config import Config
from distattn.training.run_folder import RunFolder

# data loading, planning ahead and NCCL's own threads
_CPUS_PER_GPU = 4
_TEMPLATES = Environment(
    loader=PackageLoader("distattn.launch"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["quote"] = shlex.quote


class SubmittedError(DistattnError):
    """Something went wrong after Slurm had taken a job: its run folder stays."""


def batch_script(config: Config, folder: Path) -> str:
    """Write the batch script of a run in this folder, as text. Raises DistattnError where a setting does not fit into one."""
    per_node = config.parallel.devices_per_node or config.parallel.ranks
    gpus = config.parallel.kernel not in CPU_KERNELS
    slurm = config.slurm
    for line in (*slurm.setup, *slurm.options, slurm.partition, slurm.account, slurm.time, str(folder)):
        if "\n" in line or "\r" in line:
            raise DistattnError(f"slurm: a line of the batch script cannot hold a line break: {line!r}.")
    if "\\" in str(folder):
        raise DistattnError(f"run.folder: sbatch cannot write to a path with a backslash: {folder}.")
    return _TEMPLATES.get_template("job.sbatch.j2").render(
        title=f"{config.parallel.ranks} ranks, {config.parallel.strategy}",
        name=folder.name,
        folder=str(folder),
        nodes=config.parallel.ranks // per_node,
        per_node=per_node,
        gpus=per_node if gpus else 0,
        cpus=per_node * (_CPUS_PER_GPU if gpus else 1),
        slurm=slurm,
    )


def submit(config: Config, run: RunFolder) -> int:
    """Write the script into the run folder and submit it. Returns the job's number.

    Raises DistattnError with Slurm's own words where it rejects the job.
    """
    run.script_file.write_text(batch_script(config, run.folder), "utf-8")
    # from here to the job's number in the file nothing may come between
    waiting = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        answer = _slurm("sbatch", "--parsable", str(run.script_file))
        # "number" or "number;cluster", below whatever a site says first
        number = re.match(r"(\d+)(;|$)", (answer.splitlines() or [""])[-1])
        if number is None:
            raise SubmittedError(f"sbatch took the job and answered {answer!r}: no job number; see squeue --me.")
        run.job_file.write_text(json.dumps({"job": int(number[1])}) + "\n", "utf-8")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, waiting)
    return int(number[1])


def require_slurm() -> None:
    """Raise DistattnError where Slurm's commands are missing."""
    if shutil.which("sbatch") is None:
        raise DistattnError(
            "there is no sbatch here: run this on a machine of a Slurm cluster, or add --dry-run to see the script."
        )


def node_bytes(partition: str) -> int | None:
    """Memory of the largest node of a partition, or of the cluster, as Slurm was told; None where it does not say."""
    try:
        given = _slurm(
            "sinfo", "--noheader", "--Node", "--format=%m", *([f"--partition={partition}"] if partition else [])
        )
    except DistattnError:
        # what is wrong sbatch says better
        return None
    megabytes = [int(word) for word in given.split() if word.isdecimal()]
    # 1 is what Slurm takes where nobody has said it
    return max(megabytes) << 20 if max(megabytes, default=1) > 1 else None


def status(run: RunFolder) -> dict[str, str | int]:
    """Look up a job: its number, its state and the steps done.

    The state is Slurm's while Slurm knows the job, else what the script left in the run folder.
    """
    job = _job(run)
    try:
        state = _slurm("squeue", "--noheader", "--jobs", str(job), "--format=%T")
    except DistattnError as error:
        # Slurm forgets a job some minutes after its end
        if "Invalid job id" not in str(error):
            raise
        state = ""
    if not state:
        left = run.state_file.read_text("utf-8").split() if run.state_file.exists() else []
        state = (
            "gone: it never began" if not left else "killed" if left == ["running"] else f"ended, exit code {left[1]}"
        )
    steps = len(run.metrics()) if run.metrics_file.exists() else 0
    return {"run": str(run.folder), "job": job, "state": state, "steps": steps}


def cancel(run: RunFolder) -> int:
    """Cancel the job; returns its number."""
    job = _job(run)
    _slurm("scancel", str(job))
    return job


def _job(run: RunFolder) -> int:
    try:
        return int(json.loads(run.job_file.read_text("utf-8"))["job"])
    except FileNotFoundError:
        raise DistattnError(
            f"{run.folder}: nothing was submitted from here; there is no {run.job_file.name}."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise DamagedDataError(f"{run.job_file}: damaged; find the job's number with squeue --me.") from None


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise DistattnError(f"there is no {command[0]} here: run this on a machine of a Slurm cluster.") from None
    if done.returncode:
        words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise DistattnError(f"{command[0]} refused: {words}")
    return done.stdout.strip()
