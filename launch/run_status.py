"""What becomes of a run on Slurm, on Ray or on this machine: its state, its attempts, and what its ranks do."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distattn.checkpoints.owner import Owner, writer_is_alive
from distattn.checkpoints.run_lock import LAUNCHER, folder_owner
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.launch.attempts import Attempts
from distattn.launch.command_line import finish_command
from distattn.launch.slurm import jobs as slurm
from distattn.parallel.analysis.columns import plural
from distattn.supervision.culprits import process_state, words
from distattn.training.json_lines import parse_json
from distattn.training.run_folder import RunFolder

_ALL_DONE = "all steps are done"
# first words of the states of runs here and on Ray that have ended
_ENDED = ("ended", "killed")
# states of Slurm (squeue(1)) in which a job still has work to do: it runs, it waits for nodes, or another cluster runs it
_JOB_GOES_ON = (
    *("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"),
    *(
        "PENDING",
        "CONFIGURING",
        "POWER_UP_NODE",
        "REQUEUED",
        "REQUEUE_HOLD",
        "SPECIAL_EXIT",
        "RESV_DEL_HOLD",
        "EXPEDITING",
    ),
    *("REQUEUE_FED", "REVOKED"),
)


def status(run: RunFolder) -> dict[str, Any]:
    """Look up a run: its state, the steps done and the attempts; its job's number on Slurm, else what each rank does, by rank.

    Of a run that another scheduler starts there are no attempts, but what nodes said when their ranks last failed, by node.
    Raises DistattnError as `slurm.status` does.
    """
    attempts, launcher = Attempts(run.attempts), _launcher(run)
    # a run of Slurm's may have been resumed here
    if run.job_file.exists() and attempts.beats() is None and launcher is None:
        job = slurm.status(run)
        return job if job["state"] in _JOB_GOES_ON else job | {"state": job["state"] + _unreported(run, job)}
    steps = run.steps_done()
    beats, rows = attempts.beats(), attempts.rows()
    if beats is None and rows and "why" not in rows[-1]:
        # it has begun in between, or nobody goes on with it
        beats = attempts.beats()
    if run.ray_file.exists() and beats is None and launcher is None:
        ray_run: dict[str, Any] = {"run": str(run.folder), "state": _ray_state(run), "steps": steps, "attempts": rows}
        if not ray_run["state"].startswith(_ENDED):
            return ray_run
        missing = _unreported(run, ray_run)
        if not missing and ray_run["state"].startswith("killed"):
            missing = f", python -m distattn.launch.ray.attempts {run.folder} goes on"
        return ray_run | {"state": ray_run["state"] + missing}
    last = rows[-1] if rows else {}
    # another user's ranks cannot be looked at
    state = "killed with its launcher" if beats is None and launcher is None else "running"
    if beats is None and launcher is not None and last.get("process") != launcher.writer_name:
        state = f"starting: {launcher}"
    elif not rows:
        state = _state_elsewhere(run, steps)
    elif "why" in last:
        state = f"ended, exit code {last['exit_code']}"
        alive = launcher is not None or (writer_is_alive(last["process"]) if "process" in last else False)
        if missing := _unreported(run, {"attempts": rows, "steps": steps}):
            state = f"{_ALL_DONE}, its launcher compares and reports" if alive else state + missing
            if alive is None:
                state += f", unless its launcher on {last['host']} still does"
        elif alive:
            # it starts the ranks again, or ends
            state = f"attempt {last['attempt']} ended with exit code {last['exit_code']}, its launcher goes on"
    elif (host := last.get("host")) != socket.gethostname():
        state = f"begun on {host}, which knows whether it goes on"
    ranks = {str(rank): words(beat) for rank, beat in (beats or {}).items()}
    told = {} if rows else {str(node): facts["why"] for node, facts in sorted(attempts.told(attempts.latest).items())}
    # the furthest rank's, from 1; 0 before the first
    at_step = 1 + max((beat.step for beat in (beats or {}).values()), default=-1)
    facts = {"run": str(run.folder), "state": state, "steps": steps, "attempts": rows, "ranks": ranks, "nodes": told}
    return facts | ({"at_step": at_step} if at_step else {})


def state_of_ended(run: RunFolder) -> str | None:
    """Return the state of a run or a sweep that has ended, so that there is nothing to cancel; None if it goes on.

    Raises DistattnError as `slurm.status` does.
    """
    if sweep_runs(run.folder):
        # on Slurm, each task of a sweep ends by itself
        state = _ray_state(run) if run.ray_file.exists() else ""
    else:
        facts = status(run)
        state = facts["state"]
        if "job" in facts:
            return None if state in _JOB_GOES_ON else state
    return state if state.startswith(_ENDED) else None


def cancel(run: RunFolder) -> tuple[str, int | str]:
    """Cancel the "job", or end the "launcher" that goes on here; returns which, and its number.

    Ranks on Ray are asked to save and to end, through the run folder. Raises DistattnError where neither goes on here.
    """
    attempts = Attempts(run.attempts)
    if attempts.beats() is None and (launcher := _launcher(run)) is not None:
        # it has no ranks yet, or none any more
        if launcher.is_alive() is None:
            raise DistattnError(
                f"{run.folder}: its launcher, {launcher}, works on it; cancel the run on {launcher.host}."
            )
        os.kill(launcher.pid, signal.SIGTERM)
        return "launcher", launcher.pid
    if run.job_file.exists() and attempts.beats() is None:
        return "job", slurm.cancel(run)
    if run.ray_file.exists() and attempts.beats() is None:
        run.ask_to_stop("distattn launch cancel")
        return "launcher", int(ray_facts(run)["launcher"])
    if attempts.beats() is None:
        last = (attempts.rows() or [{}])[-1]
        if "process" in last and writer_is_alive(last["process"]):
            raise DistattnError(
                f"{run.folder}: process {last['launcher']}, which started its ranks, is still alive, but no longer holds the "
                "folder; end that process, or wait until it ends."
            )
        raise DistattnError(f"{run.folder}: nothing was submitted from here, and no ranks of this machine work on it.")
    process = int(attempts.rows()[-1]["launcher"])
    os.kill(process, signal.SIGTERM)
    return "launcher", process


def sweep_runs(folder: Path) -> list[RunFolder]:
    """The runs of a sweep on Slurm or on Ray, by number; none where the folder is not one of a sweep."""
    place = RunFolder(folder)
    if place.config_file.exists() or not (place.job_file.exists() or place.ray_file.exists()):
        return []
    tasks = [entry for entry in folder.iterdir() if entry.name.isdecimal() and RunFolder(entry).config_file.exists()]
    return [RunFolder(entry) for entry in sorted(tasks, key=lambda entry: int(entry.name))]


def _launcher(run: RunFolder) -> Owner | None:
    """Return the launcher that has locked a run, here or on another machine, while it lives."""
    # a folder that this process may not write has no clock to compare a lease with
    with contextlib.suppress(OSError):
        if (owner_and_life := folder_owner(run.folder, LAUNCHER)) is not None:
            launcher, is_alive = owner_and_life
            return launcher if is_alive else None
    return None


def _unreported(run: RunFolder, found: Mapping[str, Any]) -> str:
    """Return what to add to the state of a run that ended: its steps are done without a report, and what completes it. Or ""."""
    last = found["attempts"][-1] if found["attempts"] else {}
    # a preflight alone has no steps
    if last.get("exit_code") != 0 or not found["steps"] or Attempts(run.attempts).is_reported(run.report_file):
        return ""
    return f", {_ALL_DONE}, but not reported: {finish_command(run.folder)} compares and reports"


def _state_elsewhere(run: RunFolder, steps: int) -> str:
    """The state of a run of which no attempt is written down: who has its folder."""
    if not steps and not run.attempts.exists():
        return "not begun"
    begun = "begun by another scheduler, no attempts are written down"
    found = folder_owner(run.folder)
    if found is None:
        return f"{begun}, " + ("its report is written" if run.report_file.exists() else "no ranks work on it")
    owner, alive = found
    return f"{begun}, {'goes on' if alive else 'was killed'}: {owner}"


def ray_facts(run: RunFolder) -> dict[str, Any]:
    """What the last launcher of a run on Ray has noted of it. Raises DamagedDataError."""
    try:
        found: dict[str, Any] = parse_json(run.ray_file.read_bytes())
        return found
    except ValueError:
        raise DamagedDataError(f"{run.ray_file}: damaged; remove it.") from None


def _ray_state(run: RunFolder) -> str:
    """The state of a run on Ray, as its launcher has left it in the run folder."""
    facts = ray_facts(run)
    state, *ended = run.state_file.read_text("utf-8").split()
    place = f"{facts['host']} on the Ray cluster at {facts['cluster']}"
    if ended:
        return f"ended, exit code {ended[0]}"
    if facts["host"] == socket.gethostname():
        if process_state(facts["launcher"]) not in "XZ":
            return f"{state} from {place}"
        # it may have noted its end just before
        ended = run.state_file.read_text("utf-8").split()[1:]
        return f"ended, exit code {ended[0]}" if ended else "killed with its launcher"
    return f"begun from {place}, which knows whether it goes on"


def status_lines(facts: Mapping[str, Any]) -> str:
    """What `status` has found for people: a line about the run, and one for each attempt and rank."""
    job = f"job {facts['job']}: " if "job" in facts else ""
    state, steps = facts["state"], facts["steps"]
    # if the state says that all steps are done, their number goes into it, so that they are named once
    counted = state.replace(_ALL_DONE, f"all {steps:,} steps are done" if steps > 1 else _ALL_DONE)
    lines = [f"{job}{counted}" if _ALL_DONE in state else f"{job}{state}, {plural(steps, 'step')} done"]
    for row in facts["attempts"]:
        began, ended = row.get("began"), row.get("ended")
        lasted = f"{ended - began:,.0f} s, " if began and ended else ""
        hosts = f" on {' '.join(row['hosts'])}" if row.get("hosts") else ""
        lines.append(f"  attempt {row['attempt']}{hosts}: {lasted}{row.get('why') or _without_end(facts)}")
    lines += [f"  node {node} said last: {why}" for node, why in facts.get("nodes", {}).items()]
    lines += [f"  rank {rank}: {text}" for rank, text in facts.get("ranks", {}).items()]
    return "".join(f"{line}\n" for line in lines)


def _without_end(facts: Mapping[str, Any]) -> str:
    """Say what an attempt does whose end is not noted, as far as the state of its run tells."""
    # Slurm's states are written in capitals
    state = facts["state"].lower()
    if state.startswith("running"):
        return f"runs, at step {facts['at_step']:,}" if "at_step" in facts else "runs"
    return "was killed" if state.startswith(("killed", "starting")) else "goes on, or was killed with its job"
