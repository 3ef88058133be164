"""Compare strategies: plan one attention call with each of them, and simulate its time on a described cluster."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from distattn.cluster import spec as describe
from distattn.cluster.spec import ClusterSpec
from distattn.ir.errors import DistattnError
from distattn.ir.layout import LAYOUTS
from distattn.ir.text_format import align_columns, plural, with_common_unit
from distattn.parallel.analysis.simulate import simulate
from distattn.parallel.analysis.timeline import Timeline
from distattn.training.config.plan_settings import PlanSettings
from distattn.training.config.run_file import Config

# a chosen strategy or layout that takes more than this many times as long as the fastest is reported
_NOTABLY_SLOWER = 1.02
# limits that keep planning times reasonable and values within 64 bits
_MOST_DOCUMENTS, _MOST_TOKENS = 1_000_000, 1 << 40


@dataclass(frozen=True)
class PlanRequest:
    """One attention call to be planned with several strategies, and the settings that they share.

    packs: the document lengths of each pack, in tokens: one pack that all ranks split, or one pack for each data-parallel rank.
    """

    packs: tuple[tuple[int, ...], ...]
    settings: PlanSettings

    def timeline(self, strategy: str, cluster: ClusterSpec) -> Timeline:
        """Plan the call with one strategy for a cluster, prove the plan, and simulate it."""
        config = replace(self.settings.config, strategy=strategy, cluster=cluster)
        return simulate(replace(self.settings, config=config).plan(*self.packs), cluster)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of all documents, in tokens."""
        return tuple(length for pack in self.packs for length in pack)

    def __str__(self) -> str:
        shape = self.settings
        return (
            f"{sum(self.lengths):,} tokens in {plural(len(self.lengths), 'document')} on {shape.ranks} ranks, "
            f"{shape.heads} query and {shape.kv_heads} key/value heads of {shape.head_dim}, {shape.dtype}, "
            f"{shape.config.layout} layout"
        )


def cluster_for_run(config: Config, name: str) -> ClusterSpec:
    """Load the cluster on which to time a run, reduced to the run's ranks. Raise DistattnError if the node sizes differ."""
    cluster = describe.load(name, config.parallel.ranks)
    per_node = config.parallel.devices_per_node or config.parallel.ranks
    if cluster.devices != per_node:
        raise DistattnError(
            f"the run has {per_node} ranks on a node, {cluster.name} has {cluster.devices}: set "
            f"parallel.devices_per_node={cluster.devices} or another cluster."
        )
    return cluster


def compare_strategies(
    request: PlanRequest,
    strategies: Sequence[str],
    cluster: ClusterSpec,
    report_progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Timeline | str]:
    """Plan and simulate a request with every strategy. Return each strategy's timeline, or why it is refused.

    Raises DistattnError if all strategies are refused.
    """
    out: dict[str, Timeline | str] = {}
    for strategy in strategies:
        report_progress(f"{strategy} ...")
        try:
            out[strategy] = request.timeline(strategy, cluster)
        except DistattnError as error:
            out[strategy] = str(error)
    if all(isinstance(result, str) for result in out.values()):
        # an error of the call itself is the same for all strategies; report it once
        same = len(set(map(str, out.values()))) == 1
        lines = [str(result) if same else f"{strategy}: {result}" for strategy, result in out.items()]
        raise DistattnError("\n".join(dict.fromkeys(lines)))
    return out


def comparison_table(results: dict[str, Timeline | str], cluster: ClusterSpec) -> dict[str, str]:
    """Return the lines of a text table with one row per strategy, as a dict from line to kind: "fastest", "refused" or "".

    results: from `compare_strategies`. All times are simulated.
    """
    timed = {name: result for name, result in results.items() if isinstance(result, Timeline)}
    fastest = min(timed, key=lambda name: _seconds(timed[name]))
    head = ["strategy", *COMPARED]
    cells = comparison_cells(list(timed.values()))
    table = align_columns([head, *([name, *row] for name, row in zip(timed, cells, strict=True))])
    lines = {f"simulated on {cluster.name}; per attention call, TFLOP/s per device": "", table[0]: ""}
    for name, line in zip(timed, table[1:], strict=True):
        lines |= {f"{line}   <- fastest": "fastest"} if name == fastest else {line: ""}
    refused = {name: result for name, result in results.items() if isinstance(result, str)}
    return lines | {f"{name} is refused: {result}": "refused" for name, result in refused.items()}


def compare_layouts(request: PlanRequest, cluster: ClusterSpec) -> dict[str, float]:
    """Return the simulated seconds of the forward and backward pass for each layout with the request's strategy, fastest first.

    Refused layouts are left out. Return an empty dict if each rank has its own packs, to which no layout applies.
    """
    settings, config = request.settings, request.settings.config
    if settings.ranks == settings.data_parallel_size:
        return {}
    seconds: dict[str, float] = {}
    for layout in LAYOUTS:
        # the request's options apply only to the request's layout
        options = config.layout_options if layout == config.layout else None
        of_layout = replace(config, layout=layout, layout_options=options)
        other = replace(request, settings=replace(settings, config=of_layout))
        with suppress(DistattnError):
            seconds[layout] = _seconds(other.timeline(config.strategy, cluster))
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def layout_lines(request: PlanRequest, seconds: dict[str, float]) -> list[str]:
    """Return a line with each layout's time and, if the request's layout is notably slow, a line that recommends the fastest."""
    if not seconds:
        return []
    times = ", ".join(f"{name} {value * 1e3:,.2f} ms" for name, value in seconds.items())
    lines = [f"layouts with {request.settings.config.strategy}, forward + backward: {times}"]
    return lines + _faster_choice("layout", request.settings.config.layout, seconds)


def strategy_lines(results: dict[str, Timeline | str], strategy: str) -> list[str]:
    """Return a line that recommends the fastest strategy if the run's strategy is refused or notably slow, otherwise no lines.

    results: from `compare_strategies`. Return no lines if `strategy` was not compared.
    """
    seconds = {name: _seconds(result) for name, result in results.items() if isinstance(result, Timeline)}
    return _faster_choice("strategy", strategy, seconds) if strategy in results else []


def _faster_choice(kind: str, chosen: str, seconds: dict[str, float]) -> list[str]:
    """Return a line that says which key to set if the run's choice is refused or notably slow, otherwise no lines.

    kind: "layout" or "strategy". seconds: simulated seconds by choice.
    """
    fastest = min(seconds, key=lambda name: seconds[name])
    remedy = f'set parallel.{kind} = "{fastest}".'
    if chosen not in seconds:
        return [f"{kind} {chosen} is refused; {remedy}"]
    times = seconds[chosen] / seconds[fastest]
    if times <= _NOTABLY_SLOWER:
        return []
    return [
        f"{kind} {chosen} is not the fastest: it takes {times:.2f} times as long as {fastest} (simulated); {remedy}"
    ]


# the columns of the comparison
COMPARED = ("forward", "backward", "TFLOP/s fwd", "TFLOP/s bwd", "across nodes", "waiting", "balance", "buffers")


def comparison_cells(timelines: Sequence[Timeline]) -> list[list[str]]:
    """Return the cells for the columns COMPARED, one row per strategy. All values in a column have the same unit."""
    facts = [timeline.as_dict() for timeline in timelines]

    def sum_of_passes(name: str) -> list[float]:
        return [row["forward"][name] + row["backward"][name] for row in facts]

    columns = [
        with_common_unit([row["forward"]["seconds"] for row in facts], "s"),
        with_common_unit([row["backward"]["seconds"] for row in facts], "s"),
        [_three_digits(row["forward"]["tflops"]) for row in facts],
        [_three_digits(row["backward"]["tflops"]) for row in facts],
        with_common_unit(sum_of_passes("bytes_inter_node"), "B"),
        with_common_unit(sum_of_passes("exposed_seconds"), "s"),
        [f"{row['balance']:.2f}" for row in facts],
        with_common_unit([row["peak_bytes"] for row in facts], "B"),
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def comparison_facts(results: dict[str, Timeline | str], request: PlanRequest) -> dict[str, Any]:
    """Return the comparison as a dict for JSON."""
    rows = [
        {"strategy": name, "refused": result} if isinstance(result, str) else result.as_dict()
        for name, result in results.items()
    ]
    shape = {"tokens": sum(request.lengths), "documents": len(request.lengths), "ranks": request.settings.ranks}
    return shape | {"candidates": rows}


def parse_document_lengths(option: str) -> list[int]:
    """Read document lengths from text such as 4096,1024x8 or from a file (a JSON list, or numbers separated by spaces).

    Raises DistattnError naming the first word that is not a length.
    """
    text = option
    if Path(option).is_file():
        try:
            text = Path(option).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DistattnError(f"--docs: {option} cannot be read: {error}.") from None
    out: list[int] = []
    for word in text.replace("[", " ").replace("]", " ").replace(",", " ").split():
        length, many, times = word.partition("x")
        tokens = _tokens(length)
        if tokens is None or (many and not re.fullmatch("[0-9]+", times)) or (many and not int(times)):
            where = f"in {option}" if text is not option else "and there is no such file"
            raise DistattnError(
                f"--docs: {word[:40]!r} is not a document length {where}; write 4096,1024x8, 1M or 1Mi, or a file's name."
            )
        if len(out) + int(times or 1) > _MOST_DOCUMENTS:
            raise DistattnError(
                f"--docs: more than {_MOST_DOCUMENTS:,} documents; give a shorter list, or --tokens fewer."
            )
        out += [tokens] * int(times or 1)
    if not out or min(out) < 1:
        raise DistattnError("--docs: name at least one document, each with at least one token.")
    return out


def _tokens(word: str) -> int | None:
    """Parse a number of tokens such as 4096, 128K, 1.5M, 1e6, or 128Ki (x 1024). Return None for other words."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE]\+?\d{1,2})?)([kKmMgG]?)(i?)", word)
    if match is None or (match[3] and not match[2]):
        return None
    exact = Decimal(match[1]) * (1024 if match[3] else 1000) ** " kmg".index(match[2].lower() or " ")
    return int(exact) if exact == exact.to_integral_value() and exact <= _MOST_TOKENS else None


def truncate_documents(lengths: Sequence[int], tokens: int) -> list[int]:
    """Return the lengths of the first documents, up to `tokens` tokens in total. The last document is cut to fit."""
    out: list[int] = []
    left = tokens
    for length in lengths:
        if not left:
            break
        out.append(min(length, left))
        left -= out[-1]
    if left:
        raise DistattnError(
            f"--tokens: {tokens:,} is more than the {tokens - left:,} tokens of all documents together."
        )
    return out


def _seconds(timeline: Timeline) -> float:
    """Return the simulated seconds of the forward and backward pass together."""
    return timeline.forward.seconds + timeline.backward.seconds
