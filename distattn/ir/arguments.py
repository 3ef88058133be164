"""Check arguments of public functions against their type hints. The error names the wrong argument."""

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
# sequence types whose elements the functions check themselves, an entire array at a time
_UNCHECKED_ELEMENTS = (Sequence[int], Sequence[tuple[int, int]], tuple[int, int])
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
    """Decorate a function so that it raises DistattnError, with an argument's name and type, if a value does not fit its hint.

    Numbers inside sequences, nested or not, are left to the function. Arrays are accepted as sequences of numbers.
    """
    signature = inspect.signature(function)
    hints: dict[str, Any] = {}

    @functools.wraps(function)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        if not hints:
            # resolve hints at the first call, because they may name classes defined later in the module
            hints.update(_hints(function))
        try:
            bound = signature.bind(*arguments, **named)
        except TypeError:
            # let Python raise its own TypeError, which names the function
            return function(*arguments, **named)
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].kind
            if name in hints and kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                _check(value, hints[name], name, f"{function.__qualname__.removesuffix('.__init__')}: ")
        return function(*arguments, **named)

    return typing.cast(Function, wrapper)


def check_fields(settings: Any) -> None:
    """Check the fields of a dataclass against their hints, as `checked` does. Call this in its __post_init__."""
    kind: Any = type(settings)
    hints = _field_hints(kind)
    for field in fields(settings):
        _check(getattr(settings, field.name), hints[field.name], field.name)


@functools.cache
def _field_hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the hints of a function; Any for hints whose names are imported for type checkers only."""
    hints = {}
    for name, text in function.__annotations__.items():
        try:
            hints[name] = eval(text, function.__globals__) if isinstance(text, str) else text
        except NameError:
            hints[name] = Any
    return hints


def _check(value: Any, hint: Any, name: str, where: str = "") -> None:
    if not _fits(value, hint):
        raise DistattnError(f"{where}{name} must be {_described(hint)}, not {_shown(value)}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if hint is None or hint is type(None):
        return value is None
    if hint is Any:
        return True
    if origin is np.ndarray:
        return isinstance(value, (np.ndarray, list, tuple)) or hasattr(value, "__array__")
    if hint in (int, float):
        # refuse booleans, and tensors, which would lose their gradients
        wanted = Integral if hint is int else Real
        return isinstance(value, wanted) and not isinstance(value, (bool, np.bool_))
    if origin is tuple:
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if not isinstance(value, (tuple, list)):
            return False
        if arguments[1:] == (...,):
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if origin is Sequence:
        if arguments[0] in (int, float):
            return hasattr(value, "__iter__") and not isinstance(value, (str, bytes, Mapping))
        if arguments[0] is Any or arguments[0] in _UNCHECKED_ELEMENTS:
            return isinstance(value, (list, tuple)) or (not isinstance(value, type) and getattr(value, "ndim", 0) > 0)
        return isinstance(value, (list, tuple)) and all(_fits(item, arguments[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping)
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        *some, last = dict.fromkeys(_described(argument) for argument in arguments)
        return f"{', '.join(some)} or {last}" if some else last
    if origin is tuple and arguments[1:] != (...,):
        return f"({', '.join(_described(argument) for argument in arguments)})"
    kind = hint if origin is None else origin
    text = _KINDS.get(kind, f"a {getattr(kind, '__name__', kind)}")
    if kind is Sequence and arguments[0] is not Any:
        text += " of whole numbers" if arguments[0] is int else f" of {_described(arguments[0])}"
    return text


def _shown(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."
    return f"a {type(value).__name__}"
