"""Plain-text tables, with columns as wide as their content and one unit per column of numbers, and messages on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_UNITS = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
}


def print_message(text: str) -> None:
    """Print a message to the user on stderr, and flush it. stdout is for results only."""
    sys.stderr.write(f"distattn: {text}\n")
    sys.stderr.flush()


def align_columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a table. The first `left` columns are left-aligned, the others right-aligned. Short rows end early."""
    columns = max(map(len, rows))
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(columns)]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]


def with_common_unit(values: Sequence[float], kind: str) -> list[str]:
    """Format values in seconds ("s") or bytes ("B"), all with the unit that suits the largest value."""
    largest = max(map(abs, values), default=0.0)
    size, unit = next(((size, unit) for size, unit in _UNITS[kind] if largest >= size), _UNITS[kind][-1])
    digits = {"s": 3, "B": 0}.get(unit, 2)
    return [f"{value / size:,.{digits}f} {unit}" for value in values]


def readable_bytes(number: int) -> str:
    """Format a number of bytes with a decimal unit (kB = 1000 bytes)."""
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def plural(number: int, noun: str) -> str:
    """Format a number with a noun in the singular or plural. noun: its singular."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
