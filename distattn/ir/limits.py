"""Limits of settings, declared with the fields of their dataclass as `Annotated[int, Number(ge=1)]`."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

from distattn.ir.errors import SettingError

# the default upper bound of numbers
MOST = 1 << 40
# names that other programs use for values of settings, and our names for the same values
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


class SettingProblem(NamedTuple):
    """A problem with a setting: its key, such as "train.steps", and a sentence about its value."""

    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@dataclass(frozen=True)
class Number:
    """Limits of a number: ge and le are inclusive bounds, gt and lt exclusive bounds."""

    ge: float | None = None
    gt: float | None = None
    le: float = MOST
    lt: float | None = None

    def problem(self, value: float) -> str | None:
        """Return a sentence about a value that is out of range; None if it is in range. NaN is out of every range."""
        if self.ge is not None and not value >= self.ge:
            return f"must be at least {self.ge}, not {value}."
        if self.gt is not None and not value > self.gt:
            return f"must be above {self.gt}, not {value}."
        if self.lt is not None and not value < self.lt:
            return f"must be below {self.lt}, not {value}."
        return None if value <= self.le else f"must be at most {self.le:,}, not {value}."


@dataclass(frozen=True, eq=False)
class OneOf:
    """The values that a setting may have. choices: a collection that may still grow. before: values listed before them."""

    choices: Collection[str]
    before: tuple[str, ...] = ()

    def problem(self, value: str) -> str | None:
        """Return a sentence about an invalid value, with the choice that was probably meant; None for a valid value."""
        choices = [*self.before, *self.choices]
        if value in choices:
            return None
        meant = _MEANT.get(value.lower())
        near = [meant] if meant in choices else difflib.get_close_matches(value, choices, 1, 0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"there is no {value!r}; there are {', '.join(filter(None, choices))}.{hint}"


@dataclass(frozen=True)
class Check:
    """A check of a value. problem: returns a sentence about a bad value; None for a good value."""

    problem: Callable[[Any], str | None]


def limit_problems(settings: Any, table: str = "") -> Iterator[SettingProblem]:
    """Yield a problem for each field of a dataclass whose value is outside the field's limits; None is within all limits.

    table: a prefix for the names of fields, such as "train.".
    """
    for name, limits in annotations_of(settings.__class__).items():
        value = getattr(settings, name)
        reasons = (limit.problem(value) for limit in limits if isinstance(limit, Number | OneOf | Check))
        if value is not None and (reason := next(filter(None, reasons), None)):
            yield SettingProblem(table + name, reason)


def nested_problems(record: Any, table: str = "") -> Iterator[SettingProblem]:
    """Yield the problems of a dataclass and of all dataclasses in its fields. Keys are dotted; tuple entries are numbered."""
    yield from limit_problems(record, table)
    for field in fields(record):
        value = getattr(record, field.name)
        entries = enumerate(value) if isinstance(value, tuple) else [("", value)]
        for number, entry in entries:
            if is_dataclass(entry):
                yield from nested_problems(entry, ".".join(filter(None, (f"{table}{field.name}", str(number)))) + ".")


def check_limits(settings: Any) -> None:
    """Raise SettingError for the first field of a dataclass whose value is outside the field's limits."""
    for problem in limit_problems(settings):
        raise SettingError(*problem)


@functools.cache
def annotations_of(kind: Any) -> dict[str, tuple[Any, ...]]:
    """Return the annotations of a dataclass's fields, keyed by name. Fields without annotations are left out."""
    hints = get_type_hints(kind, include_extras=True)
    annotated = {field.name: getattr(hints[field.name], "__metadata__", ()) for field in fields(kind)}
    return {name: annotations for name, annotations in annotated.items() if annotations}
