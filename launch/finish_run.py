"""Finish a run: `python -m distattn.launch.finish_run RUN` repeats its first steps in plain transformers and reports."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distattn.checkpoints.checkpoint_folder import by_preference, list_checkpoints, preferred_step
from distattn.ir.errors import DistattnError
from distattn.ir.text_format import plural, print_message
from distattn.launch.attempts import Attempts
from distattn.launch.command_line import finish_command, print_line
from distattn.launch.stop_signals import CommandStopped, end_now, stop_on_signals, stopped
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config
from distattn.training.reporting.json_lines import json_text, parse_json
from distattn.training.reporting.report import write_report
from distattn.training.run_folder import RunFolder, StepMetrics
from distattn.training.watch.reference_check import run_reference_check


def finish_run(run: RunFolder, config: Config, report_progress: Callable[[str], None], json_lines: bool) -> int:
    """Compare with plain transformers, write the report, print the result, and return the exit code.

    The code is 1 if the comparison failed or the last loss is not finite; stderr then says how to continue. If the comparison
    raises an error, the report is still written before the error is raised, unless the command is stopped.
    """
    checked: dict[str, Any] | None = None
    later = f"all steps are done, and {finish_command(run.folder)}"
    with stopped("while the report was written", f"{later} writes it"):
        try:
            if config.reference_check.steps:
                with stopped("in the comparison with plain transformers", f"{later} compares and reports"):
                    steps_compared = min(config.reference_check.steps, config.train.steps)
                    report_progress(f"the first {plural(steps_compared, 'step')} again in plain transformers ...")
                    checked = run_reference_check(run, config)
        except Exception:
            _report(run, config, checked, report_progress, json_lines)
            raise
        _report(run, config, checked, report_progress, json_lines)
    failures = []
    if checked and not checked["passed"]:
        failures.append("the run differs from plain transformers: the reference check failed.")
    steps = run.metrics(config.train.steps)
    if not math.isfinite(steps[-1].loss):
        failures.append(f"the loss of the last step, {steps[-1].step:,}, is {steps[-1].loss}: {_way_back(run, steps)}")
    for failure in failures:
        print_message(failure)
    return 1 if failures else 0


def _way_back(run: RunFolder, steps: Sequence[StepMetrics]) -> str:
    """Return advice for a run whose weights may be destroyed, as the end of a sentence. steps: the steps done."""
    refused = list(itertools.takewhile(lambda step: step.skipped, reversed(steps)))
    since = f"steps from {refused[-1].step:,} on were refused, and " if refused else ""
    checkpoints = by_preference(list_checkpoints(run.checkpoints))
    good = [checkpoint.step for checkpoint in checkpoints if not checkpoint.verdict.is_doubtful]
    if not good:
        return f"{since}no checkpoint is good; start again, with a lower train.learning_rate, for example."
    return (
        f"{since}the weights may be destroyed; distattn resume {run.folder} --step {good[0]} continues from the newest "
        "checkpoint that is not in doubt, distattn ckpt list shows all."
    )


def _report(
    run: RunFolder,
    config: Config,
    checked: dict[str, Any] | None,
    report_progress: Callable[[str], None],
    json_lines: bool,
) -> None:
    steps = run.metrics(config.train.steps)
    if not steps:
        raise DistattnError(f"{run.metrics_file}: has no step to report; was its disk full?")
    write_report(run, config, checked, Attempts(run.attempts).rows())
    if json_lines:
        _print_facts(run, steps, checked)
    report_progress(f"loss {steps[0].loss:.3f} to {steps[-1].loss:.3f} in {plural(len(steps), 'step')}")
    if checked:
        report_progress(
            f"largest relative difference to plain transformers: loss {checked['loss']:.1e}, gradient norm "
            f"{checked['grad_norm']:.1e} (must be under {checked['tolerance']:.0e})"
        )
    report_progress(f"report: {run.report_file}")


def _print_facts(run: RunFolder, steps: Sequence[StepMetrics], checked: dict[str, Any] | None) -> None:
    """Print the results of a run as JSON on one line."""
    losses = {"first_loss": steps[0].loss, "last_loss": steps[-1].loss}
    print_line(
        json_text({"run": str(run.folder), **losses, "reference_check": checked, "report": str(run.report_file)})
    )


def report_finished(run: RunFolder, config: Config, json_lines: bool) -> bool:
    """Print that a run is complete and return True, if all steps are done, compared (if configured) and reported.

    Otherwise return False and print nothing.
    """
    attempts = Attempts(run.attempts)
    steps = run.metrics(config.train.steps) if run.metrics_file.exists() else []
    if not steps or not attempts.rows() or attempts.goes_on or not attempts.is_reported(run.report_file):
        return False
    if preferred_step(run.checkpoints) != config.train.steps or not math.isfinite(steps[-1].loss):
        return False
    checked: dict[str, Any] | None = None
    if config.reference_check.steps:
        if not run.reference_check_file.exists() or not attempts.is_reported(run.reference_check_file):
            return False
        with contextlib.suppress(ValueError):
            checked = parse_json(run.reference_check_file.read_bytes())
        if not checked or not checked.get("passed"):
            return False
    if json_lines:
        _print_facts(run, steps, checked)
    else:
        print_line(f"all {config.train.steps:,} steps are done; --train.steps N trains further")
        print_line(f"report: {run.report_file}")
    return True


def main(folder: str) -> int:
    """Finish the run in `folder`. Return the exit code."""
    run = RunFolder(Path(folder))
    try:
        config = configuration.load(run.config_file)
        # a preflight alone has no steps to report
        with stop_on_signals():
            return 0 if config.preflight.action == "only" else finish_run(run, config, print_line, False)
    except (CommandStopped, DistattnError) as error:
        print_message(str(error))
        return error.exit_code


if __name__ == "__main__":
    with stop_on_signals():
        if (_code := main(sys.argv[1])) > 128:
            end_now(_code)
    sys.exit(_code)
