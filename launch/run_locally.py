"""A run on this machine, from its configuration to its report."""

from __future__ import annotations

import json
from collections.abc import Callable

from distattn.launch.command_line import no_progress, print_line
from distattn.launch.machine_limits import check_run_fits
from distattn.launch.start_run import require_packages, resume_run, start_run
from distattn.training.config import Config
from distattn.training.run_folder import RunFolder

_PACKAGES = ("transformers", "tensorboard", "matplotlib", "safetensors")


def run_locally(config: Config, json_lines: bool, logs: bool = False) -> int:
    """Start a run here, train, compare with plain transformers, report. Returns the exit code.

    logs: whether each rank writes a log file into the run folder. json_lines: nothing but JSON is printed.
    """
    require_packages(*_PACKAGES)
    check_run_fits(config)
    report_progress = no_progress if json_lines else print_line
    run = start_run(config, report_progress)
    if logs:
        run.logs.mkdir()

    return _run(run, config, report_progress, json_lines)


def resume_locally(run: RunFolder, config: Config, json_lines: bool) -> int:
    """Go on with a run here from its newest checkpoint, with a configuration that may differ. Returns the exit code."""
    require_packages(*_PACKAGES)
    check_run_fits(config)
    report_progress = no_progress if json_lines else print_line
    resume_run(run, config, report_progress)
    return _run(run, config, report_progress, json_lines)


def _run(run: RunFolder, config: Config, report_progress: Callable[[str], None], json_lines: bool) -> int:
    # heavy imports only once the run is known to be possible
    from distattn.launch.finish_run import finish_run
    from distattn.launch.local import run_ranks

    code = run_ranks(config.parallel.ranks, "distattn.launch.rank", str(run.folder), json.dumps(json_lines))
    return code or finish_run(run, config, report_progress, json_lines)
