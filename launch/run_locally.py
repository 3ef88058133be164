"""A run on this machine, from its configuration to its report."""

from __future__ import annotations

import json

from distattn.launch.command_line import no_progress, print_line
from distattn.launch.machine_limits import check_run_fits
from distattn.launch.start_run import require_packages, start_run
from distattn.training.config import Config


def run_locally(config: Config, json_lines: bool, logs: bool = False) -> int:
    """Start a run here, train, compare with plain transformers, report. Returns the exit code.

    logs: whether each rank writes a log file into the run folder. json_lines: nothing but JSON is printed.
    """
    require_packages("transformers", "tensorboard", "matplotlib")
    check_run_fits(config)
    report_progress = no_progress if json_lines else print_line
    run = start_run(config, report_progress)
    if logs:
        run.logs.mkdir()

    # heavy imports only once the run is known to be possible
    from distattn.launch.finish_run import finish_run
    from distattn.launch.local import run_ranks

    code = run_ranks(config.parallel.ranks, "distattn.launch.rank", str(run.folder), json.dumps(json_lines))
    return code or finish_run(run, config, report_progress, json_lines)
