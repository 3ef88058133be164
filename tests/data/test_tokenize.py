"""distattn data tokenize writes every document once and in order, for any files, number of processes and tokenizer."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distattn.data.files.indexed_file import IndexedFile
from distattn.data.files.manifest import Manifest
from distattn.data.tokenizing import document_sources
from distattn.data.tokenizing.tokenize import (
    Progress,
    TokenizeJob,
    finished_parts,
    locked,
    plan_job,
    publish,
    tokenize_shard,
)
from distattn.data.tokenizing.tokenizer import load_tokenizer, token_dtype
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.launch import cli

ROOT = Path(__file__).parents[2]
TEXTS = ["one", "", "zwölf Boxkämpfer", 'a "quoted" line\nand another', "𝄞 clef \u2028 separator", "x" * 5000, "last"]
SUFFIXES = (".bin", ".idx", ".xxh3", ".json")


def write_jsonl(file, texts, field="text"):
    # with and without escapes, and with blank lines, which are not documents
    lines = [json.dumps({"id": i, field: text}, ensure_ascii=bool(i % 2)) for i, text in enumerate(texts)]
    file.write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n", "utf-8")
    return file


def tokenize_here(job):
    """Tokenize in this process. Return the documents as bytes."""
    with locked(job):
        tokenizer = load_tokenizer(job.tokenizer, job.eos)
        for shard in range(len(job.shards)):
            tokenize_shard(job, tokenizer, shard, lambda progress: None)
        manifest = publish(job, finished_parts(job))
    file = IndexedFile.open(job.prefix)
    assert (manifest.documents, manifest.tokens) == (file.documents, file.tokens)
    return [file.read(number, 0, int(length)).tobytes() for number, length in enumerate(file.document_lengths)]


def train_tokenizer(folder):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    # these would truncate and pad documents if the job did not switch them off
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")

    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    content = plain.read_bytes()
    with gzip.open(tmp_path / "b.json.gz", "wb") as file:
        file.write(content)
    # several frames, split within lines, without a newline at the end
    frames = [content[:37], content[37:1000], content[1000:-1]]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(zstandard.ZstdCompressor().compress(frame) for frame in frames))
    table = pyarrow.table({"n": range(len(TEXTS)), "text": TEXTS})
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=2)
    (tmp_path / "e").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "e" / f"{number}.txt").write_text(text, "utf-8")
    expected = [text.encode() for text in TEXTS]
    for name in ("a.jsonl", "b.json.gz", "c.jsonl.zst", "d.parquet", "e"):
        job = plan_job(str(tmp_path / f"out-{name}"), [str(tmp_path / name)], "bytes")
        assert tokenize_here(job) == expected, name
    # all files at once, in the order in which they are given
    job = plan_job(str(tmp_path / "out"), [str(tmp_path / name) for name in ("d.parquet", "a.jsonl", "e")], "bytes")
    assert tokenize_here(job) == expected * 3
    manifest = Manifest.load(job.prefix)
    assert [Path(source["file"]).name for source in manifest.sources][:3] == ["d.parquet", "a.jsonl", "0.txt"]
    assert [source["documents"] for source in manifest.sources] == [len(TEXTS)] * 2 + [1] * len(TEXTS)
    assert manifest.text_bytes == manifest.tokens == 3 * sum(map(len, expected))


@pytest.mark.full
@pytest.mark.parametrize("size", [1, 7, 60, 1000])
def test_shards_cut_lines_and_row_groups_nowhere(tmp_path, monkeypatch, size):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    monkeypatch.setattr(document_sources, "_shard_bytes", lambda sources: size)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "b.parquet", row_group_size=1)
    job = plan_job(str(tmp_path / "out"), [str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")], "bytes")
    assert len(job.shards) > 1
    assert tokenize_here(job) == [text.encode() for text in TEXTS] * 2


def test_a_tokenizer_file_gives_the_librarys_own_ids(tmp_path):
    tokenizer = train_tokenizer(tmp_path / "tokenizer")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = [*TEXTS, "text with <|end|> in it"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    for eos, end in ((None, []), ("<|end|>", [0]), ("7", [7])):
        job = plan_job(str(tmp_path / f"out{eos}"), [str(source)], str(tmp_path / "tokenizer"), eos=eos)
        documents = [np.frombuffer(document, np.uint16).tolist() for document in tokenize_here(job)]
        expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        # a document without text becomes a document without tokens
        assert documents == [ids + end if ids else [] for ids in expected]
        assert 0 in documents[-1]
    manifest = Manifest.load(job.prefix)
    assert (manifest.vocabulary, manifest.eos) == (tokenizer.get_vocab_size(), 7)


def test_dtypes_are_the_narrowest_that_hold_every_id():
    dtypes = {size: token_dtype(size).name for size in (1, 256, 257, 65_536, 65_537, 200_000)}
    assert dtypes == {1: "uint8", 256: "uint8", 257: "uint16", 65_536: "uint16", 65_537: "int32", 200_000: "int32"}


def run(*arguments, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "distattn.launch.cli", "data", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **more)


def contents(prefix):
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES}


def test_the_number_of_processes_changes_nothing_and_a_finished_command_does_nothing(tmp_path):
    for number in range(5):
        write_jsonl(tmp_path / f"{number}.jsonl", [f"{number} {i} " + text for i, text in enumerate(TEXTS * 200)])
    by_processes = {}
    for processes in (1, 3):
        arguments = [
            "tokenize",
            tmp_path,
            "--suffix",
            ".jsonl",
            "--out",
            tmp_path / f"out{processes}",
            "--tokenizer",
            "bytes",
        ]
        done = run(*arguments, "--processes", processes, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["documents"] == 5 * 200 * len(TEXTS)
        by_processes[processes] = contents(tmp_path / f"out{processes}")
        assert not Path(f"{tmp_path}/out{processes}.parts").exists()
    assert by_processes[1] == by_processes[3]
    again = run(*arguments)
    assert again.returncode == 0 and "there was nothing to do" in again.stdout
    other = run(*arguments, "--eos", "0")
    assert (
        other.returncode == 2 and "out3.json: exists already, made of other files or by another command" in other.stderr
    )
    assert contents(tmp_path / "out3") == by_processes[3] and not Path(f"{tmp_path}/out3.parts").exists()
    right = run("verify", tmp_path / "out1", tmp_path / "out3")
    assert right.returncode == 0 and right.stdout.count("right") == 2, right.stdout


def test_torch_is_not_imported_by_what_tokenizes():
    modules = "distattn.data.tokenizing.tokenize_worker, distattn.launch.data.tokenize"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_parts_of_another_command_are_taken_where_they_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(document_sources, "_shard_bytes", lambda sources: 1)
    files = [str(tmp_path / f"{name}.txt") for name in "abc"]
    for file in files:
        Path(file).write_text(file)

    def planned(files, **options):
        return plan_job(str(tmp_path / "out"), files, "bytes", **options)

    first = planned(files[1:])
    with locked(first):
        for shard in (0, 1):
            tokenize_shard(first, load_tokenizer("bytes"), shard, lambda progress: None)
    assert set(finished_parts(planned(files))) == {1, 2}
    for changed in (dict(eos="0"), dict(field="id")):
        assert not finished_parts(planned(files, **changed))
    os.utime(files[1], ns=(1, 1))
    assert set(finished_parts(planned(files))) == {2}
    assert tokenize_here(planned(files)) == [file.encode() for file in files]


def test_progress_adds_up_to_the_whole(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS * 700)
    (tmp_path / "b.txt").write_text("text")
    job = plan_job(str(tmp_path / "out"), [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")], "bytes")
    told = []
    with locked(job):
        for shard in range(len(job.shards)):
            tokenize_shard(job, load_tokenizer("bytes"), shard, told.append)
    total = Progress()
    for progress in told:
        total = total.plus(progress)
    text = 700 * sum(len(text.encode()) for text in TEXTS) + 4
    assert total == (sum(source.bytes for source in job.sources), 700 * len(TEXTS) + 1, text, text)
    assert len(told) > 3


def test_a_job_is_saved_whole(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    job = plan_job(str(tmp_path / "out"), [str(tmp_path / "a.jsonl")], "bytes", eos="3")
    with locked(job):
        assert TokenizeJob.load(job.save()) == job


# ---- refusals


def bad_files():
    """Return (name, content, error message) for each bad file."""
    line = b'{"text": "fine", "id": 1}\n'
    return [
        (
            "a.jsonl",
            line * 16 + b'{"body": 1, "id": 2}\n',
            r"a\.jsonl:17: no field 'text'; its fields are body, id: name one",
        ),
        ("a.jsonl", line + b"\n" + b"[1]\n", r"a\.jsonl:3: not an object with a field 'text', but a list"),
        ("a.jsonl", line + b'{"text": 7}\n', r"a\.jsonl:2: field 'text' is a number, not text"),
        ("a.jsonl", line + b'{"text": null}\n', r"a\.jsonl:2: field 'text' is null"),
        ("a.jsonl", line + b'{"text": "cut', r"a\.jsonl:2: not JSON: .* \(column 10\)"),
        ("a.jsonl", line + b'{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8 text \(byte 10 of the line\)"),
        ("a.jsonl", line + b'{"text": "\\ud800"}\n', r"a\.jsonl:2: field 'text' has half of a surrogate pair"),
        ("a.jsonl", line + b'{"n": ' + b"[" * 100_000, r"a\.jsonl:2: not JSON that can be read"),
        ("a.jsonl", b"", "there is no text in 1 files, such as .*a.jsonl"),
        ("a.jsonl", b'{"text": ""}\n', "there is no text in 1 files"),
        ("a.txt", b"fine \xe9", r"a\.txt: not UTF-8 text \(byte 5\)"),
        ("a.jsonl.gz", gzip.compress(line * 100, mtime=0)[:-20], r"a\.jsonl\.gz: cut or damaged after line \d+"),
        ("a.jsonl.gz", line, r"a\.jsonl\.gz: cut or damaged after line 0: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(line + b"{}", mtime=0), r"a\.jsonl\.gz:2: no field 'text'; its fields are (none)"),
        ("a.jsonl.gz", b"", r"a\.jsonl\.gz: is empty, so not a compressed file"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: not a Parquet file, or damaged"),
        ("a.parquet", b"", r"a\.parquet: not a Parquet file, or damaged"),
        ("a.xyz", line, r"a\.xyz: unknown suffix '.xyz'; known are .*\.jsonl\.zst.*--suffix \.xyz"),
    ]


@pytest.mark.parametrize(("name", "content", "why"), bad_files())
def test_bad_files_are_named_with_the_place(tmp_path, name, content, why):
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DistattnError, match=why) as refusal:
        tokenize_here(plan_job(str(tmp_path / "out"), [str(tmp_path / name)], "bytes"))
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("out.b*")) and not list(tmp_path.glob("out.parts/*.tmp"))


def test_bad_zstandard_files_are_named_with_the_place(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    file = tmp_path / "a.jsonl.zst"
    content = b"".join(json.dumps({"text": f"{i} {os.urandom(40).hex()}"}).encode() + b"\n" for i in range(4000))
    whole = zstandard.ZstdCompressor().compress(content)
    altered = bytearray(whole)
    altered[len(whole) // 2] ^= 255
    checked = zstandard.ZstdCompressor(write_checksum=True).compress(content)
    for bad, why in (
        (whole[: len(whole) // 2], r"cut after line \d+, in the middle of a frame"),
        (whole[:-1], r"cut after line \d+, in the middle"),
        (whole + whole[:100], "cut after line 4000, in the middle"),
        (checked[:-1] + bytes([checked[-1] ^ 1]), r"damaged after line \d+"),
        (content, "damaged after line 0"),
        (b"", "is empty, so not a compressed file"),
    ):
        file.write_bytes(bad)
        with pytest.raises(DamagedDataError, match=rf"a\.jsonl\.zst: {why}"):
            tokenize_here(plan_job(str(tmp_path / "out"), [str(file)], "bytes"))


def test_bad_tables_are_named_with_the_row(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    file = tmp_path / "a.parquet"
    not_text = pyarrow.array([b"a", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    for columns, why in (
        ({"body": ["a"], "n": [1]}, "no column 'text'; it has body, n"),
        ({"text": [1, 2]}, "column 'text' holds int64, not text"),
        ({"text": ["a", "b", "c", None]}, "row 3: column 'text' is null"),
        ({"text": not_text}, "row 1: column 'text' is not UTF-8 text"),
    ):
        parquet.write_table(pyarrow.table(columns), file, row_group_size=2)
        with pytest.raises(DamagedDataError, match=rf"a\.parquet: {why}"):
            tokenize_here(plan_job(str(tmp_path / "out"), [str(file)], "bytes"))
    parquet.write_table(pyarrow.table({"text": ["some text " * 9] * 5000}), file, compression="gzip")
    content = bytearray(file.read_bytes())
    content[40:80] = bytes(40)
    file.write_bytes(content)
    with pytest.raises(DamagedDataError, match=r"a\.parquet: row \d+ cannot be read"):
        tokenize_here(plan_job(str(tmp_path / "out"), [str(file)], "bytes"))


def test_files_that_are_named_twice_or_change_are_refused(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "link.jsonl").symlink_to(file)
    for paths in ([file, file], [tmp_path], [file, tmp_path / "*.jsonl"]):
        with pytest.raises(DistattnError, match="again; its documents would be in the data twice"):
            plan_job(str(tmp_path / "out"), [str(path) for path in paths], "bytes")
    job = plan_job(str(tmp_path / "out"), [str(file)], "bytes")
    write_jsonl(file, TEXTS * 2)
    with pytest.raises(DamagedDataError, match=r"a\.jsonl: changed since the command began"):
        tokenize_here(job)
    file.unlink()
    with pytest.raises(DamagedDataError, match=r"a\.jsonl: existed when the command began"):
        tokenize_here(job)


def test_impossible_commands_are_refused_in_a_sentence(tmp_path, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "no.json").write_text("{}")
    train_tokenizer(tmp_path / "tokenizer")
    fine = {"paths": [file], "--out": tmp_path / "out", "--tokenizer": "bytes"}
    for changed, why in (
        ({"paths": []}, "data tokenize: the following arguments are required: paths"),
        ({"paths": [tmp_path / "none"]}, "tokenize: there is no file or folder"),
        ({"--out": tmp_path / "no" / "out"}, "there is no folder .*no; make it"),
        ({"--out": f"{tmp_path}/"}, "there is no folder"),
        ({"--out": tmp_path / "out.idx"}, "give it without the suffix; .*out.bin and .idx are written"),
        (
            {"--tokenizer": tmp_path / "nothing"},
            "nothing cannot be read: No such file or directory; name a tokenizer.json",
        ),
        ({"--tokenizer": tmp_path / "no.json"}, "no.json is not a tokenizer of Hugging Face"),
        ({"--eos": "<|end|>"}, "tokenizer bytes: '<|end|>' is not one of its tokens; .* a number below 256"),
        ({"--eos": "256"}, "a number below 256"),
        ({"--tokenizer": tmp_path / "tokenizer", "--eos": "<eos>"}, "'<eos>' is not one of its tokens"),
        ({"--processes": "0"}, "--processes: at least 1, not 0"),
        ({"--field": ""}, "no field ''"),
        ({"--suffix": ".c"}, "holds no files ending in '.c'"),
    ):
        arguments = {**fine, **changed}
        paths = arguments.pop("paths")
        code = cli.main(
            ["data", "tokenize", *map(str, paths), *(str(word) for pair in arguments.items() for word in pair)]
        )
        captured = capsys.readouterr()
        assert code in (2, 3), captured
        message = captured.err.replace("|", "")
        assert len(message.splitlines()) == 1
        assert re.search(why.replace("|", ""), message), (why, message)
        assert not list(tmp_path.glob("out.b*"))
