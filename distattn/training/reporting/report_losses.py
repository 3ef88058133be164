"""Loss by position and by corpus in a run's report: charts that need no scripts, and tables."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from distattn.training.run_folder import EVALUATION, TRAINING, RunFolder

# chart size on a phone, in CSS pixels; larger screens scale the chart and its text up
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 260, 52, 14, 10, 34
# maximum number of position labels that fit side by side if each label is as wide as "1,048,576"
_MOST_LABELS = 5
_TITLES = {EVALUATION: "Held-out documents", TRAINING: "Training"}


class Line(NamedTuple):
    """One curve. name: its table's step. last: True for the newest table. path: SVG path. points: (x, y, tooltip) by point."""

    name: str
    last: bool
    path: str
    points: list[tuple[float, float, str]]


class Chart(NamedTuple):
    """Loss by position of one split. x_ticks, y_ticks: (coordinate, text). head, rows: the same values as a table."""

    title: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    head: list[str]
    rows: list[list[str]]


def loss_charts(run: RunFolder) -> list[Chart]:
    """Return a chart for evaluation and one for training, each with its first and last table.

    A split without tables has no chart.
    """
    charts = []
    for split, title in _TITLES.items():
        tables = [row for row in run.losses(split) if _points(row)]
        if tables:
            charts.append(_chart(title, tables[:1] + tables[1:][-1:]))
    return charts


def corpus_rows(run: RunFolder) -> list[list[str]]:
    """Return a row for each corpus and split: corpus, split, first and last mean loss, and the last token count."""
    rows = []
    for split, title in _TITLES.items():
        tables = [row for row in run.losses(split) if row["by_corpus"]]
        if tables:
            firsts = {corpus["name"]: corpus for corpus in tables[0]["by_corpus"]}
            for corpus in tables[-1]["by_corpus"]:
                first = firsts.get(corpus["name"], {}).get("loss")
                rows.append([corpus["name"], title, _number(first), _number(corpus["loss"]), f"{corpus['tokens']:,}"])
    return rows


def _points(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [bucket for bucket in table["by_position"] if bucket["loss"] is not None]


def _chart(title: str, tables: list[dict[str, Any]]) -> Chart:
    losses = [bucket["loss"] for table in tables for bucket in _points(table)]
    buckets = max((table["by_position"] for table in tables), key=len)
    lowest, highest = min(losses), max(losses)
    margin = (highest - lowest or 1.0) * 0.08
    floor, roof = lowest - margin, highest + margin

    def x(first: int) -> float:
        """Return the x coordinate of the bucket that begins at position `first`. All buckets are drawn equally wide."""
        number = first.bit_length()
        return round(_LEFT + (number + 0.5) / len(buckets) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(loss: float) -> float:
        return round(_TOP + (roof - loss) / (roof - floor) * (_HEIGHT - _TOP - _BOTTOM), 1)

    lines = []
    for number, table in enumerate(tables):
        points = [
            (
                x(bucket["first"]),
                y(bucket["loss"]),
                f"{_span(bucket)}: {bucket['loss']:.4f}, {bucket['tokens']:,} tokens",
            )
            for bucket in _points(table)
        ]
        path = "M" + " L".join(f"{left} {top}" for left, top, _ in points)
        lines.append(Line(f"step {table['step']:,}", number == len(tables) - 1, path, points))
    every = math.ceil(len(buckets) / _MOST_LABELS)
    by_first = [{bucket["first"]: bucket["loss"] for bucket in table["by_position"]} for table in tables]
    return Chart(
        title,
        lines,
        [(x(bucket["first"]), f"{bucket['first']:,}") for bucket in buckets[::every]],
        [
            (y(floor + (roof - floor) * quarter / 4), f"{floor + (roof - floor) * quarter / 4:.2f}")
            for quarter in range(5)
        ],
        ["positions", "tokens", *(f"loss, {line.name}" for line in lines)],
        [
            [_span(bucket), f"{bucket['tokens']:,}", *(_number(losses.get(bucket["first"])) for losses in by_first)]
            for bucket in tables[-1]["by_position"]
        ],
    )


def _span(bucket: dict[str, Any]) -> str:
    first, last = bucket["first"], bucket["last"]
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _number(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
