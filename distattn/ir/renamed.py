"""Support for old names, which work for one more release with a DeprecationWarning."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def current_name(name: str, renamed: Mapping[str, str], kind: str) -> str:
    """Return the current name of what `name` refers to. Warn if `name` is an old name.

    renamed: old name -> new name. kind: the word before the name in the warning.
    """
    if name not in renamed:
        return name
    message = f"{kind} {name!r} is now {renamed[name]!r}; the old name goes in the next release."
    warnings.warn(message, DeprecationWarning, stacklevel=_level_of_caller())
    return renamed[name]


def renamed_attributes(module: str, renamed: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's `__getattr__` that still accepts old names of its attributes.

    renamed: old name -> new name. Assign the result to `__getattr__` in the module.
    """

    def attribute(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(sys.modules[module], current_name(name, renamed, module))

    return attribute


class MovedModules(MetaPathFinder, Loader):
    """An importer of modules by their old names. moved: old name -> new name. It must be the last finder in `sys.meta_path`."""

    def __init__(self, moved: Mapping[str, str]):
        self._moved = moved

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for an old name, and warn; return None for other names."""
        return ModuleSpec(fullname, self) if current_name(fullname, self._moved, "module") != fullname else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module with the new name."""
        module = import_module(self._moved[spec.name])
        # save the module's spec, because Python overwrites the spec of a module that a loader returns
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the spec of the module, whose code has already run."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def _level_of_caller() -> int:
    """Return the `stacklevel` with which a warning of `current_name` points at the first frame outside distattn."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "distattn":
        frame, level = frame.f_back, level + 1
    return level
