"""Folders that many tests read, made once for all processes of pytest: a fixture would make them in each process."""

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of this name that `make` has filled in the first process of pytest that came. It is only read."""
    whole = factory.getbasetemp()
    # shared by all workers of xdist
    base = whole.parent if whole.name.startswith("popen-") else whole
    folder, done = base / name, base / f"{name}.done"
    with FileLock(base / f"{name}.lock"):
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
