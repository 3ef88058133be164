"""Names that changed: the old ones work for one release more, with a DeprecationWarning."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def current_name(name: str, renamed: Mapping[str, str], kind: str) -> str:
    """Return the present name of something, and warn if `name` is its old one.

    renamed: old name -> new name. kind: the word before the name in the warning.
    """
    if name not in renamed:
        return name
    message = f"{kind} {name!r} is now {renamed[name]!r}; the old name goes in the next release."
    warnings.warn(message, DeprecationWarning, stacklevel=_level_of_caller())
    return renamed[name]


def renamed_attributes(module: str, renamed: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module that still has its attributes' old names.

    renamed: old name -> new name. Assign the result to `__getattr__` in the module.
    """

    def attribute(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(sys.modules[module], current_name(name, renamed, module))

    return attribute


def _level_of_caller() -> int:
    """Return the `stacklevel` with which `current_name` warns of the first line outside distattn."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "distattn":
        frame, level = frame.f_back, level + 1
    return level
