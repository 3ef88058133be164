"""`distattn data pack`: all steps of a run are planned, before any of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from distattn.data.packing.pack_config import load_pack_config, make_configured_plan, open_corpora
from distattn.ir.errors import DistattnError
from distattn.launch.command_line import CommandParser
from distattn.launch.data.progress import ProgressReporter
from distattn.launch.data.tables import plan_facts, print_plan
from distattn.parallel.analysis.text_format import readable_bytes

USAGE = """usage: distattn data pack PACKS.toml [--force] [--json]

Plans which documents every step of a run has, in which packs, and writes the plan's file. The plan is a function of PACKS.toml
and of the documents' lengths alone: neither the number of ranks nor that of workers enters it, and the state of a run is the
number of its step.

  --force   write over a plan that is there already
  --json    the result as JSON
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    parser = CommandParser("data pack")
    parser.add_argument("config")
    for name in ("force", "json"):
        parser.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args(arguments)
    config = load_pack_config(given.config)
    if os.path.exists(config.plan) and not given.force:
        raise DistattnError(
            f"{config.plan}: is there already, and runs may depend on it; add --force, or name another plan."
        )
    corpora = open_corpora(config)
    # where no number of steps is given, a plan ends with its corpora
    epochs = [one.max_epochs or 1.0 for one in config.corpus]
    whole = sum(int(corpus.tokens * times) for corpus, times in zip(corpora, epochs, strict=True))
    total = whole if config.steps is None else config.steps * config.rule.tokens_per_step
    with ProgressReporter("pack", total) as reporter:

        def report(steps: int, tokens: int) -> None:
            reporter.advance(tokens - reporter.done, f"{steps:,} steps  {tokens / reporter.seconds:,.0f} tokens/s")

        plan = make_configured_plan(config, corpora, report)
    if given.json:
        sys.stdout.write(json.dumps(plan_facts(plan)) + "\n")
        return 0
    print_plan(plan)
    bare = [file.prefix for corpus in corpora for file in corpus.files if file.digests is None]
    if bare:
        others = f" and {len(bare) - 1:,} others have" if len(bare) > 1 else " has"
        sys.stdout.write(
            f"{bare[0]}{others} no digests: each opening reads the index, and altered tokens are not found; "
            "distattn data verify PREFIX --write-digests writes them\n"
        )
    sys.stdout.write(f"{config.plan}: {readable_bytes(os.path.getsize(config.plan))}, in {reporter.seconds:,.1f} s\n")
    return 0
