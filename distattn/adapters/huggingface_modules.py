"""Patch transformers' modeling modules: at once if they are already imported, otherwise on import."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

_MODELS = "transformers.models."
# the modules that define models; each model has a folder
_MODELING = ".modeling_"

Change = Callable[[ModuleType], None]


def patch_model_modules(change: Change) -> None:
    """Call `change` once with every modeling module, such as `transformers.models.llama.modeling_llama`.

    Modules already imported are changed at once, others when they are imported. Passing the same change again does nothing.
    """
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    if change in finder.changes:
        return
    finder.changes.append(change)
    for name, module in list(sys.modules.items()):
        if _has_models(name):
            change(module)


def model_folder(module: str) -> str:
    """Return a module's folder below transformers/models, such as "llama", or "" for modules elsewhere."""
    return module.removeprefix(_MODELS).split(".")[0] if module.startswith(_MODELS) else ""


def _has_models(name: str) -> bool:
    return name.startswith(_MODELS) and _MODELING in name


class _Finder:
    """An import finder for transformers' models. It delegates to Python's finder and changes modules as they are imported."""

    def __init__(self) -> None:
        self.changes: list[Change] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find the spec of a modeling module. See `importlib.abc.MetaPathFinder.find_spec`."""
        if not _has_models(name):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        # leave modules from other loaders unchanged (zip files, compiled modules)
        if spec is not None and spec.origin is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(name, spec.origin, self.changes)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, changes: Sequence[Change]):
        super().__init__(name, path)
        self._changes = changes

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for change in self._changes:
            change(module)
