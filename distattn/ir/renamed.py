"""Names that changed: the old ones work for one release more, with a DeprecationWarning."""

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


class MovedModules(MetaPathFinder, Loader):
    """Imports modules by their old names. moved: old name -> new name. It is to be the last of `sys.meta_path`."""

    def __init__(self, moved: Mapping[str, str]):
        self._moved = moved

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec that this object loads, for old names; warn."""
        return ModuleSpec(fullname, self) if current_name(fullname, self._moved, "module") != fullname else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module of the new name."""
        module = import_module(self._moved[spec.name])
        # Python sets the spec of a module that a loader has made
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module, which has run already, its own spec again."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def _level_of_caller() -> int:
    """Return the `stacklevel` with which `current_name` warns of the first line outside distattn."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "distattn":
        frame, level = frame.f_back, level + 1
    return level
