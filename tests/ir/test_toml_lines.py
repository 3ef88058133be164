"""Every key of a TOML file has its line number, however the key is written."""

import tomllib
from pathlib import Path

import pytest
import tomli_w

from distattn.ir.toml_lines import TomlLines

ROOT = Path(__file__).parents[2]
TEXT = '''# a comment
a = 1
"b c".d = [1, [2,
  3], """x = 1
y""""", {k = 1, "l"= "}"}]   # e = 5
[t]  # [u]
when = 2020-01-01 10:00:00
quotes = 'a#"' # "
[[corpus]]
name = "\\"w\\\\"
[[corpus]]
weight = 3
[corpus.sub]
z = +inf
[[corpus.parts]]
u = """\\
  [x]"""
[[corpus.parts]]
u = 2
'''


def paths(content, before=()):
    """Yield the paths of all keys and list entries in a value read by tomllib."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*before, key)
        yield from paths(value, (*before, key))


def test_every_key_and_every_entry_has_the_line_that_it_begins_on():
    lines = TomlLines(TEXT)
    expected = {
        ("a",): 2,
        ("b c", "d", 1): 3,
        ("b c", "d", 1, 1): 4,
        ("b c", "d", 2): 4,
        ("b c", "d", 3, "l"): 5,
        ("t",): 6,
        ("t", "when"): 7,
        ("t", "quotes"): 8,
        ("corpus",): 9,
        ("corpus", 0, "name"): 10,
        ("corpus", 1): 11,
        ("corpus", 1, "weight"): 12,
        ("corpus", 1, "sub", "z"): 14,
        ("corpus", 1, "parts", 0, "u"): 16,
        ("corpus", 1, "parts", 1): 18,
        ("corpus", 1, "parts", 1, "u"): 19,
    }
    assert {path: lines.of(path) for path in expected} == expected


def test_a_key_that_is_missing_has_the_line_of_its_table_or_none():
    lines = TomlLines(TEXT)
    assert lines.of(("corpus", 1, "nix")) == 11 and lines.of(("t", "nix", "nix")) == 6 and lines.of(("nix",)) is None
    assert lines.place("a.toml", ("t", "nix")) == "a.toml:6" and lines.place("a.toml", ("nix",)) == "a.toml"
    assert TomlLines("").of(("a",)) is None


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")) + sorted((ROOT / "cluster").rglob("*.toml")))
def test_the_keys_of_our_own_files_are_on_the_lines_that_name_them(file):
    text = file.read_text()
    for written in (text, tomli_w.dumps(tomllib.loads(text))):
        lines, rows = TomlLines(written), written.splitlines()
        for path in paths(tomllib.loads(written)):
            line = lines.of(path)
            assert line is not None and line >= lines.of(path[:1]), path
            if isinstance(path[-1], str):
                assert path[-1] in rows[line - 1], path
