"""`distattn resume`: continue a run from its newest good checkpoint, on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from distattn.ir.errors import DistattnError
from distattn.ir.text_format import print_message
from distattn.launch.command_keys import refuse_keys_that_do_nothing
from distattn.launch.command_line import check_options
from distattn.launch.finish_run import report_finished
from distattn.launch.run_locally import resume_locally
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config
from distattn.training.run_facts import check_same_run
from distattn.training.run_folder import RunFolder

USAGE = """usage: distattn resume RUN [--step N] [--json] [--section.key value ...]

Continues the run of a folder on this machine, from its newest good checkpoint, or from its first step without one.
--step N continues from the checkpoint after step N and sets later ones aside. distattn ckpt list RUN shows them.
Ranks, degrees, strategy, kernel, engine and everything about logging or saving may change; the model's shape, the data and the
seed stay. A new number of ranks is on one node unless parallel.devices_per_node is given, too. A resume that the command or the
ranks refuse leaves the run's configuration as it was. A run that has done all its steps and has its report and comparison
starts nothing: --train.steps N trains further. Continue runs on Slurm with sbatch RUN/job.sbatch, runs on Ray with
python -m distattn.launch.ray.attempts RUN.
"""


def _rederived(before: Config, overrides: Sequence[str]) -> list[str]:
    """Return overrides for keys that a launcher derived from the number of ranks, if that number changes."""
    named = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in overrides}
    if before.parallel.devices_per_node and "parallel.ranks" in named and "parallel.devices_per_node" not in named:
        # all ranks now run on this machine
        return ["--parallel.devices_per_node=0"]
    return []


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    rest = [word for word in arguments if word != "--json"]
    if not rest or rest[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if rest else 2
    step, rest = _step(rest)
    if not rest:
        raise DistattnError(f"resume: name a run folder: {USAGE.splitlines()[0].removeprefix('usage: ')}")
    check_options("resume", rest, ["--json", "--step"])
    refuse_keys_that_do_nothing("resume", rest[1:])
    run = RunFolder(Path(rest[0]))
    if not run.config_file.is_file():
        raise DistattnError(
            f"{rest[0]}: this is not a run folder: it has no {run.config_file.name}; name one that distattn train made."
        )
    before = configuration.load(run.config_file)
    overrides = [*rest[1:], *_rederived(before, rest[1:])]
    config = configuration.load(run.config_file, overrides, print_message)
    if config.preflight.action == "only":
        raise DistattnError(f"preflight.action: only needs a new folder: distattn preflight {run.config_file}.")
    check_same_run(before, config)
    # a changed configuration or a chosen checkpoint gives the ranks work to do
    if config == before and step is None and report_finished(run, config, json_lines="--json" in arguments):
        return 0
    return resume_locally(run, config, json_lines="--json" in arguments, step=step)


def _step(arguments: Sequence[str]) -> tuple[int | None, list[str]]:
    """Return the value of --step N or --step=N (None if not given), and the remaining arguments."""
    step, others, left = None, [], list(arguments)
    while left:
        word = left.pop(0)
        if word != "--step" and not word.startswith("--step="):
            others.append(word)
            continue
        value = word.partition("=")[2] if "=" in word else (left.pop(0) if left else "")
        # accept thousands separators, which ckpt list prints
        digits = value.replace(",", "")
        if not (digits.isascii() and digits.isdigit()):
            raise DistattnError(
                f"--step: {value!r} is not the step of a checkpoint; distattn ckpt list RUN shows them."
            )
        step = int(digits)
    return step, others
