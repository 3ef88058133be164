"""Shared read-only folders for tests, created once for all pytest processes. A fixture would create them in each
process.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder `name`, filled by `make` in whichever pytest process comes first. Tests must only read it."""
    whole = factory.getbasetemp()
    # the parent folder is shared by all xdist workers
    base = whole.parent if whole.name.startswith("popen-") else whole
    folder, done = base / name, base / f"{name}.done"
    with FileLock(base / f"{name}.lock"):
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
