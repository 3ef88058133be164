"""The end of a run: its first steps are repeated in plain transformers, and the report is written.

`python -m distattn.launch.finish_run RUN` does it for a run folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distattn.ir.errors import DistattnError
from distattn.ir.plan import Plan
from distattn.parallel.analysis.explain import explain
from distattn.training import config as configuration
from distattn.training.config import Config
from distattn.training.reference_check import run_reference_check
from distattn.training.report import write_report
from distattn.training.run_folder import Run


def finish(run: Run, config: Config, say: Callable[[str], None], json_lines: bool) -> int:
    """Compare with plain transformers, report, and say how it went. Returns the exit code."""
    checked: dict[str, Any] | None = None
    if config.reference_check.steps:
        say(f"the first {min(config.reference_check.steps, config.train.steps)} steps again in plain transformers ...")
        checked = run_reference_check(run, config)
    write_report(run, config, explain(Plan.load(run.plan_file), config.parallel.cluster), checked)
    steps = run.metrics()
    if json_lines:
        result = {
            "run": str(run.folder),
            "first_loss": steps[0].loss,
            "last_loss": steps[-1].loss,
            "reference_check": checked,
        }
        sys.stdout.write(json.dumps(result) + "\n")
    say(f"loss {steps[0].loss:.3f} to {steps[-1].loss:.3f} in {len(steps)} steps")
    if checked:
        say(
            f"largest relative difference to plain transformers: loss {checked['loss']:.1e}, gradient norm "
            f"{checked['grad_norm']:.1e} (must be under {checked['tolerance']:.0e})"
        )
    say(f"report: {run.report_file}")
    if checked and not checked["passed"]:
        sys.stderr.write("distattn: the run differs from plain transformers: the reference check failed.\n")
        return 1
    return 0


def main(folder: str) -> int:
    """The same for a run folder."""
    run = Run(Path(folder))
    try:
        return finish(run, configuration.load(run.config_file), lambda line: print_line(line), False)
    except DistattnError as error:
        sys.stderr.write(f"distattn: {error}\n")
        return error.exit_code


def print_line(line: str) -> None:
    """At once, also into a file."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
