"""A hook of mkdocs: copies the package to build/docs-sources, where the API reference is read from.

Griffe, which reads docstrings for mkdocstrings, finds no modules in folders without `__init__.py`.
"""

import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_startup(**_: Any) -> None:
    """Called by mkdocs before plugins look for the folder."""
    target = ROOT / "build" / "docs-sources" / "distattn"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "distattn", target, ignore=lambda _, names: {"__pycache__"} & set(names))
    for folder in target.rglob("*"):
        if folder.is_dir():
            (folder / "__init__.py").touch()
