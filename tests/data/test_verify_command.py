"""distattn data verify accepts correct files, and names the first fault of a damaged file."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from planned_data import small_plan, write_corpus

from distattn.data import extra_packages
from distattn.data.files import indexed_file
from distattn.data.files.block_digests import BLOCK_BYTES, BlockDigests
from distattn.data.files.corpus import Corpus
from distattn.data.files.indexed_file import IndexedFile, IndexedFileWriter
from distattn.data.loader import PackLoader
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.launch import cli


@pytest.fixture
def prefix(tmp_path):
    prefix = str(
        tmp_path / "a folder with a name that is longer than a terminal is wide, and [brackets] in it" / "file"
    )
    Path(prefix).parent.mkdir()
    rng = np.random.default_rng(0)
    with IndexedFileWriter(prefix, "uint16") as writer:
        for length in (5, 0, 70_000, 12_345):
            writer.add(rng.integers(0, 1000, length))
    return prefix


def verify(capsys, *arguments):
    code = cli.main(["data", "verify", *map(str, arguments)])
    return code, capsys.readouterr()


def alter(file, at, value):
    content = bytearray(Path(file).read_bytes())
    content[at] = value
    Path(file).write_bytes(content)


def test_correct_files_are_accepted(prefix, capsys):
    code, shown = verify(capsys, prefix, "--vocabulary", "1000")
    assert code == 0
    row = shown.out.splitlines()[1]
    assert row.split()[:8] == [
        "right",
        "4",
        "82,350",
        "164.7",
        "kB",
        "uint16",
        "1,000",
        "yes",
    ] and row.rstrip().endswith(prefix)
    Path(f"{prefix}.xxh3").unlink()
    code, shown = verify(capsys, f"{prefix}.idx")
    assert code == 0 and "not known" in shown.out and "none" in shown.out


def test_digests_are_written_where_there_are_none(prefix, capsys, monkeypatch):
    """Write digests for files made by Megatron's tools. Opening a corpus then reads only headers, and changes are
    noticed.
    """
    expected = Path(f"{prefix}.xxh3").read_bytes()
    plain = Corpus.open("web", [prefix]).digest
    os.unlink(f"{prefix}.xxh3")
    bare = Corpus.open("web", [prefix]).digest
    code, shown = verify(capsys, prefix, "--write-digests")
    assert code == 0 and " yes " in shown.out.splitlines()[1]
    assert Path(f"{prefix}.xxh3").read_bytes() == expected
    assert not list(Path(prefix).parent.glob("*.tmp"))
    # neither the index nor the tokens are read in full
    monkeypatch.setattr(indexed_file, "root_digest", lambda file: pytest.fail(f"{file} is read whole"))
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("tokens are read"))
    checked = []
    check = BlockDigests.check
    monkeypatch.setattr(BlockDigests, "check", lambda self, *rest: (checked.append(len(rest[3])), check(self, *rest)))
    corpus = Corpus.open("web", [prefix])
    assert corpus.digest == plain != bare and corpus.has_digest(plain) and sum(checked) <= 2 * BLOCK_BYTES
    # a plan made before the digests existed also belongs to these files
    assert corpus.has_digest(bare) and not corpus.has_digest("0" * 32)
    monkeypatch.undo()
    alter(f"{prefix}.bin", 100_000, Path(f"{prefix}.bin").read_bytes()[100_000] ^ 1)
    with pytest.raises(DamagedDataError, match="are not what was written"):
        Corpus.open("web", [prefix]).read(2, 0, 70_000)
    alter(f"{prefix}.idx", 40, Path(f"{prefix}.idx").read_bytes()[40] ^ 1)
    with pytest.raises(DamagedDataError, match="are not what was written"):
        Corpus.open("web", [prefix])


def test_digests_of_files_that_are_wrong_or_in_the_way_are_not_written(prefix, capsys):
    os.unlink(f"{prefix}.xxh3")
    code, _ = verify(capsys, prefix, "--write-digests", "--vocabulary", "10")
    assert code == 1 and not list(Path(prefix).parent.glob("*.xxh3*"))
    Path(f"{prefix}.xxh3.tmp").mkdir()
    code, shown = verify(capsys, prefix, "--write-digests")
    assert code == 2 and "file.xxh3: cannot be written: Is a directory" in shown.err


def test_a_plan_made_before_digests_were_written_is_read_on(tmp_path, capsys):
    corpus = write_corpus(tmp_path, "web", [[30, 200, 7] * 9, [64, 1, 90] * 9])
    for file in corpus.files:
        os.unlink(f"{file.prefix}.xxh3")
    prefixes = [file.prefix for file in corpus.files]
    plan = small_plan(tmp_path, [Corpus.open("web", prefixes)], context=256)
    assert verify(capsys, *prefixes, "--write-digests")[0] == 0
    again = Corpus.open("web", prefixes)
    assert all(file.digests for file in again.files)
    assert PackLoader(plan.path, [again], rank=0, size=1).batches(0)


def test_faults_are_named_and_end_with_exit_code_1(prefix, tmp_path, capsys):
    with IndexedFileWriter(str(tmp_path / "right"), "int32") as writer:
        writer.add([1, 2, 3])
    alter(f"{prefix}.bin", 100_000, 7)
    code, shown = verify(capsys, prefix, tmp_path / "right")
    assert code == 1
    assert [line.split()[0] for line in shown.out.splitlines()[1:3]] == ["wrong", "right"]
    assert shown.out.splitlines()[3].startswith(f"{prefix}.bin: bytes 98,304 to 114,688 are not what was written")
    code, shown = verify(capsys, prefix, tmp_path / "right", "--json")
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert code == 1 and "98,304" in rows[0]["fault"] and rows[1]["fault"] is None and rows[1]["tokens"] == 3


def test_tables_of_digests_manifests_and_ids_are_checked(prefix, capsys):
    table = Path(f"{prefix}.xxh3").read_bytes()
    alter(f"{prefix}.xxh3", len(table) - 20, table[-20] ^ 1)
    code, shown = verify(capsys, prefix)
    assert code == 1 and "a table of digests was altered" in shown.out
    Path(f"{prefix}.xxh3").write_bytes(table)
    largest = max(int(part.max()) for part in IndexedFile.open(prefix).iterate_tokens())
    code, shown = verify(capsys, prefix, "--vocabulary", largest)
    assert code == 1 and f"token id {largest} is not below {largest}" in shown.out
    for manifest, why in (
        ("{}", "was not written by distattn data tokenize"),
        ("[]", "was not written by distattn data tokenize"),
        ("{", "cannot be read: it is not JSON"),
    ):
        Path(f"{prefix}.json").write_text(manifest)
        code, shown = verify(capsys, prefix)
        assert code == 1 and f"file.json: {why}" in shown.out


def test_a_manifest_of_another_file_is_found(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("text" * (1 + len(name) + ord(name)))
        command = ["data", "tokenize", tmp_path / f"{name}.txt", "--out", tmp_path / name, "--tokenizer", "bytes"]
        assert cli.main(list(map(str, command))) == 0
    capsys.readouterr()
    (tmp_path / "b.json").rename(tmp_path / "a.json")
    code, shown = verify(capsys, tmp_path / "a")
    assert code == 1 and "a.json: 400 tokens, but" in shown.out and "a.idx has 396" in shown.out


def test_what_cannot_be_verified_is_refused(tmp_path, capsys):
    for arguments, why in (
        ([], "usage: distattn data verify"),
        ([tmp_path / "nothing"], "nothing.idx: cannot be read: No such file or directory; name the prefix"),
        ([tmp_path / "nothing", "--vocabulary", "0"], "--vocabulary: at least 1, not 0"),
        (["--json"], "the following arguments are required: prefixes"),
    ):
        code, shown = verify(capsys, *arguments)
        assert code == 2 and why in shown.out + shown.err
    assert cli.main(["data", "vrfy"]) == 2
    assert (
        "data: there is no command 'vrfy'; there are tokenize, verify, pack, stats and show" in capsys.readouterr().err
    )


def test_packages_that_are_missing_are_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DistattnError, match=r"needs pyarrow: pip install 'distattn\[data\]'"):
        extra_packages.import_extra("pyarrow", "reading a.parquet")


@pytest.fixture
def packs(tmp_path, prefix):
    """Write a TOML file and its plan: a little more than one epoch of one corpus."""
    (tmp_path / "packs.toml").write_text(
        f"""
plan = "run.packs"
[rule]
context = [[0, 4096]]
tokens_per_step = 16384
[[corpus]]
name = "web"
files = ["{Path(prefix).parent.name}/file"]
max_epochs = 1.5
"""
    )
    assert cli.main(["data", "pack", str(tmp_path / "packs.toml")]) == 0
    return tmp_path / "packs.toml"


def test_a_correct_plan_is_accepted(packs, prefix, capsys):
    capsys.readouterr()
    code, shown = verify(capsys, packs, prefix)
    lines = shown.out.splitlines()
    assert code == 0 and lines[1].startswith("right")
    assert lines[2].startswith(f"right {packs}: {packs.parent / 'run.packs'}, ") and "digest" in lines[2]
    assert lines[3].startswith("  web: 1 whole epoch, every token of every document once in each, and ")
    code, shown = verify(capsys, packs, "--json")
    (row,) = map(json.loads, shown.out.splitlines())
    assert code == 0 and row["config"] == str(packs) and row["fault"] is None and row["coverage"][0]["epochs"] == 1


def test_a_plan_that_is_damaged_or_of_other_files_is_not(packs, prefix, capsys):
    content = (packs.parent / "run.packs").read_bytes()
    alter(packs.parent / "run.packs", 70, content[70] ^ 1)
    capsys.readouterr()
    code, shown = verify(capsys, packs)
    assert code == 1 and shown.out.splitlines()[0] == f"wrong {packs}"
    assert "run.packs: " in shown.out and "are not what was written (byte 64)" in shown.out
    code, shown = verify(capsys, packs, "--json")
    assert code == 1 and "byte 64" in json.loads(shown.out)["fault"]
    (packs.parent / "run.packs").write_bytes(content)
    for suffix in (".bin", ".idx", ".xxh3"):
        Path(prefix + suffix).unlink()
    with IndexedFileWriter(prefix, "uint16") as writer:
        writer.add([1, 2, 3])
    code, shown = verify(capsys, packs)
    assert code == 2 and "have changed since" in shown.err
    (packs.parent / "run.packs").unlink()
    code, shown = verify(capsys, packs)
    assert code == 2 and "there is no such plan yet" in shown.err
