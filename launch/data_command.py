"""`distattn data`: turn text into packs. Each subcommand is a separate module."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from distattn.ir.errors import DistattnError
from distattn.launch.command_line import run_subcommand

USAGE = """usage: distattn data COMMAND ...

  tokenize PATH... --out PREFIX --tokenizer NAME
      text, JSON lines and Parquet become one indexed file of tokens; distattn data tokenize --help
  verify PREFIX|PACKS.toml...
      read indexed files and plans from end to end and check everything in them; distattn data verify --help
  pack PACKS.toml
      plan which documents every step of a run has, in which packs; distattn data pack --help
  stats PACKS.toml
      the tokens and documents that a run will see, by corpus and by length; distattn data stats --help
  show PACKS.toml|RUN STEP
      the packs of a step, of a plan or of a run, as text; distattn data show --help
"""

# subcommand NAME is the function `main` of the module distattn.launch.data.NAME
_COMMANDS = ("tokenize", "verify", "pack", "stats", "show")


def main(arguments: Sequence[str]) -> int:
    """Run the subcommand. Return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command not in _COMMANDS:
        commands = f"{', '.join(_COMMANDS[:-1])} and {_COMMANDS[-1]}"
        raise DistattnError(f"data: there is no command {command!r}; there are {commands}. See distattn data --help.")
    return run_subcommand(f"distattn.launch.data.{command}", rest)
