"""Candidates side by side: one attention call planned by several strategies and timed on a described cluster."""

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
from distattn.parallel.analysis.columns import aligned, in_one_unit, plural
from distattn.parallel.analysis.simulate import simulate
from distattn.parallel.analysis.timeline import Timeline
from distattn.training.config import Config
from distattn.training.plan_settings import PlanSettings

# a strategy or a layout that takes more than this many times as long as the fastest gets a sentence
_NOTABLY_SLOWER = 1.02
# what a plan can be made of in reasonable time and numbers of 64 bits
_MOST_DOCUMENTS, _MOST_TOKENS = 1_000_000, 1 << 40


@dataclass(frozen=True)
class PlanRequest:
    """One attention call to be planned by several strategies, and the settings they share.

    packs: document lengths in tokens of each pack: one that all ranks split, or one for each data-parallel rank.
    """

    packs: tuple[tuple[int, ...], ...]
    settings: PlanSettings

    def timeline(self, strategy: str, cluster: ClusterSpec) -> Timeline:
        """Plan the call by one strategy for a cluster, prove the plan and simulate it."""
        return simulate(replace(self.settings, strategy=strategy, cluster=cluster).plan(*self.packs), cluster)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of all documents, in tokens."""
        return tuple(length for pack in self.packs for length in pack)

    def __str__(self) -> str:
        shape = self.settings
        return (
            f"{sum(self.lengths):,} tokens in {plural(len(self.lengths), 'document')} on {shape.ranks} ranks, "
            f"{shape.heads} query and {shape.kv_heads} key/value heads of {shape.head_dim}, {shape.dtype}, "
            f"{shape.layout} layout"
        )


def cluster_for_run(config: Config, name: str) -> ClusterSpec:
    """Load the cluster a run is timed on, cut to the run's ranks. Raises DistattnError where its nodes are not the run's."""
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
    """Plan and simulate a request by every strategy. Returns by strategy its timeline, or the sentence with which it refuses.

    Raises DistattnError when all of them refuse.
    """
    out: dict[str, Timeline | str] = {}
    for strategy in strategies:
        report_progress(f"{strategy} ...")
        try:
            out[strategy] = request.timeline(strategy, cluster)
        except DistattnError as error:
            out[strategy] = str(error)
    if all(isinstance(found, str) for found in out.values()):
        # what is wrong with the call itself is said once
        same = len(set(map(str, out.values()))) == 1
        lines = [str(found) if same else f"{strategy}: {found}" for strategy, found in out.items()]
        raise DistattnError("\n".join(dict.fromkeys(lines)))
    return out


def comparison_table(found: dict[str, Timeline | str], cluster: ClusterSpec) -> list[str]:
    """Return the lines of a text table with one line for each strategy, the fastest marked. All times are simulated."""
    timed = {name: one for name, one in found.items() if isinstance(one, Timeline)}
    fastest = min(timed, key=lambda name: _seconds(timed[name]))
    head = ["strategy", *COMPARED]
    marks = ["   <- fastest" if name == fastest else "" for name in timed]
    cells = comparison_cells(list(timed.values()))
    table = aligned([head, *([name, *row] for name, row in zip(timed, cells, strict=True))])
    return [
        f"simulated on {cluster.name}; per attention call, TFLOP/s per device",
        table[0],
        *(line + mark for line, mark in zip(table[1:], marks, strict=True)),
        *(f"{name} is refused: {one}" for name, one in found.items() if isinstance(one, str)),
    ]


def compare_layouts(request: PlanRequest, cluster: ClusterSpec) -> dict[str, float]:
    """Return the simulated seconds, forward and backward, of a request's own strategy by layout, the fastest first.

    Layouts that are refused are left out. Empty where each rank has packs of its own, which no layout spreads.
    """
    settings = request.settings
    if settings.ranks == settings.data_parallel_size:
        return {}
    seconds: dict[str, float] = {}
    for layout in LAYOUTS:
        # options belong to the layout that the request names
        options = settings.layout_options if layout == settings.layout else {}
        other = replace(request, settings=replace(settings, layout=layout, layout_options=options))
        with suppress(DistattnError):
            seconds[layout] = _seconds(other.timeline(settings.strategy, cluster))
    return dict(sorted(seconds.items(), key=lambda one: one[1]))


def layout_lines(request: PlanRequest, seconds: dict[str, float]) -> list[str]:
    """Return a line with the time of each layout, and one that names a faster one than the request's where there is one."""
    if not seconds:
        return []
    times = ", ".join(f"{name} {value * 1e3:,.2f} ms" for name, value in seconds.items())
    lines = [f"layouts with {request.settings.strategy}, forward + backward: {times}"]
    return lines + _faster_choice("layout", request.settings.layout, seconds)


def strategy_lines(found: dict[str, Timeline | str], strategy: str) -> list[str]:
    """Return a line that names a faster strategy than a run's own, or one for its own that is refused, where there is one.

    found: as `compare_strategies` returned it; a strategy that was not compared has no line.
    """
    seconds = {name: _seconds(one) for name, one in found.items() if isinstance(one, Timeline)}
    return _faster_choice("strategy", strategy, seconds) if strategy in found else []


def _faster_choice(kind: str, own: str, seconds: dict[str, float]) -> list[str]:
    """Return a sentence that says which key to set where the run's own choice is refused, or notably slower than another.

    kind: layout or strategy. seconds: simulated, by choice.
    """
    fastest = min(seconds, key=lambda name: seconds[name])
    remedy = f'set parallel.{kind} = "{fastest}".'
    if own not in seconds:
        return [f"{kind} {own} is refused; {remedy}"]
    times = seconds[own] / seconds[fastest]
    if times <= _NOTABLY_SLOWER:
        return []
    return [f"{kind} {own} is not the fastest: it takes {times:.2f} times as long as {fastest} (simulated); {remedy}"]


# what strategies are compared by
COMPARED = ("forward", "backward", "TFLOP/s fwd", "TFLOP/s bwd", "across nodes", "waiting", "balance", "buffers")


def comparison_cells(timelines: Sequence[Timeline]) -> list[list[str]]:
    """What is said of each strategy under COMPARED; a column's numbers are in one unit."""
    facts = [one.as_dict() for one in timelines]

    def both(name: str) -> list[float]:
        return [one["forward"][name] + one["backward"][name] for one in facts]

    columns = [
        in_one_unit([one["forward"]["seconds"] for one in facts], "s"),
        in_one_unit([one["backward"]["seconds"] for one in facts], "s"),
        [_three_digits(one["forward"]["tflops"]) for one in facts],
        [_three_digits(one["backward"]["tflops"]) for one in facts],
        in_one_unit(both("bytes_inter_node"), "B"),
        in_one_unit(both("exposed_seconds"), "s"),
        [f"{one['balance']:.2f}" for one in facts],
        in_one_unit([one["peak_bytes"] for one in facts], "B"),
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def comparison_facts(found: dict[str, Timeline | str], request: PlanRequest) -> dict[str, Any]:
    """Return the comparison in terms of JSON."""
    rows = [
        {"strategy": name, "refused": one} if isinstance(one, str) else one.as_dict() for name, one in found.items()
    ]
    shape = {"tokens": sum(request.lengths), "documents": len(request.lengths), "ranks": request.settings.ranks}
    return shape | {"candidates": rows}


def parse_document_lengths(given: str) -> list[int]:
    """Read document lengths from text such as 4096,1024x8 or from a file (a JSON list, or numbers between spaces).

    Raises DistattnError naming the first word that is no length.
    """
    text = given
    if Path(given).is_file():
        try:
            text = Path(given).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DistattnError(f"--docs: {given} cannot be read: {error}.") from None
    out: list[int] = []
    for word in text.replace("[", " ").replace("]", " ").replace(",", " ").split():
        length, many, times = word.partition("x")
        tokens = _tokens(length)
        if tokens is None or (many and not re.fullmatch("[0-9]+", times)) or (many and not int(times)):
            where = f"in {given}" if text is not given else "and there is no such file"
            raise DistattnError(
                f"--docs: {word[:40]!r} is no document length {where}; write 4096,1024x8, 1M or 1Mi, or a file's name."
            )
        if len(out) + int(times or 1) > _MOST_DOCUMENTS:
            raise DistattnError(
                f"--docs: more than {_MOST_DOCUMENTS:,} documents; give a shorter list, or --tokens fewer."
            )
        out += [tokens] * int(times or 1)
    if not out or min(out) < 1:
        raise DistattnError("--docs: at least one document, and each of at least one token, is wanted.")
    return out


def _tokens(word: str) -> int | None:
    """A number of tokens: 4096, 128K, 1.5M, 1e6, or 128Ki and 1Mi in powers of 1024; None where it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE]\+?\d{1,2})?)([kKmMgG]?)(i?)", word)
    if found is None or (found[3] and not found[2]):
        return None
    exact = Decimal(found[1]) * (1024 if found[3] else 1000) ** " kmg".index(found[2].lower() or " ")
    return int(exact) if exact == exact.to_integral_value() and exact <= _MOST_TOKENS else None


def truncate_documents(lengths: Sequence[int], tokens: int) -> list[int]:
    """Lengths of the first documents that together have so many tokens; the last one is cut."""
    out: list[int] = []
    left = tokens
    for length in lengths:
        if not left:
            break
        out.append(min(length, left))
        left -= out[-1]
    if left:
        raise DistattnError(f"--tokens: {tokens:,} tokens are wanted, all documents together have {tokens - left:,}.")
    return out


def _seconds(one: Timeline) -> float:
    """Simulated seconds of the forward and the backward pass."""
    return one.forward.seconds + one.backward.seconds
