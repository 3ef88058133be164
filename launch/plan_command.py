"""`distattn plan`: candidates for one attention call, timed on a described cluster, before anything is submitted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.text import Text

from distattn.cluster import spec as describe
from distattn.ir.errors import DistattnError
from distattn.ir.layout import LAYOUTS
from distattn.launch.command_keys import refuse_keys_that_do_nothing
from distattn.launch.command_line import CommandParser, ResultConsole, no_progress, print_to_stderr, say
from distattn.parallel.analysis.timeline import Timeline
from distattn.parallel.make_plan import STRATEGIES
from distattn.planning.compare_strategies import (
    PlanRequest,
    cluster_for_run,
    compare_layouts,
    compare_strategies,
    comparison_facts,
    comparison_table,
    layout_lines,
    parse_document_lengths,
    strategy_lines,
    truncate_documents,
)
from distattn.planning.comparison_page import write_comparison_page
from distattn.training import config as configuration
from distattn.training.config import Config
from distattn.training.plan_settings import PlanSettings
from distattn.training.run_data import first_packs, planned_packs

USAGE = """usage: distattn plan CONFIG [--section.key value ...] [options]
       distattn plan --docs FILE_OR_LENGTHS --cluster h200-8x8 [--ranks 64] [options]

Plans one attention call with every strategy, proves the plans and times them on a described cluster. Nothing is run.

  --docs FILE_OR_LENGTHS  document lengths in tokens: 4096,128Kx8,1M, or a file of them (JSON list or plain numbers);
                          K, M and G are 1,000, 1,000,000 and so on, Ki, Mi and Gi are 1,024, 1,048,576 and so on
  --tokens N              only the first N tokens of them
  --cluster NAME          h200-8x8 (nodes x devices), h100, b200 and a100 likewise, laptop-1x4, or a .toml file
  --ranks N               use N devices of it; all by default
  --strategy A,B          {strategies}; all by default
  --layout NAME           contiguous, zigzag (default), document_zigzag, block_cyclic, balanced, placed
  --heads H:K             query and key/value heads; 32:8 by default
  --head-dim D            128 by default
  --dtype NAME            bfloat16 by default
  --html FILE             a page with the timelines and the coloured score matrices
  --perfetto FILE         the fastest candidate's trace, for ui.perfetto.dev
  --memory                with CONFIG: what every rank needs on its device, by kind, of the run's own
                          strategy, and whether it fits on a device of the cluster
  --json                  numbers instead of a table

With CONFIG the run's own strategy is timed with every layout, too, and a line says where another strategy or layout is faster.
The documents are the first pack of the run's data, or those of --docs, and shapes, ranks and cluster are the run's.
Where the context length changes in the run, every length has its table; files and --memory are of the longest.
"""


# what a configuration says itself
_IN_CONFIG = {
    "layout": "--parallel.layout",
    "heads": "--model.num_attention_heads and --model.num_key_value_heads",
    "head_dim": "--model.hidden_size over --model.num_attention_heads",
    "dtype": "--model.dtype",
    "ranks": "--parallel.ranks",
}


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE.format(strategies=", ".join(STRATEGIES)))
        return 0 if arguments else 2
    given, config = _parse(arguments)
    _check_options(given, config)
    if given.memory:
        return _show_memory(given, config)
    cluster = _cluster(given, config)
    settings = PlanSettings.of_config(config) if config else _settings(given, cluster)
    if given.docs:
        # one pack over all ranks, whatever a run's ranks have of their own
        settings = replace(settings, data="replicated", context_parallel_size=None)
    report_progress = print_to_stderr if sys.stderr.isatty() else no_progress
    phases = _phases(given, config)
    facts: list[dict[str, Any]] = []
    for phase in phases:
        request = PlanRequest(tuple(map(tuple, phase.packs)), settings)
        found = compare_strategies(request, _strategies(given), cluster, report_progress)
        if phase is _longest(phases):
            _write_files(given, found, request, cluster)
        facts.append(comparison_facts(found, request))
        lines: list[str] = []
        # with --docs the pack lies over all ranks: where the run's own packs do not, its keys say nothing about it
        if config and settings == PlanSettings.of_config(config):
            layouts = compare_layouts(request, cluster)
            facts[-1]["layouts"] = {name: {"seconds": seconds} for name, seconds in layouts.items()}
            lines = strategy_lines(found, settings.strategy) + layout_lines(request, layouts)
        if not given.json:
            _show_table([*phase.title(len(phases)), str(request), *comparison_table(found, cluster), *lines])
    if given.json:
        for phase, one in zip(phases, facts, strict=True):
            one |= {"first_step": phase.first_step, "context_length": phase.context} if len(phases) > 1 else {}
        sys.stdout.write(json.dumps({"phases": facts} if len(phases) > 1 else facts[0]) + "\n")
        return 0
    for option in ("html", "perfetto"):
        if getattr(given, option):
            sys.stdout.write(f"{option}: {getattr(given, option)}\n")
    return 0


def _show_memory(given: argparse.Namespace, config: Config | None) -> int:
    """Print what every rank of a run needs; returns the exit code."""
    if config is None:
        raise DistattnError("plan: --memory is of a run: name its configuration.")
    # 2 s to import, and only here
    from distattn.planning.memory_of_run import fit_line, memory_json, memory_of_config, memory_table

    # without a cluster it is not known how much a device has
    cluster = _cluster(given, config) if given.cluster or config.cluster.description else None
    packs = _longest(_phases(given, config)).packs
    # a count takes seconds, and few of many ranks that have other numbers of tokens say how much is needed
    found = memory_of_config(config, packs, print_to_stderr if sys.stderr.isatty() else no_progress, extremes=True)
    if given.json:
        sys.stdout.write(memory_json(found, cluster) + "\n")
        return 0
    fits = (
        "no cluster is given, so it is not said whether the run fits: --cluster h200-8x8, for example"
        if cluster is None
        else fit_line(found, cluster)
    )
    _show_table([*memory_table(found, config.parallel.ranks), fits])
    return 0


def _show_table(lines: Sequence[str]) -> None:
    """Print a comparison, with the fastest strategy in colour where there is one."""
    console = ResultConsole(highlight=False)
    for line in lines:
        style = "bold green" if line.endswith("<- fastest") else "dim" if " is refused: " in line else ""
        # a line that is folded is no line of a table
        console.print(Text(line, style=style), soft_wrap=True)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Config | None]:
    """Parse the options, and load the configuration where the first word names one."""
    parser = CommandParser("plan", renamed={"--axis": "--tokens"})
    for name in ("docs", "cluster", "strategy", "layout", "heads", "dtype", "html", "perfetto"):
        parser.add_argument(f"--{name}")
    for name in ("tokens", "ranks", "head-dim"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("memory", "json"):
        parser.add_argument(f"--{name}", action="store_true")
    path = None if arguments[0].startswith("--") else arguments[0]
    given, overrides = parser.parse_known_args(arguments[1:] if path else arguments)
    if path is not None:
        options = [option for option in ("memory", "docs") if getattr(given, option)]
        refuse_keys_that_do_nothing(" --".join(["plan", *options]), overrides)
        return given, configuration.load(path, overrides, say)
    if overrides:
        raise DistattnError(f"plan: {overrides[0]!r} is not known. See distattn plan --help.")
    return given, None


def _check_options(given: argparse.Namespace, config: Config | None) -> None:
    """Refuse options that contradict the configuration, numbers below 1, and files that cannot be written."""
    for option, key in _IN_CONFIG.items():
        if config and getattr(given, option) is not None:
            raise DistattnError(f"plan: with a configuration --{option.replace('_', '-')} is {key}.")
    for option in ("ranks", "tokens", "head_dim"):
        if getattr(given, option) is not None and getattr(given, option) < 1:
            raise DistattnError(f"plan: --{option.replace('_', '-')}: at least 1, not {getattr(given, option)}.")
    for option in ("html", "perfetto"):
        if getattr(given, option) and not Path(getattr(given, option)).parent.is_dir():
            raise DistattnError(f"plan: --{option}: there is no folder {Path(getattr(given, option)).parent}.")
        if getattr(given, option) and Path(getattr(given, option)).is_dir():
            raise DistattnError(f"plan: --{option}: {getattr(given, option)} is a folder; name a file.")
    for option in ("strategy", "html", "perfetto"):
        if given.memory and getattr(given, option):
            raise DistattnError(
                f"plan: --{option} does nothing with --memory, which counts the run's own strategy; leave one out."
            )
    if given.tokens and not given.docs:
        raise DistattnError("plan: --tokens cuts the documents of --docs; a configuration has --data.tokens_per_step.")


def _cluster(given: argparse.Namespace, config: Config | None) -> describe.ClusterSpec:
    """Load the cluster to time plans on."""
    name = given.cluster or (config.cluster.description if config else "")
    if not name:
        raise DistattnError(
            "plan: say what to time it on: --cluster laptop-1x4 or --cluster h200-8x8, for example, or cluster.description "
            "in the configuration."
        )
    return cluster_for_run(config, name) if config else describe.load(name, given.ranks)


class _Phase(NamedTuple):
    """Steps of one context length. packs: tokens of each document of the packs of the first of them; first_step: from 0."""

    packs: list[list[int]]
    first_step: int = 0
    context: int = 0

    def title(self, phases: int) -> list[str]:
        """A line above its table, where there are several."""
        return [f"from step {self.first_step + 1:,}: context length {self.context:,}"] if phases > 1 else []


def _phases(given: argparse.Namespace, config: Config | None) -> list[_Phase]:
    """The documents of --docs, else what the run's packs are by context length."""
    if given.docs:
        lengths = parse_document_lengths(given.docs)
        return [_Phase([truncate_documents(lengths, given.tokens) if given.tokens else lengths])]
    if config is None:
        raise DistattnError("plan: a configuration or --docs is wanted. See distattn plan --help.")
    with planned_packs(config) as plan:
        return [
            _Phase(first_packs(plan, config, step), step, context)
            for step, context in plan.rule.context
            if step < plan.steps
        ]


def _longest(phases: Sequence[_Phase]) -> _Phase:
    """That of the longest context, of several the first."""
    return max(phases, key=lambda phase: phase.context)


def _settings(given: argparse.Namespace, cluster: describe.ClusterSpec) -> PlanSettings:
    """What plans have in common, where options say it."""
    heads, _, kv_heads = (given.heads or "32:8").partition(":")
    if not (heads.isdecimal() and (kv_heads or heads).isdecimal()):
        raise DistattnError(f"plan: --heads: {given.heads!r} is not query:key/value heads, such as 32:8.")
    layout = given.layout or "zigzag"
    if layout not in LAYOUTS:
        raise DistattnError(f"plan: --layout: there is no {layout!r}; there are {', '.join(LAYOUTS)}.")
    return PlanSettings(
        ranks=cluster.ranks,
        heads=int(heads),
        kv_heads=int(kv_heads or heads),
        head_dim=given.head_dim or 128,
        dtype=given.dtype or "bfloat16",
        layout=layout,
    )


def _strategies(given: argparse.Namespace) -> list[str]:
    """The strategies to compare: those of --strategy, else all."""
    strategies = given.strategy.split(",") if given.strategy else list(STRATEGIES)
    unknown = [strategy for strategy in strategies if strategy not in STRATEGIES]
    if unknown:
        raise DistattnError(f"plan: there is no strategy {unknown[0]!r}; there are {', '.join(STRATEGIES)}.")
    return strategies


def _write_files(
    given: argparse.Namespace,
    found: dict[str, Timeline | str],
    request: PlanRequest,
    cluster: describe.ClusterSpec,
) -> None:
    """Write the page and the fastest strategy's trace, where they are asked for."""
    if given.html:
        write_comparison_page(Path(given.html), found, str(request))
    if given.perfetto:
        timelines = [one for one in found.values() if not isinstance(one, str)]
        fastest = min(timelines, key=lambda one: one.forward.seconds + one.backward.seconds)
        Path(given.perfetto).write_text(json.dumps(fastest.perfetto()), "utf-8")
