"""Limits of single keys of a run file, which stand beside the fields of its sections, and problems with keys."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, get_type_hints

# of a number without another maximum
MOST = 1 << 40
# values by their names in other programs
_MEANT = {
    "zero": "deepspeed",
    "zero2": "deepspeed",
    "zero3": "deepspeed",
    "fsdp": "fsdp2",
    "ddp": "fsdp2",
    "megatron-core": "megatron",
    "fp16": "bfloat16",
    "float16": "bfloat16",
    "half": "bfloat16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "fp64": "float64",
    "double": "float64",
    "cp": "ring",
    "all-gather": "allgather",
    "flash_attention_2": "flash",
    "sdpa": "auto",
    "selective": "save_attention",
}


class Problem(NamedTuple):
    """A key, such as "train.steps", and a sentence about its value."""

    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@dataclass(frozen=True)
class Number:
    """Limits of a number: ge and le are its least and its greatest value, gt and lt are out of its range."""

    ge: float | None = None
    gt: float | None = None
    le: float = MOST
    lt: float | None = None

    def problem(self, value: float) -> str | None:
        """Return a sentence about a value out of range, or None."""
        if self.ge is not None and value < self.ge:
            return f"at least {self.ge}, not {value}."
        if self.gt is not None and value <= self.gt:
            return f"above {self.gt}, not {value}."
        if self.lt is not None and value >= self.lt:
            return f"below {self.lt}, not {value}."
        return f"at most {self.le:,}, not {value}." if value > self.le else None


@dataclass(frozen=True)
class OneOf:
    """The values that a key may have."""

    choices: tuple[str, ...]

    def problem(self, value: str) -> str | None:
        """Return a sentence about another value, with the choice that is probably meant, or None."""
        if value in self.choices:
            return None
        meant = _MEANT.get(value.lower())
        near = [meant] if meant in self.choices else difflib.get_close_matches(value, self.choices, 1, 0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"there is no {value!r}; there are {', '.join(filter(None, self.choices))}.{hint}"


@dataclass(frozen=True)
class Check:
    """A check of a key's value: it returns a sentence about a bad one, or None."""

    problem: Callable[[Any], str | None]


@dataclass(frozen=True)
class Engines:
    """The engines that support another value than the default."""

    names: tuple[str, ...]


def limit_problems(config: Any) -> Iterator[Problem]:
    """Yield a problem for each value that does not keep to the limits beside its field."""
    for key, value, limits, _ in _limited_keys(config):
        for limit in limits:
            if not isinstance(limit, Engines) and (reason := limit.problem(value)):
                yield Problem(key, reason)
                break


def engine_problems(config: Any, engine: str) -> Iterator[Problem]:
    """Yield a problem for each key that is set and that the engine does not support."""
    for key, value, limits, default in _limited_keys(config):
        for limit in limits:
            if isinstance(limit, Engines) and engine not in limit.names and value != default:
                supported = " and ".join(limit.names)
                yield Problem(key, f"engine {engine} does not support it here; use it with {supported}.")


def _limited_keys(config: Any) -> Iterable[tuple[str, Any, tuple[Any, ...], Any]]:
    """Yield each key with limits: its name, its value, its limits and its default."""
    for section in fields(config):
        values = getattr(config, section.name)
        hints = get_type_hints(type(values), include_extras=True)
        for field in fields(values):
            limits = hints[field.name].__metadata__ if hasattr(hints[field.name], "__metadata__") else ()
            limits = tuple(limit for limit in limits if isinstance(limit, Number | OneOf | Check | Engines))
            if limits:
                yield f"{section.name}.{field.name}", getattr(values, field.name), limits, field.default
