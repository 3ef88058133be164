"""`distattn data pack`: plan all steps of a run before training."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from distattn.data.packing.pack_config import load_pack_config, make_configured_plan, open_corpora
from distattn.ir.errors import DistattnError
from distattn.ir.text_format import readable_bytes
from distattn.launch.command_line import CommandParser
from distattn.launch.data.progress import ProgressReporter
from distattn.launch.data.tables import plan_facts, print_plan

USAGE = """usage: distattn data pack PACKS.toml [--force] [--json]

Plans the documents and packs of every step of a run, and writes the plan's file. The plan depends on PACKS.toml and on the
documents' lengths alone, not on the number of ranks or workers, and the state of a run's data is the number of its step.

  --force   replace an existing plan
  --json    the result as JSON
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    parser = CommandParser("data pack")
    parser.add_argument("config")
    for name in ("force", "json"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args(arguments)
    config = load_pack_config(options.config)
    if os.path.exists(config.plan) and not options.force:
        raise DistattnError(
            f"{config.plan}: exists already, and runs may depend on it; add --force, or name another plan."
        )
    corpora = open_corpora(config)
    # without a number of steps, the plan ends with its corpora
    epochs = [corpus.max_epochs or 1.0 for corpus in config.corpus]
    corpora_tokens = sum(int(corpus.tokens * times) for corpus, times in zip(corpora, epochs, strict=True))
    total = corpora_tokens if config.steps is None else config.steps * config.rule.tokens_per_step
    with ProgressReporter("pack", total) as reporter:

        def report(steps: int, tokens: int) -> None:
            reporter.advance(tokens - reporter.done, f"{steps:,} steps  {tokens / reporter.seconds:,.0f} tokens/s")

        plan = make_configured_plan(config, corpora, report)
    if options.json:
        sys.stdout.write(json.dumps(plan_facts(plan)) + "\n")
        return 0
    print_plan(plan)
    undigested = [file.prefix for corpus in corpora for file in corpus.files if file.digests is None]
    if undigested:
        others = f" and {len(undigested) - 1:,} others have" if len(undigested) > 1 else " has"
        sys.stdout.write(
            f"{undigested[0]}{others} no digests: each opening reads the index, and altered tokens are not found; "
            "distattn data verify PREFIX --write-digests writes them\n"
        )
    sys.stdout.write(f"{config.plan}: {readable_bytes(os.path.getsize(config.plan))}, in {reporter.seconds:,.1f} s\n")
    return 0
