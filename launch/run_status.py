"""The state of a run on Slurm, on Ray or on this machine, with its attempts and its ranks' activities."""

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
from distattn.ir.text_format import plural
from distattn.launch.attempts import Attempts
from distattn.launch.command_line import finish_command
from distattn.launch.slurm import jobs as slurm
from distattn.supervision.culprits import last_activity, process_state
from distattn.training.reporting.json_lines import parse_json
from distattn.training.run_folder import RunFolder

_ALL_DONE = "all steps are done"
# phases of runs that have ended
_OVER = ("ended", "killed")
# states in squeue(1) of a job that is not over: it runs, waits for nodes, or runs on another cluster
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
    """Look up the state, steps and attempts of a run, and its Slurm job number or, without Slurm, its ranks' activities.

    state: a sentence. phase: the state for programs: "new", "starting", "waiting" (for nodes), "running", "between" (attempts),
    "ended", "killed" or "unknown". all_done: True if the sentence says that all steps are done.

    For a run started by another scheduler, the result has no attempts, but its nodes' last reports of failed ranks, by
    node. Raises the same errors as `slurm.status`.
    """
    attempts, launcher = Attempts(run.attempts), _launcher(run)
    # a run started on Slurm may have been resumed on this machine since
    if run.job_file.exists() and attempts.beats() is None and launcher is None:
        job = slurm.status(run)
        return job if job["state"] in _JOB_GOES_ON else _with_report(run, job)
    steps = run.steps_done()
    beats, rows = attempts.beats(), attempts.rows()
    if beats is None and rows and "why" not in rows[-1]:
        # try again: the attempt may have begun between the two calls
        beats = attempts.beats()
    if run.ray_file.exists() and beats is None and launcher is None:
        phase, state = _ray_state(run)
        ray_run: dict[str, Any] = {
            "run": str(run.folder),
            "state": state,
            "phase": phase,
            "steps": steps,
            "attempts": rows,
        }
        if phase not in _OVER:
            return ray_run
        ray_run = _with_report(run, ray_run)
        if phase == "killed" and not ray_run["all_done"]:
            ray_run["state"] += f", python -m distattn.launch.ray.attempts {run.folder} continues"
        return ray_run
    last, all_done = rows[-1] if rows else {}, False
    # without heartbeats, also look for the launcher, since another user's heartbeats cannot be read
    killed = beats is None and launcher is None
    phase, state = ("killed", "killed with its launcher") if killed else ("running", "running")
    if beats is None and launcher is not None and last.get("process") != launcher.writer_name:
        phase, state = "starting", f"starting: {launcher}"
    elif not rows:
        phase, state = _state_elsewhere(run, steps)
    elif "why" in last:
        phase, state = "ended", f"ended, exit code {last['exit_code']}"
        alive = launcher is not None or (writer_is_alive(last["process"]) if "process" in last else False)
        if missing := _unreported(run, {"attempts": rows, "steps": steps}):
            all_done = True
            if alive:
                phase, state = "between", f"{_ALL_DONE}, its launcher compares and reports"
            else:
                state += missing
            if alive is None:
                state += f", unless its launcher on {last['host']} still does so"
        elif alive:
            # the launcher is about to restart the ranks, or to end
            phase = "between"
            state = f"attempt {last['attempt']} ended with exit code {last['exit_code']}, its launcher continues"
    elif (host := last.get("host")) != socket.gethostname():
        phase, state = "unknown", f"begun on {host}, which knows whether it is running"
    ranks = {str(rank): last_activity(beat) for rank, beat in (beats or {}).items()}
    reports = {} if rows else attempts.node_reports(attempts.latest)
    nodes = {str(node): facts["why"] for node, facts in sorted(reports.items())}
    # step of the rank that is furthest ahead, counted from 1; 0 before the first step
    at_step = 1 + max((beat.step for beat in (beats or {}).values()), default=-1)
    facts = {"run": str(run.folder), "state": state, "phase": phase, "all_done": all_done, "steps": steps}
    facts |= {"attempts": rows, "ranks": ranks, "nodes": nodes}
    return facts | ({"at_step": at_step} if at_step else {})


def state_of_ended(run: RunFolder) -> str | None:
    """Return the state of a run or sweep that has ended and cannot be cancelled, or None if it is still active.

    Raises the same errors as `slurm.status`.
    """
    if sweep_runs(run.folder):
        # a sweep on Slurm has no state of its own: each task ends separately
        phase, state = _ray_state(run) if run.ray_file.exists() else ("unknown", "")
    else:
        facts = status(run)
        phase, state = facts["phase"], facts["state"]
        if "job" in facts:
            return None if state in _JOB_GOES_ON else state
    return state if phase in _OVER else None


def cancel(run: RunFolder) -> tuple[str, int | str]:
    """Cancel a run's Slurm job, or end its launcher on this machine. Return ("job", number) or ("launcher", process id).

    On Ray, the ranks are asked through the run folder to save and end. Raises DistattnError if the run has no job or launcher.
    """
    attempts = Attempts(run.attempts)
    if attempts.beats() is None and (launcher := _launcher(run)) is not None:
        # the launcher has no ranks at the moment
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
                f"{run.folder}: process {last['launcher']}, which started its ranks, is still alive but no longer holds the "
                "folder; end that process, or wait until it ends."
            )
        raise DistattnError(f"{run.folder}: nothing was submitted from here, and no ranks of this machine work on it.")
    process = int(attempts.rows()[-1]["launcher"])
    os.kill(process, signal.SIGTERM)
    return "launcher", process


def sweep_runs(folder: Path) -> list[RunFolder]:
    """Return the runs of a sweep on Slurm or Ray in order, or [] if the folder is not a sweep's folder."""
    place = RunFolder(folder)
    if place.config_file.exists() or not (place.job_file.exists() or place.ray_file.exists()):
        return []
    tasks = [entry for entry in folder.iterdir() if entry.name.isdecimal() and RunFolder(entry).config_file.exists()]
    return [RunFolder(entry) for entry in sorted(tasks, key=lambda entry: int(entry.name))]


def _launcher(run: RunFolder) -> Owner | None:
    """Return the launcher that holds a run's lock, here or on another machine, or None if no live launcher holds it."""
    # checking another machine's lease needs the file system's clock, and thus write permission in the folder
    with contextlib.suppress(OSError):
        if (owner_and_life := folder_owner(run.folder, LAUNCHER)) is not None:
            launcher, is_alive = owner_and_life
            return launcher if is_alive else None
    return None


def _with_report(run: RunFolder, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts about an ended run. If its report is missing, the state says so and names the command that writes it."""
    missing = _unreported(run, facts)
    return facts | {"state": facts["state"] + missing, "all_done": bool(missing)}


def _unreported(run: RunFolder, facts: Mapping[str, Any]) -> str:
    """Return a clause for the state of a run that did all steps but has no report, naming the command for it; or ""."""
    last = facts["attempts"][-1] if facts["attempts"] else {}
    # a preflight alone has no steps to report
    if last.get("exit_code") != 0 or not facts["steps"] or Attempts(run.attempts).is_reported(run.report_file):
        return ""
    return f", {_ALL_DONE}, but not reported: {finish_command(run.folder)} compares and reports"


def _state_elsewhere(run: RunFolder, steps: int) -> tuple[str, str]:
    """Return the phase and state of a run without recorded attempts, according to the lock on its folder."""
    if not steps and not run.attempts.exists():
        return "new", "not begun"
    begun = "begun by another scheduler, no attempts are recorded"
    owner_and_life = folder_owner(run.folder)
    if owner_and_life is None:
        return "unknown", f"{begun}, " + (
            "its report is written" if run.report_file.exists() else "no ranks work on it"
        )
    owner, alive = owner_and_life
    return "unknown", f"{begun}, {'running' if alive else 'was killed'}: {owner}"


def ray_facts(run: RunFolder) -> dict[str, Any]:
    """Return the facts recorded by a Ray run's last launcher. Raises DamagedDataError if they cannot be parsed."""
    try:
        facts: dict[str, Any] = parse_json(run.ray_file.read_bytes())
        return facts
    except ValueError:
        raise DamagedDataError(f"{run.ray_file}: damaged; remove it.") from None


def _ray_state(run: RunFolder) -> tuple[str, str]:
    """Return the phase and state of a run on Ray, as its launcher recorded them in the run folder."""
    facts = ray_facts(run)
    state, *ended = run.state_file.read_text("utf-8").split()
    place = f"{facts['host']} on the Ray cluster at {facts['cluster']}"
    if ended:
        return "ended", f"ended, exit code {ended[0]}"
    if facts["host"] == socket.gethostname():
        if process_state(facts["launcher"]) not in "XZ":
            return state, f"{state} from {place}"
        # read again: the launcher may have recorded its end since the first read
        ended = run.state_file.read_text("utf-8").split()[1:]
        return ("ended", f"ended, exit code {ended[0]}") if ended else ("killed", "killed with its launcher")
    return "unknown", f"begun from {place}, which knows whether it is running"


def status_lines(facts: Mapping[str, Any]) -> str:
    """Format the result of `status` for users: a line about the run, and one for each attempt and rank."""
    job = f"job {facts['job']}: " if "job" in facts else ""
    state, steps = facts["state"], facts["steps"]
    # if the state says that all steps are done, put the number of steps there, so that it appears only once
    counted = state.replace(_ALL_DONE, f"all {steps:,} steps are done" if steps > 1 else _ALL_DONE)
    lines = [f"{job}{counted}" if facts.get("all_done") else f"{job}{state}, {plural(steps, 'step')} done"]
    for row in facts["attempts"]:
        began, ended = row.get("began"), row.get("ended")
        lasted = f"{ended - began:,.0f} s, " if began and ended else ""
        hosts = f" on {' '.join(row['hosts'])}" if row.get("hosts") else ""
        lines.append(f"  attempt {row['attempt']}{hosts}: {lasted}{row.get('why') or _without_end(facts)}")
    lines += [f"  last report of node {node}: {why}" for node, why in facts.get("nodes", {}).items()]
    lines += [f"  rank {rank}: {text}" for rank, text in facts.get("ranks", {}).items()]
    return "".join(f"{line}\n" for line in lines)


def _without_end(facts: Mapping[str, Any]) -> str:
    """Return a clause about an attempt without a recorded end, derived from the phase of its run."""
    if facts["phase"] == "running":
        return f"runs, at step {facts['at_step']:,}" if "at_step" in facts else "runs"
    return "was killed" if facts["phase"] in ("killed", "starting") else "is running, or was killed with its job"
