"""The reference check of a run: its first steps are repeated in plain transformers and compared."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from distattn.ir.errors import DistattnError
from distattn.supervision.helper_processes import LOOK_SECONDS, MOST_REPLACEMENTS, Helper, describe_exit
from distattn.training.config.run_file import Config
from distattn.training.reporting.json_lines import json_text, read_rows
from distattn.training.reporting.metrics import warn
from distattn.training.run_folder import RunFolder

# maximum relative differences: the same dtype with other orders of summation
_TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 5e-2}
_COMPARED = ("loss", "grad_norm")
# seconds for which the replay may be stopped
_STOPPED_SECONDS = 10.0
_REPLAY = Path(__file__).with_name("reference_replay.py")


def run_reference_check(run: RunFolder, config: Config) -> dict[str, Any]:
    """Replay the first steps and compare; the verdict is also written to reference_check.json.

    Raises DistattnError where the replay fails.
    """
    write_initial_weights(run, config)
    # -P: the script's own folder must not shadow other packages
    command = [sys.executable, "-P", str(_REPLAY), str(run.folder)]
    # the replay ends with this process, even if this one is killed
    wrapper = [sys.executable, "-m", "distattn.launch.ranks.die_with_launcher", str(os.getpid()), "--"]
    code, error_output = _run_watched([*wrapper, *command])
    if code:
        # a replay that a signal ended has not printed a reason
        last = error_output.strip().splitlines()[-1] if code > 0 and error_output.strip() else describe_exit(code)
        raise DistattnError(f"the replay in plain transformers failed ({last}); run it by hand: {' '.join(command)}")
    verdict = compare_with_reference(run, config)
    run.reference_check_file.write_text(json_text(verdict, indent=1))
    return verdict


def _run_watched(command: Sequence[str]) -> tuple[int, str]:
    """Run the replay; return its exit code and its error stream. Raises DistattnError where it stays stopped.

    A replay that is stopped, or ended by a signal, is started again at most MOST_REPLACEMENTS times and rewrites its
    file. One that exits by itself would fail again for the same reason.
    """
    left = MOST_REPLACEMENTS
    while True:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            helper = Helper("the replay in plain transformers", process.pid)
            try:
                error_output, stopped = _communicate(process, helper)
            except BaseException:
                process.kill()
                raise
        if process.returncode >= 0:
            return process.returncode, error_output
        fault = f"{helper} {stopped or describe_exit(process.returncode)}"
        if not left and stopped:
            raise DistattnError(f"{fault}; compare again later.")
        if not left:
            return process.returncode, error_output
        left -= 1
        warn(f"{fault}; it begins again.")


def _communicate(process: subprocess.Popen[str], helper: Helper) -> tuple[str, str]:
    """Return the replay's error stream when it ends, and why it was killed if it had been stopped for _STOPPED_SECONDS."""
    stopped = ""
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=LOOK_SECONDS)[1], stopped
        fault = helper.fault(_STOPPED_SECONDS)
        # a replay that has just ended has printed its reason; `communicate` returns it
        if fault and not stopped and not helper.end():
            stopped = fault
            process.kill()


def write_initial_weights(run: RunFolder, config: Config) -> None:
    """Write the weights before the first step as a transformers folder, created anew in this process, without an
    engine.
    """
    # transformers takes seconds to import, and most of this module's users do not need it
    from distattn.models.build import model_config
    from distattn.models.export import export_model
    from distattn.training.config.run_settings import build_model, runs_on_gpus

    # a GPU draws other random numbers than a CPU
    device = "cuda" if runs_on_gpus(config) and not config.memory.state_on_host else "cpu"
    # an earlier check may have left a part of it
    shutil.rmtree(run.initial_weights, ignore_errors=True)
    model = build_model(config, model_config(run.folder), "eager", device)
    export_model(model, run.initial_weights)


def compare_with_reference(run: RunFolder, config: Config) -> dict[str, Any]:
    """Return the largest relative differences |ours - reference| / |reference| of loss and gradient norm; NaN fails the
    check.
    """
    wanted = min(config.reference_check.steps, config.train.steps)
    ours, reference = run.metrics()[:wanted], read_rows(run.replay_file)
    if [step.step for step in ours] != [row["step"] for row in reference] or len(reference) != wanted:
        raise DistattnError(
            f"the reference check compares {wanted} steps; the run has {len(ours)}, the replay {len(reference)}."
        )
    steps = [
        {"step": step.step}
        | {name: getattr(step, name) for name in _COMPARED}
        | {f"reference_{name}": row[name] for name in _COMPARED}
        for step, row in zip(ours, reference, strict=True)
    ]
    verdict: dict[str, Any] = {}
    for name in _COMPARED:
        a, b = (np.array([row[key] for row in steps]) for key in (name, f"reference_{name}"))
        with np.errstate(divide="ignore", invalid="ignore"):
            # equal zeros do not differ; numpy's max keeps a NaN, Python's may lose it
            verdict[name] = float(np.where(a == b, 0.0, np.abs(a - b) / np.abs(b)).max())
    tolerance = config.reference_check.tolerance or _TOLERANCE[config.model.dtype]
    passed = all(verdict[name] < tolerance for name in _COMPARED)
    return verdict | {"tolerance": tolerance, "passed": passed, "steps": steps}
