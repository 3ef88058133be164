"""`distattn data verify`: indexed files and pack plans are read from end to end, and the first fault of each is named."""

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
from distattn.launch.command_line import CommandParser, ResultConsole
from distattn.launch.data.progress import ProgressReporter
from distattn.parallel.analysis.text_format import readable_bytes

USAGE = """usage: distattn data verify PREFIX|PACKS.toml... [--vocabulary N] [--write-digests] [--json]

Reads PREFIX.bin and PREFIX.idx from end to end. Checks sizes, every entry of the index, and where they are there the digests
of all blocks (PREFIX.xxh3) and the manifest (PREFIX.json). Without digests a token that was altered to another one of the
vocabulary, and the border between two documents, cannot be checked. Exit code 1 where something is wrong.

Of PACKS.toml the plan is read from end to end, and compared with its digests, with its corpora's indices and digests, and with
what a plan is: it has every token of every document of each completed epoch once. Name the corpora's files to have their tokens
read, too.

  --vocabulary N   ids must be below N (default: what PREFIX.json says)
  --write-digests  where PREFIX.xxh3 is missing, as beside files of Megatron's tools, write it; then later openings read no index
  --json           the result as JSON, one line for each file or plan
"""


# of a table's columns without the files' names, in characters
_NUMBERS_WIDTH = 100


class VerifiedPlan(NamedTuple):
    """A plan that is right. plan: its file. coverage: what it reads of each corpus."""

    plan: str
    digest: str
    steps: int
    tokens: int
    coverage: list[CorpusCoverage]


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    parser = CommandParser("data verify")
    parser.add_argument("prefixes", nargs="+")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--write-digests", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if given.vocabulary is not None and given.vocabulary < 1:
        raise DistattnError(f"data verify: --vocabulary: at least 1, not {given.vocabulary}.")
    files: dict[str, VerifiedFile | str] = {}
    plans: dict[str, VerifiedPlan | str] = {}
    with ProgressReporter("verify", sum(map(_bytes_to_read, given.prefixes))) as reporter:
        for name in given.prefixes:
            try:
                if name.endswith(".toml"):
                    plans[name] = _verify_plan(name, reporter.advance)
                else:
                    files[name] = verify_file(name, given.vocabulary, reporter.advance, given.write_digests)
            except DamagedDataError as fault:
                (plans if name.endswith(".toml") else files)[name] = str(fault)
    if given.json:
        for name, result in (files | plans).items():
            facts: dict[str, Any] = {"fault": result} if isinstance(result, str) else {"fault": None} | result._asdict()
            if isinstance(result, VerifiedPlan):
                facts["coverage"] = [corpus._asdict() for corpus in result.coverage]
            sys.stdout.write(json.dumps({"config" if name in plans else "prefix": name} | facts) + "\n")
    else:
        if files:
            _show(files)
        for name, found in plans.items():
            _show_plan(name, found)
    return 1 if any(isinstance(result, str) for result in (files | plans).values()) else 0


def _bytes_to_read(name: str) -> int:
    if name.endswith(".toml"):
        # twice: for the digests, and step by step
        plan = load_pack_config(name).plan
        return 2 * os.path.getsize(plan) if os.path.exists(plan) else 0
    file = f"{name.removesuffix('.idx').removesuffix('.bin')}.bin"
    return os.path.getsize(file) if os.path.exists(file) else 0


def _verify_plan(path: str, report: Callable[[int], None]) -> VerifiedPlan:
    """Check a plan's file, that it was made of these corpora, and that it reads them whole. report: is told of bytes read.

    Raises DamagedDataError naming the first fault, DistattnError where there is no plan, or where it is of other corpora.
    """
    config = load_pack_config(path)
    corpora = open_corpora(config)
    plan = open_configured_plan(config, corpora)
    size = os.path.getsize(config.plan)
    done = 0

    def read(part: int, whole: int) -> None:
        nonlocal done
        now = size * part // whole
        report(now - done)
        done = now

    plan.verify(read)
    done = 0
    coverage = check_coverage(plan, corpora, read)
    return VerifiedPlan(config.plan, plan.digest, plan.steps, plan.tokens, coverage)


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


def _show_plan(name: str, result: VerifiedPlan | str) -> None:
    """Print what a plan is, or what is wrong with it."""
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
        more = f", and {corpus.documents:,} documents of what comes after" if corpus.documents else ""
        console.print(f"  {escape(corpus.corpus)}: {epochs}{more}", soft_wrap=True)
