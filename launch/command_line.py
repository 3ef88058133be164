"""Parts shared by the commands: a parser whose errors are sentences, and functions that print and flush lines."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from distattn.ir.errors import DistattnError

# argparse's error messages, and the sentences that replace them
_ARGPARSE_SENTENCES = {
    r"argument (\S+): invalid int value: (.*)": r"\1: \2 is not a whole number",
    r"argument (\S+): invalid float value: (.*)": r"\1: \2 is not a number",
    r"argument (\S+): expected one argument": r"\1 needs a value",
}


class CommandParser(argparse.ArgumentParser):
    """Parser of one command's options, without abbreviations. Raises DistattnError where argparse would print and exit.

    renamed: options of earlier versions, with their current names.
    """

    def __init__(self, command: str, renamed: Mapping[str, str] | None = None):
        super().__init__(prog=command, add_help=False, allow_abbrev=False)
        self._options: list[str] = []
        self._renamed = renamed

    def add_argument(self, *names: Any, **settings: Any) -> Any:
        """Add an argument as argparse does, and remember its names."""
        self._options += names
        return super().add_argument(*names, **settings)

    def parse_known_args(self, *arguments: Any, **named: Any) -> Any:
        """Parse as argparse does, and refuse options without a value and misspelled options."""
        options, others = super().parse_known_args(*arguments, **named)
        for name, value in vars(options).items():
            if value == []:
                raise DistattnError(
                    f"{self.prog}: --{name.replace('_', '-')} needs a value. See distattn {self.prog} --help."
                )
        check_options(self.prog, others, self._options, self._renamed)
        return options, others

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise argparse's message as a DistattnError that names the command."""
        for pattern, sentence in _ARGPARSE_SENTENCES.items():
            message = re.sub(pattern, sentence, message)
        raise DistattnError(f"{self.prog}: {message}. See distattn {self.prog} --help.")


def check_options(
    command: str, arguments: Sequence[str], options: Sequence[str], renamed: Mapping[str, str] | None = None
) -> None:
    """Raise DistattnError if an argument is a misspelled option of a command. Arguments with a dot are configuration keys.

    options: the command's options, such as --json. renamed: options of earlier versions, with their current names.
    """
    # compare without the dashes, which would make all options similar
    meant = {name.removeprefix("--"): name for name in options if name.startswith("--")}
    meant |= {before.removeprefix("--"): now for before, now in (renamed or {}).items()}
    for word in arguments:
        option = word.partition("=")[0]
        if not option.startswith("--") or "." in option or option in ("--help", *options):
            continue
        if near := difflib.get_close_matches(option.removeprefix("--"), meant, 1, 0.7):
            raise DistattnError(
                f"{command}: {option!r} is not known. Did you mean {meant[near[0]]}? See distattn {command} --help."
            )


def run_subcommand(module: str, arguments: Sequence[str]) -> int:
    """Run the function `main` of a module, or print the module's USAGE if asked for help. Return the exit code.

    Without arguments, print the usage, too, but return 2.
    """
    subcommand = importlib.import_module(module)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(subcommand.USAGE)
        return 0 if arguments else 2
    return int(subcommand.main(arguments))


class ResultConsole(Console):
    """Console for results. If the reader has closed the pipe, raises BrokenPipeError; rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        """Let the exception that rich has caught propagate."""
        raise


def print_line(line: str) -> None:
    """Print a line to stdout and flush it."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def print_to_stderr(line: str) -> None:
    """Print a line to stderr and flush it. stdout is for results only."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def finish_command(folder: object) -> str:
    """Return the command that runs the reference check and writes the report of a run whose steps are all done."""
    return f"python -m distattn.launch.finish_run {folder}"


def no_progress(line: str) -> None:
    """Print nothing. The default callback for progress."""


def array_words(array: str) -> list[str]:
    """Turn --array's KEY=VALUE,VALUE into one word --KEY=VALUE per value. Raises DistattnError if it is malformed."""
    key, _, values = array.removeprefix("--").partition("=")
    if not key or not all(values.split(",")):
        raise DistattnError(f"--array: {array!r}; write a key and its values, such as train.learning_rate=1e-3,3e-3.")
    return [f"--{key}={value}" for value in values.split(",")]
