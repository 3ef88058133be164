"""Checks for plain English and for local names that say what they hold. `tests/words.toml` lists what is banned and
why.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORDS = tomllib.loads((ROOT / "tests" / "words.toml").read_text())
PHRASES = {re.compile(pattern): reason for pattern, reason in WORDS["phrases"].items()}
LOCALS = WORDS["locals"]
VERBS = set(WORDS["docstrings"]["verbs"])
NOT_YET = tuple(WORDS["not_yet"])
PRODUCT = ("distattn", "parallel", "kernels", "launch", "cluster")
# the pages that readers see first
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md")


def python_files() -> list[Path]:
    """Return the Python files of the product and its tests, without following the package's symbolic links to other
    folders.
    """
    files = [path for folder in (*PRODUCT, "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in files if not any(parent.is_symlink() for parent in path.parents))


def checked(path: Path) -> bool:
    return not str(path.relative_to(ROOT)).startswith(NOT_YET)


def banned_phrases(text: str) -> list[str]:
    """Return each banned phrase in a text with the reason."""

    return [f"{match[0]!r}: {reason}" for phrase, reason in PHRASES.items() for match in phrase.finditer(text)]


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each comment and string in a module."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of each name bound by functions and comprehensions, including arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def docstring_faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, fault) of function docstrings that do not begin with a verb."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            is_property = any(
                ast.unparse(decorator).endswith(("property", "setter")) for decorator in node.decorator_list
            )
            if text.split()[0].strip(".,:;") not in VERBS and not is_property:
                yield node.lineno, f"docstring of {node.name}: {text.splitlines()[0]!r} does not begin with a verb"


def faults(path: Path) -> list[str]:
    """Return the banned phrases, local names and docstrings in a Python file, with their lines."""
    source = path.read_text()
    tree = ast.parse(source)
    lines = [(line, fault) for line, text in texts(source) for fault in banned_phrases(text)]
    lines += [(line, f"{name}: {LOCALS[name]}") for line, name in bound_names(tree) if name in LOCALS]
    lines += docstring_faults(tree)
    return [f"{path.relative_to(ROOT)}:{line}: {fault}" for line, fault in sorted(set(lines))]


def test_no_module_has_banned_names_or_phrases() -> None:
    found_faults = [fault for path in python_files() if checked(path) for fault in faults(path)]
    assert not found_faults, "\n".join(found_faults)


def test_no_page_has_banned_phrases() -> None:
    found_faults = [
        f"{path.relative_to(ROOT)}:{number}: {fault}"
        for pattern in PAGES
        for path in sorted(ROOT.glob(pattern))
        if checked(path)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for fault in banned_phrases(line)
    ]
    assert not found_faults, "\n".join(found_faults)


def test_folders_that_are_not_checked_yet_have_faults() -> None:
    """Check that every folder on the list still has a fault; a folder without faults must leave the list."""
    for folder in NOT_YET:
        files = [path for path in python_files() if str(path.relative_to(ROOT)).startswith(folder)]
        pages = [
            path for pattern in PAGES for path in ROOT.glob(pattern) if str(path.relative_to(ROOT)).startswith(folder)
        ]
        assert any(faults(path) for path in files) or any(banned_phrases(path.read_text()) for path in pages), folder


@pytest.mark.parametrize(
    "source, fault",
    [
        ("def f():\n    one = 1\n", "one"),
        ("def f(found): ...\n", "found"),
        ("names = [what for what in range(3)]\n", "what"),
        ("# no" + "body waits\n", "no" + "body"),
        ('def f():\n    """Of tokens and targets."""\n', "does not begin with a verb"),
        ('ERROR = "there are so' + ' many"\n', "so" + " many"),
    ],
)
def test_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, fault: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert [text for text in faults(path) if fault in text]
