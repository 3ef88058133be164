"""Loss by position and by corpus on the page of a run: drawings that need no script, and tables."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from distattn.training.run_folder import EVALUATION, TRAINING, RunFolder

# the size of a drawing on a phone, in CSS pixels; elsewhere the drawing and its text are larger
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 260, 52, 14, 10, 34
# position labels side by side, each as wide as 1,048,576
_MOST_LABELS = 5
_TITLES = {EVALUATION: "Held-out documents", TRAINING: "Training"}


class Line(NamedTuple):
    """One curve. name: which table; last: whether it is the newest; path, points: where it goes, with what a point says."""

    name: str
    last: bool
    path: str
    points: list[tuple[float, float, str]]


class Chart(NamedTuple):
    """Loss by position of one split. ticks: (place, text) along each axis; rows: the same numbers as a table."""

    title: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    head: list[str]
    rows: list[list[str]]


def loss_charts(run: RunFolder) -> list[Chart]:
    """A chart for evaluations and one for training, of the first and the last table of each; none where there are no tables."""
    charts = []
    for split, title in _TITLES.items():
        tables = [row for row in run.losses(split) if _points(row)]
        if tables:
            charts.append(_chart(title, tables[:1] + tables[1:][-1:]))
    return charts


def corpus_rows(run: RunFolder) -> list[list[str]]:
    """Of each corpus and split: first and last mean loss, and the tokens of the last."""
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
    least, most = min(losses), max(losses)
    spare = (most - least or 1.0) * 0.08
    floor, roof = least - spare, most + spare

    def x(first: int) -> float:
        """Buckets are equally wide: a power of two each."""
        number = first.bit_length()
        return round(_LEFT + (number + 0.5) / len(buckets) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(loss: float) -> float:
        return round(_TOP + (roof - loss) / (roof - floor) * (_HEIGHT - _TOP - _BOTTOM), 1)

    lines = []
    for number, table in enumerate(tables):
        points = [
            (x(one["first"]), y(one["loss"]), f"{_span(one)}: {one['loss']:.4f}, {one['tokens']:,} tokens")
            for one in _points(table)
        ]
        path = "M" + " L".join(f"{left} {top}" for left, top, _ in points)
        lines.append(Line(f"step {table['step']:,}", number == len(tables) - 1, path, points))
    every = math.ceil(len(buckets) / _MOST_LABELS)
    by_first = [{one["first"]: one["loss"] for one in table["by_position"]} for table in tables]
    return Chart(
        title,
        lines,
        [(x(one["first"]), f"{one['first']:,}") for one in buckets[::every]],
        [(y(floor + (roof - floor) * part / 4), f"{floor + (roof - floor) * part / 4:.2f}") for part in range(5)],
        ["positions", "tokens", *(f"loss, {line.name}" for line in lines)],
        [
            [_span(one), f"{one['tokens']:,}", *(_number(losses.get(one["first"])) for losses in by_first)]
            for one in tables[-1]["by_position"]
        ],
    )


def _span(bucket: dict[str, Any]) -> str:
    first, last = bucket["first"], bucket["last"]
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _number(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
