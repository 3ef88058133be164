"""Arguments of public functions, checked at the door against the functions' own type hints: one sentence names a wrong one."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, TypeVar, Union

import numpy as np

from distattn.ir.errors import DistattnError

Function = TypeVar("Function", bound=Callable[..., Any])
# elements that functions check themselves, whole arrays at a time
_LEFT = (Sequence[int], Sequence[tuple[int, int]], tuple[int, int])
_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "True or False",
    type(None): "None",
    Sequence: "a sequence",
    Mapping: "a mapping",
    tuple: "a tuple",
}


def checked(function: Function) -> Function:
    """Raise DistattnError, with the argument's name and kind, where a value does not fit its hint; then call the function.

    Numbers in sequences, and in sequences of sequences, are left to the function; arrays pass for sequences of numbers.
    """
    signature = inspect.signature(function)
    hints: dict[str, Any] = {}

    @functools.wraps(function)
    def wrapper(*given: Any, **named: Any) -> Any:
        if not hints:
            # not before: hints may name what is defined further down
            hints.update(_hints(function))
        try:
            bound = signature.bind(*given, **named)
        except TypeError:
            # Python's own words name the function
            return function(*given, **named)
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].kind
            if name in hints and kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                _check(value, hints[name], name, f"{function.__qualname__.removesuffix('.__init__')}: ")
        return function(*given, **named)

    return typing.cast(Function, wrapper)


def check_fields(settings: Any) -> None:
    """The same for the fields of a dataclass, called in its __post_init__."""
    kind: Any = type(settings)
    hints = _field_hints(kind)
    for field in fields(settings):
        _check(getattr(settings, field.name), hints[field.name], field.name)


@functools.cache
def _field_hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The hints of a function; Any for those whose names are imported for type checkers only."""
    found = {}
    for name, text in function.__annotations__.items():
        try:
            found[name] = eval(text, function.__globals__) if isinstance(text, str) else text
        except NameError:
            found[name] = Any
    return found


def _check(value: Any, hint: Any, name: str, where: str = "") -> None:
    if not _fits(value, hint):
        raise DistattnError(f"{where}{name} is {_described(hint)}, not {_shown(value)}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if hint is None or hint is type(None):
        return value is None
    if hint is Any:
        return True
    if origin is np.ndarray:
        return isinstance(value, (np.ndarray, list, tuple)) or hasattr(value, "__array__")
    if hint in (int, float):
        # true is no number, and tensors would lose their gradients
        wanted = Integral if hint is int else Real
        return isinstance(value, wanted) and not isinstance(value, (bool, np.bool_))
    if origin is tuple:
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if not isinstance(value, (tuple, list)):
            return False
        if arguments[1:] == (...,):
            return all(_fits(one, arguments[0]) for one in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if origin is Sequence:
        if arguments[0] in (int, float):
            return hasattr(value, "__iter__") and not isinstance(value, (str, bytes, Mapping))
        if arguments[0] is Any or arguments[0] in _LEFT:
            return isinstance(value, (list, tuple)) or (not isinstance(value, type) and getattr(value, "ndim", 0) > 0)
        return isinstance(value, (list, tuple)) and all(_fits(one, arguments[0]) for one in value)
    if origin is Mapping:
        return isinstance(value, Mapping)
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        *some, last = dict.fromkeys(_described(one) for one in arguments)
        return f"{', '.join(some)} or {last}" if some else last
    if origin is tuple and arguments[1:] != (...,):
        return f"({', '.join(_described(one) for one in arguments)})"
    kind = hint if origin is None else origin
    what = _KINDS.get(kind, f"a {getattr(kind, '__name__', kind)}")
    if kind is Sequence and arguments[0] is not Any:
        what += " of whole numbers" if arguments[0] is int else f" of {_described(arguments[0])}"
    return what


def _shown(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    return f"a {type(value).__name__}"
