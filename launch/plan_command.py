"""`distattn plan`: simulate strategies for one attention call on a described cluster, without running anything."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.text import Text

from distattn.cluster import spec as describe
from distattn.ir.errors import DistattnError
from distattn.ir.layout import LAYOUTS
from distattn.ir.text_format import print_message
from distattn.launch.command_keys import refuse_keys_that_do_nothing
from distattn.launch.command_line import CommandParser, ResultConsole, no_progress, print_to_stderr
from distattn.parallel.analysis.timeline import Timeline
from distattn.parallel.attention_config import AttentionConfig
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
from distattn.training.config import run_file as configuration
from distattn.training.config.plan_settings import PlanSettings
from distattn.training.config.run_file import Config
from distattn.training.run_data import first_packs, planned_packs

USAGE = """usage: distattn plan CONFIG [--section.key value ...] [options]
       distattn plan --docs FILE_OR_LENGTHS --cluster h200-8x8 [--ranks 64] [options]

Plans one attention call with every strategy, proves the plans and times them on a described cluster. Runs nothing.

  --docs FILE_OR_LENGTHS  document lengths in tokens: 4096,128Kx8,1M, or a file of them (JSON list or plain numbers);
                          K, M and G are 1,000, 1,000,000 and so on, Ki, Mi and Gi are 1,024, 1,048,576 and so on
  --tokens N              use only their first N tokens
  --cluster NAME          h200-8x8 (nodes x devices), h100, b200 and a100 likewise, laptop-1x4, or a .toml file
  --ranks N               use N of its devices; all by default
  --strategy A,B          {strategies}; all by default
  --layout NAME           contiguous, zigzag (default), document_zigzag, block_cyclic, balanced, placed
  --heads H:K             query and key/value heads; 32:8 by default
  --head-dim D            128 by default
  --dtype NAME            bfloat16 by default
  --html FILE             write a page with the timelines and the coloured score matrices
  --perfetto FILE         write the fastest candidate's trace, for ui.perfetto.dev
  --memory                with CONFIG: the memory of every rank's device, by kind, with the run's own strategy, and
                          whether it fits on a device of the cluster
  --json                  numbers instead of a table

With CONFIG the run's own strategy is also timed with every layout, and a line names a faster strategy or layout.
The documents are the first pack of the run's data, or those of --docs; shapes, ranks and cluster are the run's.
If the context length changes in the run, every length has its table; files and --memory are for the longest.
"""


# options that cannot be combined with a configuration, and the keys that set them there
_IN_CONFIG = {
    "layout": "--parallel.layout",
    "heads": "--model.num_attention_heads and --model.num_key_value_heads",
    "head_dim": "--model.hidden_size over --model.num_attention_heads",
    "dtype": "--model.dtype",
    "ranks": "--parallel.ranks",
}


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE.format(strategies=", ".join(STRATEGIES)))
        return 0 if arguments else 2
    options, config = _parse(arguments)
    _check_options(options, config)
    if options.memory:
        return _show_memory(options, config)
    cluster = _cluster(options, config)
    settings = PlanSettings.of_config(config) if config else _settings(options, cluster)
    if options.docs:
        # split one pack over all ranks, even if each of the run's ranks has its own packs
        one_pack = replace(settings.config, data="replicated", context_parallel_size=None)
        settings = replace(settings, config=one_pack)
    report_progress = print_to_stderr if sys.stderr.isatty() else no_progress
    phases = _phases(options, config)
    facts: list[dict[str, Any]] = []
    for phase in phases:
        request = PlanRequest(tuple(map(tuple, phase.packs)), settings)
        timelines = compare_strategies(request, _strategies(options), cluster, report_progress)
        if phase is _longest(phases):
            _write_files(options, timelines, request, cluster)
        facts.append(comparison_facts(timelines, request))
        lines: list[str] = []
        # with --docs all ranks split one pack; if the run's own packs are not split that way, hints about its keys would be
        # wrong
        if config and settings == PlanSettings.of_config(config):
            layouts = compare_layouts(request, cluster)
            facts[-1]["layouts"] = {name: {"seconds": seconds} for name, seconds in layouts.items()}
            lines = strategy_lines(timelines, settings.config.strategy) + layout_lines(request, layouts)
        if not options.json:
            table = comparison_table(timelines, cluster)
            _show_table([*phase.title(len(phases)), str(request), *table, *lines], table)
    if options.json:
        for phase, phase_facts in zip(phases, facts, strict=True):
            phase_facts |= {"first_step": phase.first_step, "context_length": phase.context} if len(phases) > 1 else {}
        sys.stdout.write(json.dumps({"phases": facts} if len(phases) > 1 else facts[0]) + "\n")
        return 0
    for option in ("html", "perfetto"):
        if getattr(options, option):
            sys.stdout.write(f"{option}: {getattr(options, option)}\n")
    return 0


def _show_memory(options: argparse.Namespace, config: Config | None) -> int:
    """Print the memory that each rank of a run needs. Return the exit code."""
    if config is None:
        raise DistattnError("plan: --memory needs a run: name its configuration.")
    # import here: the import takes 2 s, and no other option needs it
    from distattn.training.run_memory import fit_line, memory_json, memory_of_config, memory_table

    # without a cluster, a device's memory is unknown
    cluster = _cluster(options, config) if options.cluster or config.cluster.description else None
    packs = _longest(_phases(options, config)).packs
    # counting a rank's memory takes seconds: count only ranks with the fewest or most tokens, or the most memory for attention
    memory = memory_of_config(config, packs, print_to_stderr if sys.stderr.isatty() else no_progress, extremes=True)
    if options.json:
        sys.stdout.write(memory_json(memory, cluster) + "\n")
        return 0
    fits = (
        "without a cluster it is unknown whether the run fits: give --cluster h200-8x8, for example"
        if cluster is None
        else fit_line(memory, cluster)
    )
    _show_table([*memory_table(memory, config.parallel.ranks), fits])
    return 0


# styles of a table's lines, by kind
_STYLES = {"fastest": "bold green", "refused": "dim", "": ""}


def _show_table(lines: Sequence[str], kinds: Mapping[str, str] | None = None) -> None:
    """Print a comparison, with the fastest strategy in colour. kinds: kind of each line; see `comparison_table`."""
    console = ResultConsole(highlight=False)
    for line in lines:
        style = _STYLES[(kinds or {}).get(line, "")]
        # do not wrap lines, which would break the table
        console.print(Text(line, style=style), soft_wrap=True)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Config | None]:
    """Parse the options, and load the configuration if the first word names one."""
    parser = CommandParser("plan", renamed={"--axis": "--tokens"})
    for name in ("docs", "cluster", "strategy", "layout", "heads", "dtype", "html", "perfetto"):
        parser.add_argument(f"--{name}")
    for name in ("tokens", "ranks", "head-dim"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("memory", "json"):
        parser.add_argument(f"--{name}", action="store_true")
    path = None if arguments[0].startswith("--") else arguments[0]
    options, overrides = parser.parse_known_args(arguments[1:] if path else arguments)
    if path is not None:
        named = [option for option in ("memory", "docs") if getattr(options, option)]
        refuse_keys_that_do_nothing(" --".join(["plan", *named]), overrides)
        return options, configuration.load(path, overrides, print_message)
    if overrides:
        raise DistattnError(f"plan: {overrides[0]!r} is not known. See distattn plan --help.")
    return options, None


def _check_options(options: argparse.Namespace, config: Config | None) -> None:
    """Raise DistattnError for options that contradict the configuration, numbers below 1, and unwritable files."""
    for option, key in _IN_CONFIG.items():
        if config and getattr(options, option) is not None:
            raise DistattnError(f"plan: with a configuration --{option.replace('_', '-')} is {key}.")
    for option in ("ranks", "tokens", "head_dim"):
        if getattr(options, option) is not None and getattr(options, option) < 1:
            raise DistattnError(
                f"plan: --{option.replace('_', '-')}: must be at least 1, not {getattr(options, option)}."
            )
    for option in ("html", "perfetto"):
        if getattr(options, option) and not Path(getattr(options, option)).parent.is_dir():
            raise DistattnError(f"plan: --{option}: there is no folder {Path(getattr(options, option)).parent}.")
        if getattr(options, option) and Path(getattr(options, option)).is_dir():
            raise DistattnError(f"plan: --{option}: {getattr(options, option)} is a folder; name a file.")
    for option in ("strategy", "html", "perfetto"):
        if options.memory and getattr(options, option):
            raise DistattnError(
                f"plan: --{option} has no effect with --memory, which counts the run's own strategy; leave one out."
            )
    if options.tokens and not options.docs:
        raise DistattnError(
            "plan: --tokens cuts the documents of --docs; in a configuration use --data.tokens_per_step."
        )


def _cluster(options: argparse.Namespace, config: Config | None) -> describe.ClusterSpec:
    """Load the description of the cluster on which plans are timed."""
    name = options.cluster or (config.cluster.description if config else "")
    if not name:
        raise DistattnError(
            "plan: name a cluster to time it on: --cluster laptop-1x4 or --cluster h200-8x8, for example, or "
            "cluster.description in the configuration."
        )
    return cluster_for_run(config, name) if config else describe.load(name, options.ranks)


class _Phase(NamedTuple):
    """The steps with one context length. packs: document lengths in each pack of the first step. first_step: counted from 0."""

    packs: list[list[int]]
    first_step: int = 0
    context: int = 0

    def title(self, phases: int) -> list[str]:
        """Return the heading of the phase's table: one line if there are several phases, otherwise no lines."""
        return [f"from step {self.first_step + 1:,}: context length {self.context:,}"] if phases > 1 else []


def _phases(options: argparse.Namespace, config: Config | None) -> list[_Phase]:
    """Return one phase with the documents of --docs, or a phase for each context length of the run."""
    if options.docs:
        lengths = parse_document_lengths(options.docs)
        return [_Phase([truncate_documents(lengths, options.tokens) if options.tokens else lengths])]
    if config is None:
        raise DistattnError("plan: a configuration or --docs is required. See distattn plan --help.")
    with planned_packs(config) as plan:
        return [
            _Phase(first_packs(plan, config, step), step, context)
            for step, context in plan.rule.context
            if step < plan.steps
        ]


def _longest(phases: Sequence[_Phase]) -> _Phase:
    """Return the (first) phase with the longest context."""
    return max(phases, key=lambda phase: phase.context)


def _settings(options: argparse.Namespace, cluster: describe.ClusterSpec) -> PlanSettings:
    """Return the settings shared by all plans, as the options give them."""
    heads, _, kv_heads = (options.heads or "32:8").partition(":")
    if not (heads.isdecimal() and (kv_heads or heads).isdecimal()):
        raise DistattnError(f"plan: --heads: {options.heads!r} is not query:key/value heads, such as 32:8.")
    layout = options.layout or "zigzag"
    if layout not in LAYOUTS:
        raise DistattnError(f"plan: --layout: there is no {layout!r}; there are {', '.join(LAYOUTS)}.")
    return PlanSettings(
        ranks=cluster.ranks,
        heads=int(heads),
        kv_heads=int(kv_heads or heads),
        head_dim=options.head_dim or 128,
        dtype=options.dtype or "bfloat16",
        config=AttentionConfig(layout=layout),
    )


def _strategies(options: argparse.Namespace) -> list[str]:
    """Return the strategies to compare: those in --strategy, or all."""
    strategies = options.strategy.split(",") if options.strategy else list(STRATEGIES)
    unknown = [strategy for strategy in strategies if strategy not in STRATEGIES]
    if unknown:
        raise DistattnError(f"plan: there is no strategy {unknown[0]!r}; there are {', '.join(STRATEGIES)}.")
    return strategies


def _write_files(
    options: argparse.Namespace,
    timelines: dict[str, Timeline | str],
    request: PlanRequest,
    cluster: describe.ClusterSpec,
) -> None:
    """Write the HTML page (--html) and the fastest strategy's trace (--perfetto) if requested."""
    if options.html:
        write_comparison_page(Path(options.html), timelines, str(request))
    if options.perfetto:
        planned = [timeline for timeline in timelines.values() if not isinstance(timeline, str)]
        fastest = min(planned, key=lambda timeline: timeline.forward.seconds + timeline.backward.seconds)
        Path(options.perfetto).write_text(json.dumps(fastest.perfetto()), "utf-8")
