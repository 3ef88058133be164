"""Pairwise testing: a few combinations of factor values that together cover every pair of values."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def all_pairs(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Return rows that satisfy `allowed` and cover every pair of values that occurs in an allowed row. The choice is
    greedy and deterministic.
    """
    rng = random.Random(0)
    rows = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    rows = [row for row in rows if allowed(row)]
    rng.shuffle(rows)
    missing = set().union(*(_pairs(row) for row in rows))
    chosen = []
    while missing:
        row = max(rng.sample(rows, min(len(rows), 400)), key=lambda row: len(_pairs(row) & missing))
        if not _pairs(row) & missing:
            row = next(row for row in rows if _pairs(row) & missing)
        chosen.append(row)
        missing -= _pairs(row)
    return chosen


def _pairs(row: Row) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(row.items(), 2))
