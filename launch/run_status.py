"""What becomes of a run, whether it was submitted to Slurm or started here: its state, its attempts, and what its ranks do."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from typing import Any

from distattn.ir.errors import DistattnError
from distattn.launch import slurm
from distattn.launch.attempts import Attempts
from distattn.supervision.culprits import words
from distattn.training.run_folder import RunFolder


def status(run: RunFolder) -> dict[str, Any]:
    """Look up a run: its state, the steps done and the attempts; its job's number on Slurm, else what each rank does, by rank.

    Raises DistattnError as `slurm.status` does.
    """
    attempts = Attempts(run.attempts)
    # a run of Slurm's may have been resumed here
    if run.job_file.exists() and attempts.beats() is None:
        return slurm.status(run)
    steps = len(run.metrics()) if run.metrics_file.exists() else 0
    rows, beats = attempts.rows(), attempts.beats()
    last = rows[-1] if rows else {}
    state = "running" if beats is not None else "killed with its launcher"
    if not rows:
        state = "not begun" if not steps else "begun by another scheduler"
    elif "why" in last:
        state = f"ended, exit code {last['exit_code']}"
    elif (host := last.get("host")) != socket.gethostname():
        state = f"begun on {host}, which knows whether it goes on"
    ranks = {str(rank): words(beat) for rank, beat in (beats or {}).items()}
    return {"run": str(run.folder), "state": state, "steps": steps, "attempts": rows, "ranks": ranks}


def cancel(run: RunFolder) -> tuple[str, int | str]:
    """Cancel the "job", or end the "launcher" that goes on here; returns which, and its number.

    Raises DistattnError where neither goes on.
    """
    attempts = Attempts(run.attempts)
    if run.job_file.exists() and attempts.beats() is None:
        return "job", slurm.cancel(run)
    if attempts.beats() is None:
        raise DistattnError(f"{run.folder}: nothing was submitted from here, and no ranks of this machine work on it.")
    launcher = int(attempts.rows()[-1]["launcher"])
    os.kill(launcher, signal.SIGTERM)
    return "launcher", launcher


def status_lines(facts: Mapping[str, Any]) -> str:
    """What `status` has found for people: a line about the run, and one for each attempt and rank."""
    job = f"job {facts['job']}: " if "job" in facts else ""
    lines = [f"{job}{facts['state']}, {facts['steps']} steps done"]
    for row in facts["attempts"]:
        began, ended = row.get("began"), row.get("ended")
        lasted = f"{ended - began:,.0f} s, " if began and ended else ""
        hosts = f" on {' '.join(row['hosts'])}" if row.get("hosts") else ""
        lines.append(
            f"  attempt {row['attempt']}{hosts}: {lasted}{row.get('why', 'goes on, or was killed with its job')}"
        )
    lines += [f"  rank {rank}: {text}" for rank, text in facts.get("ranks", {}).items()]
    return "".join(f"{line}\n" for line in lines)
