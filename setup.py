"""The package's long description: README.md for the page of a package index, where relative links lead nowhere.

If `[project.urls]` in pyproject.toml has a `Repository`, links and the picture become absolute. Otherwise links become plain
text, and the picture is left out. Everything else about the package is in pyproject.toml.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
_RELATIVE = r"\[([^\]]*)\]\((?!https?:|#)([^)]*)\)"


def long_description(readme: str, repository: str = "") -> str:
    """Return README.md with absolute links into the repository's main branch, or without relative links."""
    if not repository:
        readme = re.sub(rf"!{_RELATIVE}\n*", "", readme)
        return re.sub(_RELATIVE, r"\1", readme)
    readme = re.sub(rf"!{_RELATIVE}", rf"![\1]({repository}/raw/main/\2)", readme)
    return re.sub(rf"(?<!!){_RELATIVE}", rf"[\1]({repository}/blob/main/\2)", readme)


if __name__ == "__main__":
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"].get("urls", {})
    setup(
        long_description=long_description((ROOT / "README.md").read_text("utf-8"), urls.get("Repository", "")),
        long_description_content_type="text/markdown",
    )
