"""`distattn preflight`: what a run's ranks compare and measure before the first step, without the run.

As a module with arguments it is one rank of it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distattn.ir.errors import DistattnError
from distattn.launch.command_line import no_progress, print_line
from distattn.launch.machine_limits import check_run_fits
from distattn.launch.start_run import start_run
from distattn.training import config as configuration
from distattn.training.config import Config
from distattn.training.json_lines import json_text
from distattn.training.run_folder import RunFolder

USAGE = """usage: distattn preflight CONFIG [--json] [--section.key value ...]

Starts the ranks of a run on this machine, compares their code, configuration, packages, data and memory, measures products
and links between them, and ends. Every run does so before its first step, on all its hosts (see preflight.action).
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command. Returns 0 where the run could begin."""
    words = [word for word in arguments if word != "--json"]
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if words else 2
    config = configuration.load(words[0], words[1:])
    check_run_fits(config)
    wanted = Path(config.run.folder).absolute()
    there = next(folder for folder in wanted.parents if folder.is_dir())
    # where the run will be: its disk and its file system are looked at
    with tempfile.TemporaryDirectory(prefix=".distattn-preflight-", dir=there) as folder:
        run = start_run(replace(config, run=replace(config.run, folder=str(Path(folder, "run")))), no_progress)
        # seconds to import, and only once the run is known to be possible
        from distattn.launch.local import run_ranks

        as_json = json.dumps(len(words) < len(arguments))
        return run_ranks(config.parallel.ranks, "distattn.launch.preflight_command", str(run.folder), as_json)


def rank_main(folder: str, as_json: bool) -> int:
    """Be one rank of a preflight. Returns the exit code; rank 0 says what was found."""
    import torch

    from distattn.preflight.preflight import PreflightReport, preflight, report_json, show_report
    from distattn.training.rank import on_rank

    def tell(report: PreflightReport) -> None:
        if as_json:
            print_line(json_text(report_json(report)))
        else:
            show_report(report, print_line, stops=True)

    def work(run: RunFolder, config: Config, device: torch.device) -> int:
        return DistattnError.exit_code if preflight(run, config, device, tell).problems else 0

    return on_rank(folder, work)


if __name__ == "__main__":
    sys.exit(rank_main(sys.argv[1], json.loads(sys.argv[2])))
