"""Text becomes packs: every byte appears exactly once, in an order that depends only on the seed."""

import contextlib
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import new_run

from distattn.data.files import text
from distattn.data.files.indexed_file import IndexedFileWriter
from distattn.data.files.text import Document, byte_corpus, check_text, find_corpus, read_tokens
from distattn.data.loader import PackLoader
from distattn.data.packing.pack_config import load_pack_config, make_configured_plan, open_corpora
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.launch.command_line import no_progress
from distattn.launch.start_run import start_run
from distattn.training.config.run_file import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ReferenceCheckConfig,
    RunConfig,
    TrainConfig,
)
from distattn.training.run_data import find_text, open_data, piece_rows, planned_packs, write_text
from distattn.training.run_folder import RunFolder


def test_an_epoch_tiles_every_file(tmp_path):
    rng = np.random.default_rng(0)
    contents = {}
    for i in range(30):
        file = tmp_path / "text" / f"{i % 4}" / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        # two bytes per character, because documents are cut by bytes
        file.write_text("é" * int(rng.integers(0, 400)) + str(i))
        contents[str(file)] = file.read_bytes()
    config = Config(
        run=RunConfig(folder=str(tmp_path / "run")),
        data=DataConfig(path=str(tmp_path / "text"), tokens_per_step=300, max_document_tokens=170),
        train=TrainConfig(steps=120),
    )
    text_ = find_text(config)
    run = RunFolder.create(config)
    write_text(run, config, text_)
    data = open_data(run, config)
    assert data.plan.sources[0].epochs > 1
    # the first epoch reads every document once, and its pieces joined in order are the contents of the files
    rows = [row for step in range(120) for row in piece_rows(data, step) if row["epoch"] == 0]
    assert sorted(row["document"] for row in rows) == list(range(len(text_.documents)))
    by_file = defaultdict(bytes)
    for row in sorted(rows, key=lambda row: row["document"]):
        assert row["start"] == 0 and not row["follows"]
        tokens = np.fromfile(row["file"], row["dtype"], row["length"], offset=row["byte"])
        by_file[text_.documents[row["document"]].file] += tokens.tobytes()
    assert by_file == contents


def test_steps_of_text_have_the_same_documents_whatever_the_number_of_shares(tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text("a" * int(rng.integers(1, 100)))
    data = DataConfig(path=str(tmp_path / "text"), tokens_per_step=400, context_length=100, max_document_tokens=80)
    rows_of_runs = []
    for number, (ranks, how, size) in enumerate(
        [(1, "replicated", 0), (2, "per_rank", 0), (4, "per_rank", 0), (8, "per_rank", 2)]
    ):
        parallel = ParallelConfig(ranks=ranks, data=how, context_parallel_size=size)
        config = Config(
            RunConfig(folder=str(tmp_path / f"{number}")), data, parallel=parallel, train=TrainConfig(steps=30)
        )
        run = new_run(config)
        opened = open_data(run, config)
        rows = [list(piece_rows(opened, step)) for step in range(30)]
        rows_of_runs.append([[{**row, "file": ""} for row in step] for step in rows])
        shares = config.parallel.data_parallel_size
        loaders = [PackLoader(opened.plan, opened.corpora, rank=share, size=shares) for share in range(shares)]
        assert {len(next(iter(loader))) for loader in loaders} == {4 // shares}
    assert rows_of_runs[1:] == rows_of_runs[:1] * 3 and max(row["pack"] for row in rows_of_runs[0][0]) == 3


def test_tokens_of_a_run_are_compared_with_their_digests_unless_it_says_otherwise(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 900)
    config = Config(
        RunConfig(folder=str(tmp_path / "run")), DataConfig(path=str(tmp_path / "a.txt")), train=TrainConfig(steps=1)
    )
    run = new_run(config)
    content = bytearray(Path(f"{run.corpus_prefix}.bin").read_bytes())
    content[100] ^= 1
    Path(f"{run.corpus_prefix}.bin").write_bytes(content)
    for check in (True, False):
        opened = open_data(run, replace(config, data=replace(config.data, check_tokens=check)))
        batch = next(iter(PackLoader(opened.plan, opened.corpora, rank=0, size=1)))[0]
        with (
            contextlib.nullcontext() if not check else pytest.raises(DamagedDataError, match="are not what was written")
        ):
            batch.read_tensors(np.arange(batch.tokens))


def test_a_run_on_a_plan_has_its_steps_and_its_vocabulary(tmp_path):
    for name, text_ in (("a", "x" * 900), ("b", "y" * 500)):
        (tmp_path / f"{name}.txt").write_text(text_)
        corpus = find_corpus(str(tmp_path / f"{name}.txt"), max_document_tokens=1000)
        byte_corpus(corpus, str(tmp_path / name))
    file = tmp_path / "packs.toml"
    lines = ['plan = "p"', "steps = 9", "[rule]", "context = [[0, 64]]", "tokens_per_step = 128"]
    for name in "ab":
        lines += ["[[corpus]]", f'name = "{name}"', f'files = ["{name}"]']
    file.write_text("\n".join(lines))
    planned = load_pack_config(file)
    config = Config(data=DataConfig(path=str(file)), train=TrainConfig(steps=9))
    run = RunFolder(tmp_path)
    with pytest.raises(DistattnError, match=r"p: there is no such plan yet; make it with distattn data pack"):
        open_data(run, config)
    make_configured_plan(planned, open_corpora(planned))
    with pytest.raises(DistattnError, match=r"vocab_size: not set, and .*a has no .json"):
        open_data(run, config)
    config = replace(config, model=ModelConfig(vocab_size=256))
    data = open_data(run, config)
    assert (data.vocabulary, data.context, data.plan.steps) == (256, 64, 9)
    with pytest.raises(DistattnError, match="train.steps: 10, but .*p has 9 steps; raise steps in"):
        open_data(run, replace(config, train=TrainConfig(steps=10)))
    with planned_packs(config) as plan:
        assert plan.digest == data.plan.digest
    three = ParallelConfig(ranks=3, data="per_rank", strategy="cad")
    with pytest.raises(DistattnError, match="step 0 has 2 packs, too few for 3 shares"):
        start_run(replace(config, parallel=three, run=RunConfig(folder=str(tmp_path / "out"))), no_progress)
    assert not (tmp_path / "out").exists()


def test_a_glob_a_file_a_suffix_and_exclusions(tmp_path):
    for name in ("a/x.py", "a/test/y.py", "a/z.txt", "b/w.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(path, **options):
        corpus = find_corpus(str(tmp_path / path), max_document_tokens=100, **options)
        return [str(Path(document.file).relative_to(tmp_path)) for document in corpus.documents]

    assert found("") == ["a/test/y.py", "a/x.py", "a/z.txt", "b/w.py"]
    assert found("", suffix=".py", exclude=["test"]) == ["a/x.py", "b/w.py"]
    assert found("**/*.py", exclude=["te*"]) == ["a/x.py", "b/w.py"]
    assert found("*/*.py") == ["a/x.py", "b/w.py"]
    assert found("b/w.py") == ["b/w.py"]


def test_binary_files_among_texts_are_skipped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("text, and é at the end of what is looked at" + "x" * 4095 + "é")
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    (tmp_path / "c.bin").write_bytes(b"PK\0\0")
    corpus = find_corpus(str(tmp_path), max_document_tokens=10**6)
    assert [Path(document.file).name for document in corpus.documents] == ["a.txt"]
    assert (corpus.files, corpus.binary_files) == (3, 2)
    # a file given by name is not skipped
    with pytest.raises(DamagedDataError, match="b.bin: not UTF-8 text"):
        check_text(find_corpus(str(tmp_path / "b.bin"), max_document_tokens=9))
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "x.txt").write_bytes(b"x" * 5000 + b"\xff")
    (tmp_path / "late" / "y.txt").write_text("y")
    with pytest.raises(DamagedDataError, match="x.txt: not UTF-8 text .byte 5000."):
        check_text(find_corpus(str(tmp_path / "late"), max_document_tokens=9))


def test_many_short_documents_are_refused_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 6_000_000)
    with pytest.raises(DistattnError, match="more than 5,000,000 documents"):
        find_corpus(str(tmp_path), max_document_tokens=1)


def test_exclusions_do_not_depend_on_other_files(tmp_path):
    (tmp_path / "test" / "a" / "test").mkdir(parents=True)
    (tmp_path / "test" / "a" / "test" / "y.py").write_text("y")
    for _ in range(2):
        corpus = None
        with contextlib.suppress(DistattnError):
            corpus = find_corpus(str(tmp_path / "test" / "a" / "**" / "*.py"), exclude=["test"], max_document_tokens=9)
        # exclude applies only to what the wildcards matched, not to the folders above
        assert corpus is None or [Path(document.file).name for document in corpus.documents] == ["ok.py"]
        (tmp_path / "test" / "a" / "ok.py").write_text("x")


def test_a_name_with_brackets_is_itself(tmp_path):
    for name in ("a[1]", "a1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    (document,) = find_corpus(str(tmp_path / "a[1]"), max_document_tokens=9).documents
    assert Path(document.file).parent.name == "a[1]"


def test_links_are_followed_once_and_broken_ones_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x.txt").write_text("x")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to("../real")
    (tmp_path / "data" / "loop").symlink_to("../data")
    corpus = find_corpus(str(tmp_path / "data"), max_document_tokens=9)
    assert [Path(document.file).name for document in corpus.documents] == ["x.txt"]
    (tmp_path / "data" / "broken.txt").symlink_to("nowhere")
    with pytest.raises(DistattnError, match="broken.txt cannot be read"):
        find_corpus(str(tmp_path / "data"), max_document_tokens=9)


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DistattnError, match="pipe.txt is not a regular file"):
        find_corpus(str(tmp_path), max_document_tokens=9)


def test_the_demo_reads_the_standard_library_without_its_tests():
    corpus = find_corpus(
        "{stdlib}", suffix=".py", exclude=["test", "tests", "idle_test", "site-packages"], max_document_tokens=3000
    )
    names = {document.file for document in corpus.documents}
    assert any(name.endswith("json/decoder.py") for name in names) and not any("/test/" in name for name in names)
    assert sum(document.end - document.start for document in corpus.documents) > 8e6


def test_missing_empty_and_broken_text_is_refused_by_name(tmp_path):
    with pytest.raises(DistattnError, match="there is no file or folder"):
        find_corpus(str(tmp_path / "nowhere"), max_document_tokens=10)
    with pytest.raises(DistattnError, match="holds no files"):
        find_corpus(str(tmp_path), max_document_tokens=10)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DistattnError, match="holds no text"):
        find_corpus(str(tmp_path), max_document_tokens=10)
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin1"))
    with pytest.raises(DamagedDataError, match=r"latin.txt: not UTF-8 text \(byte 2\)"):
        check_text(find_corpus(str(tmp_path), max_document_tokens=10))


@pytest.mark.parametrize("part", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("aé€😀b".encode() * 3, None),
        ("aé".encode() + b"\xff" + b"b" * 9, 3),
        ("aé".encode() + "😀".encode()[:3], 3),
        ("€€".encode() + b"\xe2\x28\xa1", 6),
        ("ab€".encode() + b"\x80", 5),
    ],
)
def test_text_is_checked_part_by_part_with_the_byte_that_is_wrong(tmp_path, monkeypatch, part, content, wrong):
    monkeypatch.setattr(text, "_PART_BYTES", part)
    (tmp_path / "a.txt").write_bytes(content)
    corpus = find_corpus(str(tmp_path), max_document_tokens=4)
    if wrong is None:
        check_text(corpus)
    else:
        with pytest.raises(UnicodeDecodeError) as error:
            content.decode()
        assert error.value.start == wrong
        with pytest.raises(DamagedDataError, match=rf"a.txt: not UTF-8 text \(byte {wrong}\)"):
            check_text(corpus)


def test_looking_for_documents_reads_no_file_and_a_rank_reads_only_what_it_needs(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("abcdefghij")

    def opened(*arguments, **options):
        raise AssertionError("a file is opened")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", opened)
        patch.setattr("os.open", opened)
        documents = find_corpus(str(tmp_path), max_document_tokens=4).documents
    assert [(document.start, document.end) for document in documents] == [(0, 4), (4, 8), (8, 10)]
    taken = []
    real = Path(documents[0].file).open

    class Watched:
        def __init__(self, *arguments):
            self.file = real("rb")

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def seek(self, place):
            return self.file.seek(place)

        def read(self, size):
            taken.append((self.file.tell(), size))
            return self.file.read(size)

    monkeypatch.setattr(text, "open", Watched, raising=False)
    assert bytes(read_tokens(documents[1]).astype(np.uint8)) == b"efgh" and taken == [(4, 4)]


def test_a_file_that_changed_while_the_run_began_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    corpus = find_corpus(str(tmp_path), max_document_tokens=10)
    (tmp_path / "a.txt").write_text("abcd")
    with pytest.raises(DamagedDataError, match="a.txt: had 3 bytes, now 4"):
        check_text(corpus)


def test_a_file_that_shrank_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(DamagedDataError, match="shorter than when the run began"):
        read_tokens(Document(str(tmp_path / "a.txt"), 0, 9))
    with pytest.raises(DamagedDataError, match="was readable when the run began"):
        read_tokens(Document(str(tmp_path / "gone.txt"), 0, 9))


def test_masks_and_the_reference_check_do_not_go_together(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 900)
    corpus = byte_corpus(find_corpus(str(tmp_path / "a.txt"), max_document_tokens=300), str(tmp_path / "a"))
    with IndexedFileWriter(str(tmp_path / "a.loss"), np.uint8) as masks:
        for length in corpus.lengths:
            masks.add(np.arange(length) > 100)
    file = tmp_path / "packs.toml"
    rule = "[rule]\ncontext = [[0, 300]]\ntokens_per_step = 300\n"
    file.write_text(f'plan = "p"\nsteps = 3\n{rule}[[corpus]]\nname = "a"\nfiles = ["a"]\n')
    planned = load_pack_config(file)
    make_configured_plan(planned, open_corpora(planned))
    data, model, train = DataConfig(path=str(file)), ModelConfig(vocab_size=256), TrainConfig(steps=3)
    with pytest.raises(
        DistattnError, match="reference_check.steps: 5, but the check cannot apply masks, and corpus a has some"
    ):
        open_data(RunFolder(tmp_path), Config(data=data, model=model, train=train))
    unchecked = Config(data=data, model=model, train=train, reference_check=ReferenceCheckConfig(steps=0))
    assert open_data(RunFolder(tmp_path), unchecked).vocabulary == 256
