"""`distattn preflight`: run on this machine the checks that precede a run's first step, without the run itself."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distattn.ir.errors import DistattnError
from distattn.ir.text_format import print_message
from distattn.launch.command_keys import refuse_keys_that_do_nothing
from distattn.launch.command_line import check_options, no_progress
from distattn.launch.ranks.machine_limits import check_run_fits
from distattn.launch.run_locally import run_ranks_and_finish
from distattn.launch.start_run import preflight_alone, start_run
from distattn.training.config import run_file as configuration
from distattn.training.config.sections import PreflightConfig

USAGE = """usage: distattn preflight CONFIG [--json] [--section.key value ...]

Starts the ranks of a run on this machine, compares their code, configuration, packages, data and memory, measures matrix
products and the links between them, and ends; it leaves nothing behind. Every run does this before its first step, on all its
hosts (see preflight.action). To do only this on a cluster: distattn launch slurm|ray CONFIG --preflight.action=only.
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit code, which is 0 if the run could begin."""
    rest = [word for word in arguments if word != "--json"]
    if not rest:
        raise DistattnError("preflight: CONFIG is missing: name a configuration, for example: distattn preflight tiny")
    if rest[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    check_options("preflight", rest, ["--json"])
    refuse_keys_that_do_nothing("preflight", rest[1:])
    config = configuration.load(rest[0], rest[1:], print_message)
    check_run_fits(config)
    wanted = Path(config.run.folder).absolute()
    existing = next(folder for folder in wanted.parents if folder.is_dir())
    # use a folder next to the future run folder, so that the run's own disk and file system are examined
    with tempfile.TemporaryDirectory(prefix=".distattn-preflight-", dir=existing) as folder:
        place = replace(config.run, folder=str(Path(folder, "run")))
        config = preflight_alone(replace(config, run=place, preflight=PreflightConfig("only")))
        run = start_run(config, no_progress)
        return run_ranks_and_finish(run, config, no_progress, json_lines=len(rest) < len(arguments))
