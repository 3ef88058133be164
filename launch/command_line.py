"""What the commands share: a parser whose complaints are sentences, and lines that appear at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from distattn.ir.errors import DistattnError


class CommandParser(argparse.ArgumentParser):
    """Parses the options of one command, unabbreviated. Raises DistattnError where argparse would print and exit."""

    def __init__(self, command: str):
        super().__init__(prog=command, add_help=False, allow_abbrev=False)

    def parse_known_args(self, *given: Any, **named: Any) -> Any:
        """As argparse does, which takes the value `--` for none at all."""
        found, others = super().parse_known_args(*given, **named)
        for name, value in vars(found).items():
            if value == []:
                raise DistattnError(
                    f"{self.prog}: --{name.replace('_', '-')} has no value. See distattn {self.prog} --help."
                )
        return found, others

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise what argparse has to say, in the name of the command."""
        raise DistattnError(f"{self.prog}: {message}. See distattn {self.prog} --help.")


class ResultConsole(Console):
    """Prints results. Raises BrokenPipeError where nobody reads them any more, as print does; rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        """Raise what rich has caught."""
        raise


def print_line(line: str) -> None:
    """Print a line that appears at once, also where the output is a file."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def print_to_stderr(line: str) -> None:
    """Print a line on the error stream, so that the output holds results only."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def say(text: str) -> None:
    """Print a sentence of a launcher's for the user at the console, on the error stream."""
    print_to_stderr(f"distattn: {text}")


def finish_command(folder: object) -> str:
    """The command that compares and reports, where all steps of the run of a folder are done."""
    return f"python -m distattn.launch.finish_run {folder}"


def no_progress(line: str) -> None:
    """Print nothing."""


def array_words(array: str) -> list[str]:
    """Turn --array's KEY=VALUE,VALUE into a word --KEY=VALUE for each value. Raises DistattnError."""
    key, _, values = array.removeprefix("--").partition("=")
    if not key or not all(values.split(",")):
        raise DistattnError(f"--array: {array!r}; write a key and its values, such as train.learning_rate=1e-3,3e-3.")
    return [f"--{key}={value}" for value in values.split(",")]


def refuse_other_launchers_keys(overrides: Sequence[str], where: str = "") -> None:
    """Raise DistattnError for a key on the command line that another launcher reads. where: this one's section, empty for none.

    Run files may have both sections, so that the same file starts here, on Slurm and on Ray.
    """
    for word in overrides:
        section = word.removeprefix("--").partition(".")[0]
        if word.startswith("--") and section in ("slurm", "ray") and section != where:
            key = word.removeprefix("--").partition("=")[0].replace("-", "_")
            raise DistattnError(f"command line: {key}: does nothing here; it belongs to distattn launch {section}.")
