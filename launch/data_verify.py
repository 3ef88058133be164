"""`distattn data verify`: indexed files are read from end to end, and the first fault of each is named."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from distattn.data.verify_files import VerifiedFile, verify_file
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.launch.command_line import CommandParser, ResultConsole
from distattn.launch.data_progress import ProgressReporter
from distattn.parallel.analysis.columns import readable_bytes

USAGE = """usage: distattn data verify PREFIX... [--vocabulary N] [--json]

Reads PREFIX.bin and PREFIX.idx from end to end. Checks sizes, every entry of the index, and where they are there the digests
of all blocks (PREFIX.xxh3) and the manifest (PREFIX.json). Without digests a token that was altered to another one of the
vocabulary, and the border between two documents, cannot be checked. Exit code 1 where something is wrong.

  --vocabulary N   ids must be below N (default: what PREFIX.json says)
  --json           the result as JSON, one line a file
"""


# of a table's columns without the files' names, in characters
_NUMBERS_WIDTH = 100


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    parser = CommandParser("data verify")
    parser.add_argument("prefixes", nargs="+")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if given.vocabulary is not None and given.vocabulary < 1:
        raise DistattnError(f"data verify: --vocabulary: at least 1, not {given.vocabulary}.")
    found: dict[str, VerifiedFile | str] = {}
    with ProgressReporter("verify", sum(map(_bin_bytes, given.prefixes))) as reporter:
        for prefix in given.prefixes:
            try:
                found[prefix] = verify_file(prefix, given.vocabulary, reporter.advance)
            except DamagedDataError as fault:
                found[prefix] = str(fault)
    if given.json:
        for prefix, result in found.items():
            facts = {"fault": result} if isinstance(result, str) else {"fault": None} | result._asdict()
            sys.stdout.write(json.dumps({"prefix": prefix} | facts) + "\n")
    else:
        _show(found)
    return 1 if any(isinstance(result, str) for result in found.values()) else 0


def _bin_bytes(prefix: str) -> int:
    file = f"{prefix.removesuffix('.idx').removesuffix('.bin')}.bin"
    return os.path.getsize(file) if os.path.exists(file) else 0


def _show(found: dict[str, VerifiedFile | str]) -> None:
    """Print a table of the files, and below it what is wrong."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "documents", "tokens", "size"):
        table.add_column(name, justify="right" if name else "left")
    for name in ("dtype", "vocabulary", "digests", "file"):
        table.add_column(name, no_wrap=True)
    for prefix, result in found.items():
        if isinstance(result, str):
            table.add_row("[red]wrong[/]", *[""] * 6, escape(prefix))
            continue
        numbers = (f"{result.documents:,}", f"{result.tokens:,}", readable_bytes(result.bytes))
        vocabulary = f"{result.vocabulary:,}" if result.vocabulary else "not known"
        digests = "yes" if result.digests else "none"
        table.add_row("[green]right[/]", *numbers, result.dtype, vocabulary, digests, escape(prefix))
    # a name that is folded or cut is no name
    console = ResultConsole(highlight=False, width=_NUMBERS_WIDTH + max(map(len, found)))
    console.print(table)
    for result in found.values():
        if isinstance(result, str):
            console.print(result, markup=False, soft_wrap=True)
