"""`distattn resume`: go on with a run from its newest good checkpoint, on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from distattn.ir.errors import DistattnError
from distattn.launch.command_keys import refuse_keys_that_do_nothing
from distattn.launch.command_line import check_options, say
from distattn.launch.finish_run import say_finished
from distattn.launch.run_locally import resume_locally
from distattn.training import config as configuration
from distattn.training.config import Config
from distattn.training.run_facts import check_same_run
from distattn.training.run_folder import RunFolder

USAGE = """usage: distattn resume RUN [--step N] [--json] [--section.key value ...]

Goes on with the run of a folder on this machine, from its newest good checkpoint, or from its first step where there is none.
--step N goes on from the checkpoint after step N: those that were saved later are set aside. distattn ckpt list RUN shows them.
Ranks, degrees, strategy, kernel, engine and all that is logged or saved may change; the model's shape, the data and the seed
stay. With other ranks all are on one node, unless parallel.devices_per_node is given, too. A resume that is refused, by the
command or by its ranks, leaves the run's configuration as it was. A run that has done all its steps, with report and comparison,
starts nothing: --train.steps N trains on. Runs on Slurm go on with sbatch RUN/job.sbatch, on Ray with
python -m distattn.launch.ray.attempts RUN.
"""


def _derived_anew(before: Config, overrides: Sequence[str]) -> list[str]:
    """Return overrides for what a launcher has derived from the ranks of a run, where the run is to have others."""
    named = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in overrides}
    if before.parallel.devices_per_node and "parallel.ranks" in named and "parallel.devices_per_node" not in named:
        # all of them are on this machine
        return ["--parallel.devices_per_node=0"]
    return []


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    words = [word for word in arguments if word != "--json"]
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if words else 2
    step, words = _step(words)
    if not words:
        raise DistattnError(f"resume: name a run folder: {USAGE.splitlines()[0].removeprefix('usage: ')}")
    check_options("resume", words, ["--json", "--step"])
    refuse_keys_that_do_nothing("resume", words[1:])
    run = RunFolder(Path(words[0]))
    if not run.config_file.is_file():
        raise DistattnError(
            f"{words[0]}: is no run folder, it has no {run.config_file.name}; name one that distattn train made."
        )
    before = configuration.load(run.config_file)
    config = configuration.load(run.config_file, [*words[1:], *_derived_anew(before, words[1:])], say)
    if config.preflight.action == "only":
        raise DistattnError(f"preflight.action: only is for new folders: distattn preflight {run.config_file}.")
    check_same_run(before, config)
    # with another configuration, or from a chosen checkpoint, ranks have something to do
    if config == before and step is None and say_finished(run, config, json_lines="--json" in arguments):
        return 0
    return resume_locally(run, config, json_lines="--json" in arguments, step=step)


def _step(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """Take --step N, or --step=N, out of a command's words. Returns the step, None where none is given, and the other words."""
    step, others, left = None, [], list(words)
    while left:
        word = left.pop(0)
        if word != "--step" and not word.startswith("--step="):
            others.append(word)
            continue
        value = word.partition("=")[2] if "=" in word else (left.pop(0) if left else "")
        # numbers as ckpt list shows them
        digits = value.replace(",", "")
        if not (digits.isascii() and digits.isdigit()):
            raise DistattnError(
                f"--step: {value!r} is not the step of a checkpoint; distattn ckpt list RUN shows them."
            )
        step = int(digits)
    return step, others
