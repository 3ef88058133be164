"""The text on which all runs of these tests train."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """Write a folder of real text that does not change with the code: one file per paragraph of the licence."""
    folder = tmp_path_factory.mktemp("texts")
    for number, paragraph in enumerate((Path(__file__).parents[2] / "LICENSE").read_text().split("\n\n")):
        (folder / f"{number:03d}.py").write_text(paragraph)
    return folder
