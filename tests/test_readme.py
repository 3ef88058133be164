"""Checks that what the README promises runs as written."""

import math
import re
from pathlib import Path

from snippets import python_snippets, tiny_llama, tiny_loader

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_it_is_short():
    # about 800 words of text, plus the markup of tables and code
    assert len(README.split()) <= 900
    assert len(re.sub(r"```.*?```|^    .*?$", "", README, flags=re.DOTALL | re.MULTILINE).split()) <= 650


def test_the_loop_runs_as_written():
    (code,) = python_snippets(README)
    names = tiny_llama() | dict(loader=tiny_loader(), sum_gradients=lambda: None)
    exec(code, names)
    # after only two steps of training, the model still guesses among 64 tokens
    assert abs(names["mean"] - math.log(64)) < 0.5


def test_with_packs_per_rank_nothing_else_changes():
    (code,) = python_snippets(README)
    setting = 'da.ContextParallel(strategy="cad", data="per_rank")'
    assert setting in README.replace(code, "")
    names = tiny_llama() | dict(loader=tiny_loader(), sum_gradients=lambda: None)
    exec(re.sub(r"da\.ContextParallel\(.*?\) as cp", f"{setting} as cp", code), names)
    assert abs(names["mean"] - math.log(64)) < 0.5


def test_the_folder_tree_is_the_folders():
    (tree,) = re.findall(r"## Folders\n+```\n(.*?)```", README, re.DOTALL)
    inside = [line.split("/")[0].strip() for line in tree.splitlines() if line.startswith("  ")]
    outside = [line.split("/")[0] for line in tree.splitlines() if not line.startswith("  ")]
    folders = {
        folder.name
        for folder in (ROOT / "distattn").iterdir()
        if folder.is_dir() and not folder.is_symlink() and any(folder.glob("*.py"))
    }
    assert set(inside) == folders
    linked = {folder.name for folder in (ROOT / "distattn").iterdir() if folder.is_symlink()}
    assert set(outside) == {"distattn", *linked}
