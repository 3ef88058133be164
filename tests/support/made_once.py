"""What is made for many tests, once for all processes of pytest: a fixture alone would make it in each of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder of this name that `make` has filled, by whichever process of pytest came first. It is only read."""
    whole = factory.getbasetemp()
    # of all workers of xdist
    base = whole.parent if whole.name.startswith("popen-") else whole
    folder, done = base / name, base / f"{name}.done"
    with FileLock(base / f"{name}.lock"):
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
