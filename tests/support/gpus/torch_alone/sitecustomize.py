"""Loaded through PYTHONPATH: only torch, Triton and their requirements can be imported, as on a freshly rented machine."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from re import match


def _needed(names: set[str]) -> set[str]:
    """Return the names of the given packages and of all their dependencies, without extras."""
    all_names: set[str] = set()
    while names:
        all_names |= names
        lines = []
        for name in names:
            try:
                lines += requires(name) or []
            except PackageNotFoundError:
                continue
        names = {
            match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines if "extra ==" not in line
        } - all_names
    return all_names


_ALLOWED = _needed({"torch", "triton", "numpy"})
_DISTRIBUTIONS = packages_distributions()


class _AllowedPathFinder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        owners = {owner.lower().replace("_", "-") for owner in _DISTRIBUTIONS.get(name.partition(".")[0], [])}
        if owners and not owners & {*_ALLOWED, "distattn"}:
            return None
        return PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = _AllowedPathFinder()
