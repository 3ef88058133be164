"""An mkdocs hook that copies the package to build/docs-sources, where mkdocstrings reads the API reference.

The copy has an `__init__.py` in each folder, because Griffe, which reads docstrings for mkdocstrings, finds no modules otherwise.
"""

import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_startup(**_: Any) -> None:
    """Copy the package. mkdocs calls this before plugins look for the folder."""
    target = ROOT / "build" / "docs-sources" / "distattn"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "distattn", target, ignore=lambda _, names: {"__pycache__"} & set(names))
    for folder in target.rglob("*"):
        if folder.is_dir():
            (folder / "__init__.py").touch()
