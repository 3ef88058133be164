"""Limits of the keys of a run file, which stand beside the fields of its sections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from distattn.ir.limits import Problem, annotations_of


@dataclass(frozen=True)
class Engines:
    """The engines that support another value than the default."""

    names: tuple[str, ...]


def engine_problems(config: Any, engine: str) -> Iterator[Problem]:
    """Yield a problem for each key that is set and that the engine does not support."""
    for section in fields(config):
        values = getattr(config, section.name)
        annotations = annotations_of(values.__class__)
        for field in fields(values):
            for limit in annotations.get(field.name, ()):
                unsupported = isinstance(limit, Engines) and engine not in limit.names
                if unsupported and getattr(values, field.name) != field.default:
                    supported = " and ".join(limit.names)
                    reason = f"engine {engine} does not support it here; use it with {supported}."
                    yield Problem(f"{section.name}.{field.name}", reason)
