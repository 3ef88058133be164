"""The reference check of a run: repeats its first steps in plain transformers and compares them."""

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
from distattn.ir.text_format import print_message
from distattn.supervision.helper_processes import LOOK_SECONDS, MOST_REPLACEMENTS, Helper, describe_exit
from distattn.training.config.run_file import Config
from distattn.training.reporting.json_lines import json_text, read_rows
from distattn.training.run_folder import RunFolder

# maximum relative difference by dtype: the replay sums in a different order
_TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 5e-2}
_COMPARED = ("loss", "grad_norm")
# how many seconds the replay may stay stopped (SIGSTOP) before it is replaced
_STOPPED_SECONDS = 10.0
_REPLAY = Path(__file__).with_name("reference_replay.py")


def run_reference_check(run: RunFolder, config: Config) -> dict[str, Any]:
    """Replay the first steps, compare them, and return the verdict, which is also written to reference_check.json.

    Raises DistattnError if the replay fails.
    """
    write_initial_weights(run, config)
    # -P: modules in the script's folder must not shadow other packages
    command = [sys.executable, "-P", str(_REPLAY), str(run.folder)]
    # the replay must end with this process, even if this process is killed
    wrapper = [sys.executable, "-m", "distattn.launch.ranks.die_with_launcher", str(os.getpid()), "--"]
    code, error_output = _run_watched([*wrapper, *command])
    if code:
        # a replay ended by a signal has printed no reason
        last = error_output.strip().splitlines()[-1] if code > 0 and error_output.strip() else describe_exit(code)
        raise DistattnError(f"the replay in plain transformers failed ({last}); run it by hand: {' '.join(command)}")
    verdict = compare_with_reference(run, config)
    run.reference_check_file.write_text(json_text(verdict, indent=1))
    return verdict


def _run_watched(command: Sequence[str]) -> tuple[int, str]:
    """Run the replay, and return its exit code and standard error. Raises DistattnError if it is stopped every time.

    A replay that is stopped or killed by a signal is started again, at most MOST_REPLACEMENTS times, and rewrites its
    output file. A replay that exits by itself is not restarted, since it would fail again for the same reason.
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
        print_message(f"{fault}; it begins again.")


def _communicate(process: subprocess.Popen[str], helper: Helper) -> tuple[str, str]:
    """Wait for the replay to end. Return its standard error, and the reason if it was killed because it was stopped, else ""."""
    stopped = ""
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=LOOK_SECONDS)[1], stopped
        fault = helper.fault(_STOPPED_SECONDS)
        # a replay that has just ended is not killed: `communicate` returns the reason that it printed
        if fault and not stopped and not helper.end():
            stopped = fault
            process.kill()


def write_initial_weights(run: RunFolder, config: Config) -> None:
    """Write the initial weights as a transformers folder. This process creates them anew, without an engine."""
    # importing transformers takes seconds, and most users of this module do not need it
    from distattn.models.build import model_config
    from distattn.models.export import export_model
    from distattn.training.config.run_settings import build_model, runs_on_gpus

    # use the run's device type: GPUs and CPUs draw different random numbers
    device = "cuda" if runs_on_gpus(config) and not config.memory.state_on_host else "cpu"
    # an earlier check may have left an incomplete folder
    shutil.rmtree(run.initial_weights, ignore_errors=True)
    model = build_model(config, model_config(run.folder), "eager", device)
    export_model(model, run.initial_weights)


def compare_with_reference(run: RunFolder, config: Config) -> dict[str, Any]:
    """Return the verdict: the largest relative differences |ours - reference| / |reference| of loss and gradient norm.

    A NaN fails the check. Raises DistattnError if the run and the replay do not have all steps to compare.
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
            # two zeros are equal; numpy's max propagates NaN, which Python's may lose
            verdict[name] = float(np.where(a == b, 0.0, np.abs(a - b) / np.abs(b)).max())
    tolerance = config.reference_check.tolerance or _TOLERANCE[config.model.dtype]
    passed = all(verdict[name] < tolerance for name in _COMPARED)
    return verdict | {"tolerance": tolerance, "passed": passed, "steps": steps}
