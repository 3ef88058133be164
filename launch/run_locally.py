"""A run on this machine, from its configuration to its report."""

from __future__ import annotations

import importlib.util
import json

from distattn.ir.errors import DistattnError
from distattn.launch.machine_limits import check_run_fits
from distattn.launch.start_run import prepare
from distattn.training.config import Config


def run_here(config: Config, json_lines: bool, logs: bool = False) -> int:
    """Prepare, train, compare with plain transformers, report. Returns the exit code.

    logs: whether each rank writes a log file into the run folder.
    """
    missing = [name for name in ("transformers", "tensorboard", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise DistattnError(f"training needs {', '.join(missing)}: pip install 'distattn[train]'.")
    check_run_fits(config)
    run = prepare(config, json_lines)
    if logs:
        run.logs.mkdir()

    # heavy imports only once the run is known to be possible
    from distattn.launch.finish_run import finish, print_line
    from distattn.launch.local import run_ranks

    code = run_ranks(config.parallel.ranks, "distattn.launch.rank", str(run.folder), json.dumps(json_lines))
    if code:
        return code
    return finish(run, config, (lambda line: None) if json_lines else print_line, json_lines)
