"""`distattn data verify`: read indexed files and pack plans from end to end, and report the first fault of each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from distattn.data.files.verify_files import VerifiedFile, verify_file
from distattn.data.packing.pack_config import load_pack_config, open_configured_plan, open_corpora
from distattn.data.packing.plan_coverage import CorpusCoverage, check_coverage
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.ir.text_format import readable_bytes
from distattn.launch.command_line import CommandParser, ResultConsole
from distattn.launch.data.progress import ProgressReporter

USAGE = """usage: distattn data verify PREFIX|PACKS.toml... [--vocabulary N] [--write-digests] [--json]

Reads PREFIX.bin and PREFIX.idx from end to end. Checks sizes, every entry of the index and, if they exist, the digests of all
blocks (PREFIX.xxh3) and the manifest (PREFIX.json). Without digests, neither a token that was replaced by another one of the
vocabulary nor a moved border between two documents can be found. Exit code 1 if a fault is found.

The plan of PACKS.toml is read from end to end, and compared with its digests and with its corpora's indices and digests. It must
have every token of every document of each completed epoch once. Name the corpora's files to have their tokens read, too.

  --vocabulary N   ids must be below N (default: as in PREFIX.json)
  --write-digests  write PREFIX.xxh3 if it is missing, as for files of Megatron's tools; later openings then read no index
  --json           the result as JSON, one line for each file or plan
"""


# width in characters of a table's columns without the file names
_NUMBERS_WIDTH = 100


class VerifiedPlan(NamedTuple):
    """A plan without faults. plan: its file. coverage: the part of each corpus that it reads."""

    plan: str
    digest: str
    steps: int
    tokens: int
    coverage: list[CorpusCoverage]


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    parser = CommandParser("data verify")
    parser.add_argument("prefixes", nargs="+")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--write-digests", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.vocabulary is not None and options.vocabulary < 1:
        raise DistattnError(f"data verify: --vocabulary: must be at least 1, not {options.vocabulary}.")
    files: dict[str, VerifiedFile | str] = {}
    plans: dict[str, VerifiedPlan | str] = {}
    with ProgressReporter("verify", sum(map(_bytes_to_read, options.prefixes))) as reporter:
        for name in options.prefixes:
            try:
                if name.endswith(".toml"):
                    plans[name] = _verify_plan(name, reporter.advance)
                else:
                    files[name] = verify_file(name, options.vocabulary, reporter.advance, options.write_digests)
            except DamagedDataError as fault:
                (plans if name.endswith(".toml") else files)[name] = str(fault)
    if options.json:
        for name, result in (files | plans).items():
            facts: dict[str, Any] = {"fault": result} if isinstance(result, str) else {"fault": None} | result._asdict()
            if isinstance(result, VerifiedPlan):
                facts["coverage"] = [corpus._asdict() for corpus in result.coverage]
            sys.stdout.write(json.dumps({"config" if name in plans else "prefix": name} | facts) + "\n")
    else:
        if files:
            _show(files)
        for name, result in plans.items():
            _show_plan(name, result)
    return 1 if any(isinstance(result, str) for result in (files | plans).values()) else 0


def _bytes_to_read(name: str) -> int:
    if name.endswith(".toml"):
        # the plan is read twice: to check the digests, and step by step
        plan = load_pack_config(name).plan
        return 2 * os.path.getsize(plan) if os.path.exists(plan) else 0
    file = f"{name.removesuffix('.idx').removesuffix('.bin')}.bin"
    return os.path.getsize(file) if os.path.exists(file) else 0


def _verify_plan(path: str, report: Callable[[int], None]) -> VerifiedPlan:
    """Check a plan's file, that it was made from the configured corpora, and that it reads them completely.

    path: the plan's TOML file. report: called with the bytes read since its last call. Raises DamagedDataError naming the first
    fault, and DistattnError if there is no plan or it was made from other corpora.
    """
    config = load_pack_config(path)
    corpora = open_corpora(config)
    plan = open_configured_plan(config, corpora)
    size = os.path.getsize(config.plan)
    done = 0

    def read(part: int, total: int) -> None:
        nonlocal done
        now = size * part // total
        report(now - done)
        done = now

    plan.verify(read)
    done = 0
    coverage = check_coverage(plan, corpora, read)
    return VerifiedPlan(config.plan, plan.digest, plan.steps, plan.tokens, coverage)


def _show(results: dict[str, VerifiedFile | str]) -> None:
    """Print a table of the files, followed by their faults."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "documents", "tokens", "size"):
        table.add_column(name, justify="right" if name else "left")
    for name in ("dtype", "vocabulary", "digests", "file"):
        table.add_column(name, no_wrap=True)
    for prefix, result in results.items():
        if isinstance(result, str):
            table.add_row("[red]wrong[/]", *[""] * 6, escape(prefix))
            continue
        numbers = (f"{result.documents:,}", f"{result.tokens:,}", readable_bytes(result.bytes))
        vocabulary = f"{result.vocabulary:,}" if result.vocabulary else "not known"
        digests = "yes" if result.digests else "none"
        table.add_row("[green]right[/]", *numbers, result.dtype, vocabulary, digests, escape(prefix))
    # make it wide enough that no file name is wrapped or cut
    console = ResultConsole(highlight=False, width=_NUMBERS_WIDTH + max(map(len, results)))
    console.print(table)
    for result in results.values():
        if isinstance(result, str):
            console.print(result, markup=False, soft_wrap=True)


def _show_plan(name: str, result: VerifiedPlan | str) -> None:
    """Print a plan's facts or its fault."""
    console = ResultConsole(highlight=False)
    if isinstance(result, str):
        console.print(f"[red]wrong[/] {escape(name)}", soft_wrap=True)
        console.print(result, markup=False, soft_wrap=True)
        return
    console.print(
        f"[green]right[/] {escape(name)}: {escape(result.plan)}, {result.steps:,} steps, {result.tokens:,} tokens, digest "
        f"{result.digest}",
        soft_wrap=True,
    )
    for corpus in result.coverage:
        epochs = (
            f"{corpus.epochs:,} whole epoch{'s' * (corpus.epochs != 1)}, every token of every document once in each"
        )
        more = f", and {corpus.documents:,} documents of an unfinished epoch" if corpus.documents else ""
        console.print(f"  {escape(corpus.corpus)}: {epochs}{more}", soft_wrap=True)
