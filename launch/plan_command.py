"""`distattn plan`: candidates for one attention call, timed on a described cluster, before anything is submitted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from distattn.cluster import spec as describe
from distattn.data.packing import pack_epoch
from distattn.data.text import read_corpus
from distattn.ir.errors import DistattnError
from distattn.parallel.make_plan import STRATEGIES
from distattn.planning.compare_strategies import (
    Problem,
    as_json,
    candidates,
    cluster_of,
    first_tokens,
    read_lengths,
    table,
    write_page,
)
from distattn.training import config as configuration
from distattn.training.config import Config

USAGE = """usage: distattn plan CONFIG [--section.key value ...] [options]
       distattn plan --docs FILE_OR_LENGTHS --cluster h200-8x8 [--ranks 64] [options]

Plans one attention call with every strategy, proves the plans and times them on a described cluster. Nothing is run.

  --docs FILE_OR_LENGTHS  document lengths in tokens: 4096,1024x8, or a file of them (JSON list or plain numbers)
  --axis N                only the first N tokens of them
  --cluster NAME          h200-8x8 (nodes x devices), h100, b200 and a100 likewise, laptop-1x4, or a .toml file
  --ranks N               use N devices of it; all by default
  --strategy A,B          {strategies}; all by default
  --layout NAME           contiguous, zigzag (default), document_zigzag, block_cyclic, balanced, placed
  --heads H:K             query and key/value heads; 32:8 by default
  --head-dim D            128 by default
  --dtype NAME            bfloat16 by default
  --html FILE             a page with the timelines and the coloured score matrices
  --perfetto FILE         the fastest candidate's trace, for ui.perfetto.dev
  --json                  numbers instead of a table

With CONFIG the documents are the first pack of the run's data, and shapes, ranks and cluster are the run's.
"""


# what a configuration says itself
_IN_CONFIG = {
    "layout": "--parallel.layout",
    "heads": "--model.heads and --model.kv_heads",
    "head_dim": "--model.width over --model.heads",
    "dtype": "--model.dtype",
    "ranks": "--parallel.ranks",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise DistattnError(f"plan: {message}. See distattn plan --help.")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE.format(strategies=", ".join(STRATEGIES)))
        return 0 if arguments else 2
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in ("docs", "cluster", "strategy", "layout", "heads", "dtype", "html", "perfetto"):
        parser.add_argument(f"--{name}")
    for name in ("axis", "ranks", "head-dim"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--json", action="store_true")
    path = None if arguments[0].startswith("--") else arguments[0]
    given, overrides = parser.parse_known_args(arguments[1:] if path else arguments)
    if path is None and overrides:
        raise DistattnError(f"plan: {overrides[0]!r} is not known. See distattn plan --help.")
    problem, cluster, strategies = _asked(given, path, overrides)

    def say(line: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(line + "\n")

    found = candidates(problem, strategies, cluster, say)
    if given.html:
        write_page(Path(given.html), found, problem, cluster)
    if given.perfetto:
        timelines = [one for one in found.values() if not isinstance(one, str)]
        fastest = min(timelines, key=lambda one: one.forward.seconds + one.backward.seconds)
        Path(given.perfetto).write_text(json.dumps(fastest.perfetto()), "utf-8")
    if given.json:
        sys.stdout.write(as_json(found, problem) + "\n")
    else:
        sys.stdout.write(f"{problem}\n{table(found, cluster)}\n")
        for option in ("html", "perfetto"):
            if getattr(given, option):
                sys.stdout.write(f"{option}: {getattr(given, option)}\n")
    return 0


def first_pack(config: Config) -> list[int]:
    """Document lengths of the first pack of a run's data."""
    data = config.data
    corpus = read_corpus(data.path, suffix=data.suffix, exclude=data.exclude, max_document=data.max_document)
    lengths = [document.end - document.start for document in corpus.documents]
    return [lengths[i] for i in pack_epoch(lengths, data.axis, config.run.seed, 0)[0]]


def _asked(
    given: argparse.Namespace, path: str | None, overrides: Sequence[str]
) -> tuple[Problem, describe.ClusterSpec, list[str]]:
    """The problem, the cluster and the strategies, by the configuration and the options."""
    config = configuration.load(path, overrides) if path else None
    for option, key in _IN_CONFIG.items():
        if config and getattr(given, option) is not None:
            raise DistattnError(f"plan: with a configuration --{option.replace('_', '-')} is {key}.")
    name = given.cluster or (config.cluster.description if config else "")
    if not name:
        raise DistattnError(
            "plan: say what to time it on: --cluster h200-8x8, or cluster.description in the configuration."
        )
    for option in ("ranks", "axis", "head_dim"):
        if getattr(given, option) is not None and getattr(given, option) < 1:
            raise DistattnError(f"plan: --{option.replace('_', '-')}: at least 1, not {getattr(given, option)}.")
    for option in ("html", "perfetto"):
        if getattr(given, option) and not Path(getattr(given, option)).parent.is_dir():
            raise DistattnError(f"plan: --{option}: there is no folder {Path(getattr(given, option)).parent}.")
    cluster = cluster_of(config, name) if config else describe.load(name, given.ranks)
    if given.axis and not given.docs:
        raise DistattnError("plan: --axis cuts the documents of --docs; a configuration has --data.axis.")
    if given.docs:
        lengths = read_lengths(given.docs)
        lengths = first_tokens(lengths, given.axis) if given.axis else lengths
    elif config:
        lengths = first_pack(config)
    else:
        raise DistattnError("plan: a configuration or --docs is wanted. See distattn plan --help.")
    if config:
        problem = Problem.of_config(config, lengths)
    else:
        heads, _, kv_heads = (given.heads or "32:8").partition(":")
        if not (heads.isdecimal() and (kv_heads or heads).isdecimal()):
            raise DistattnError(f"plan: --heads: {given.heads!r} is not query:key/value heads, such as 32:8.")
        shape = int(heads), int(kv_heads or heads), given.head_dim or 128, given.dtype or "bfloat16"
        layout = given.layout or "zigzag"
        if layout not in configuration.LAYOUTS:
            raise DistattnError(
                f"plan: --layout: there is no {layout!r}; there are {', '.join(configuration.LAYOUTS)}."
            )
        problem = Problem(tuple(lengths), cluster.ranks, *shape, layout)
    strategies = given.strategy.split(",") if given.strategy else list(STRATEGIES)
    unknown = [strategy for strategy in strategies if strategy not in STRATEGIES]
    if unknown:
        raise DistattnError(f"plan: there is no strategy {unknown[0]!r}; there are {', '.join(STRATEGIES)}.")
    return problem, cluster, strategies
