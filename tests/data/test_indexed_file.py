"""Indexed files: Megatron-core reads ours, we read Megatron's, and only the requested bytes are read."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distattn.data.files.block_digests import BLOCK_BYTES, root_digest
from distattn.data.files.corpus import Corpus
from distattn.data.files.indexed_file import IndexedFile, IndexedFileWriter
from distattn.data.files.indexed_format import DTYPES
from distattn.ir.errors import DistattnError

DTYPE_NAMES = [dtype.name for dtype in DTYPES.values()]
LENGTHS = [7, 0, 1, 4000, 33, 0, 0, 12_000, 5]


def documents_of(dtype, lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 120, length).astype(dtype) for length in lengths]


def write(prefix, documents, dtype):
    with IndexedFileWriter(str(prefix), dtype) as writer:
        for document in documents:
            writer.add(document)
    return IndexedFile.open(str(prefix))


def assert_holds(file, documents):
    assert len(file) == len(documents)
    np.testing.assert_array_equal(file.document_lengths, [len(document) for document in documents])
    for number, document in enumerate(documents):
        tokens = file.read(number, 0, len(document))
        assert tokens.dtype == document.dtype
        np.testing.assert_array_equal(tokens, document)


def megatron():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_megatron_reads_what_we_write(tmp_path, dtype):
    indexed_dataset = megatron()
    documents = documents_of(dtype)
    write(tmp_path / "ours", documents, dtype)
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / "ours"))
    assert theirs.index.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(theirs.document_indices, np.arange(len(documents) + 1))
    for number, document in enumerate(documents):
        np.testing.assert_array_equal(theirs[number], document)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("modes", [False, True], ids=["text", "modes"])
def test_we_read_what_megatron_writes_with_several_sequences_or_none_in_a_document(tmp_path, dtype, modes):
    indexed_dataset = megatron()
    import torch

    documents = documents_of(dtype)
    builder = indexed_dataset.IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), np.dtype(dtype).type, multimodal=modes
    )
    given_modes = []
    for number, document in enumerate(documents):
        # zero, one or three sequences; one of the three is empty
        parts = [len(document) // 3, 0, len(document) - len(document) // 3] if number % 2 else [len(document)]
        parts = [] if not len(document) and number % 3 else parts
        mode = [number % 5] * len(parts)
        given_modes += mode
        builder.add_document(torch.from_numpy(document.astype(np.float64)), parts, mode if modes else None)
    builder.finalize(str(tmp_path / "theirs.idx"))
    file = IndexedFile.open(str(tmp_path / "theirs.idx"))
    assert file.digests is None
    assert_holds(file, documents)
    assert (file.modes is not None) == modes
    if modes:
        np.testing.assert_array_equal(file.modes, given_modes)
    long = LENGTHS.index(12_000)
    np.testing.assert_array_equal(file.read(long, 3990, 30), documents[long][3990:4020])


def test_our_files_are_megatrons_to_the_byte(tmp_path):
    indexed_dataset = megatron()
    import torch

    documents = documents_of("uint16")
    write(tmp_path / "ours", documents, "uint16")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), np.uint16)
    for document in documents:
        builder.add_document(torch.from_numpy(document.astype(np.int32)), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@given(st.lists(st.integers(0, 30_000), max_size=8), st.sampled_from(DTYPE_NAMES), st.data())
def test_any_part_of_any_document_is_read_back(tmp_path_factory, lengths, dtype, data):
    documents = documents_of(dtype, lengths)
    file = write(tmp_path_factory.mktemp("any") / "file", documents, dtype)
    assert_holds(file, documents)
    assert file.tokens == sum(lengths)
    for number, document in enumerate(documents):
        start = data.draw(st.integers(0, len(document)))
        count = data.draw(st.integers(0, len(document) - start))
        np.testing.assert_array_equal(file.read(number, start, count), document[start : start + count])


def test_many_documents_at_once_and_another_files_are_those_one_by_one(tmp_path):
    documents = documents_of("int32")
    one_by_one = write(tmp_path / "one", documents, "int32")
    with IndexedFileWriter(str(tmp_path / "many"), "int32") as writer:
        writer.add_many(np.concatenate(documents[:4]), [len(document) for document in documents[:4]])
        writer.add_many([], [])
        writer.add_many(np.concatenate(documents[4:]).astype(np.int64), [len(document) for document in documents[4:]])
    with IndexedFileWriter(str(tmp_path / "copy"), "int32") as writer:
        writer.append(one_by_one)
    for suffix in (".bin", ".idx", ".xxh3"):
        expected = (tmp_path / f"one{suffix}").read_bytes()
        assert (tmp_path / f"many{suffix}").read_bytes() == expected
        assert (tmp_path / f"copy{suffix}").read_bytes() == expected


def test_opening_and_reading_touch_only_what_they_need(tmp_path, monkeypatch):
    file = write(tmp_path / "file", documents_of("uint16", [50_000] * 40), "uint16")
    wanted = []
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
        wanted.append((offset, sum(map(len, buffers))))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    again = IndexedFile.open(file.prefix)
    assert not wanted
    again.read(17, 20_000, 100)
    # one block, or two if the tokens cross a block boundary
    (offset, size), begin = wanted[0], 2 * (17 * 50_000 + 20_000)
    assert len(wanted) == 1 and offset % BLOCK_BYTES == 0
    assert offset <= begin and begin + 200 <= offset + size and size <= 2 * BLOCK_BYTES
    os.unlink(f"{file.prefix}.xxh3")
    wanted.clear()
    IndexedFile.open(file.prefix).read(17, 20_000, 100)
    assert wanted == [(begin, 200)]


def test_a_file_travels_to_another_process_by_its_name(tmp_path):
    documents = documents_of("uint8")
    file = write(tmp_path / "file", documents, "uint8")
    assert len(pickle.dumps(file)) < 1000
    assert_holds(pickle.loads(pickle.dumps(file)), documents)


def test_nothing_is_left_of_a_file_that_failed(tmp_path):
    class Unexpected(Exception):
        pass

    with pytest.raises(Unexpected), IndexedFileWriter(str(tmp_path / "file"), "uint16") as writer:
        writer.add(np.arange(5))
        raise Unexpected
    assert not list(tmp_path.iterdir())


def test_writers_refuse_what_they_cannot_hold(tmp_path):
    prefix = str(tmp_path / "file")
    with pytest.raises(DistattnError, match="has no complex128; it has uint8, int8"):
        IndexedFileWriter(prefix, "complex128")
    for tokens, lengths, why in (
        ([1, 70_000], [2], "token 70000 cannot be stored as uint16"),
        ([1, -1], [1, 1], "token -1 cannot be stored as uint16"),
        ([1.5], [1], "token 1.5 cannot be stored"),
        ([1, 2], [1], "are not documents of 1 tokens together"),
        ([1, 2], [3, -1], "are not documents of 2 tokens"),
    ):
        with pytest.raises(DistattnError, match=why), IndexedFileWriter(prefix, "uint16") as writer:
            writer.add_many(tokens, lengths)
    with pytest.raises(DistattnError, match="cannot be written"), IndexedFileWriter(f"{prefix}/no", "uint16"):
        pass
    assert not list(tmp_path.iterdir())
    write(prefix, documents_of("uint16"), "uint16")
    with pytest.raises(DistattnError, match=r"file\.bin: exists already"):
        IndexedFileWriter(prefix, "uint16")
    with (
        pytest.raises(DistattnError, match="has uint16 tokens, .*other has int32"),
        IndexedFileWriter(str(tmp_path / "other"), "int32") as writer,
    ):
        writer.append(IndexedFile.open(prefix))


def test_readers_refuse_what_is_not_there(tmp_path):
    with pytest.raises(DistattnError, match="nothing.idx: cannot be read: No such file"):
        IndexedFile.open(str(tmp_path / "nothing"))
    file = write(tmp_path / "file", documents_of("uint16"), "uint16")
    for document, start, count in ((9, 0, 1), (-1, 0, 1), (0, 0, 8), (0, -1, 1), (0, 7, 1), (0, 0, -1), (1, 0, 1)):
        with pytest.raises(DistattnError, match="there is no document|has [07] tokens, not"):
            file.read(document, start, count)
    os.unlink(f"{file.prefix}.bin")
    with pytest.raises(DistattnError, match=r"file\.bin: cannot be read: No such file .*; .*file\.idx is there"):
        IndexedFile.open(file.prefix)


def test_a_corpus_is_the_documents_of_its_files_in_order(tmp_path):
    parts = [documents_of("uint16", lengths, seed) for seed, lengths in enumerate(([3, 0], [], [5, 20_000, 1]))]
    paths = [write(tmp_path / str(number), part, "uint16").prefix for number, part in enumerate(parts)]
    corpus = Corpus.open("web", paths)
    documents = sum(parts, [])
    assert (corpus.name, corpus.documents, corpus.tokens) == ("web", 5, 20_009)
    assert corpus.lengths.dtype == np.int32 and corpus.lengths.tolist() == [3, 0, 5, 20_000, 1]
    for number, document in enumerate(documents):
        np.testing.assert_array_equal(corpus.read(number, 0, len(document)), document)
    assert corpus.file_of(2)[0].prefix == paths[2] and corpus.file_of(2)[1] == 0
    for document in (-1, 5):
        with pytest.raises(DistattnError, match="corpus 'web': there is no document"):
            corpus.read(document, 0, 0)
    with pytest.raises(DistattnError, match="corpus 'none': no tokens in no files"):
        Corpus.open("none", [])


def test_lengths_of_one_file_are_mapped(tmp_path):
    file = write(tmp_path / "file", documents_of("uint16"), "uint16")
    corpus = Corpus.open("one", [file.prefix])
    assert corpus.lengths.tolist() == LENGTHS and corpus.lengths.base is not None
    assert corpus.lengths is corpus.files[0].sequence_lengths


def test_the_digest_of_a_corpus_is_of_what_is_in_it(tmp_path):
    first = write(tmp_path / "first", documents_of("uint16"), "uint16")
    (tmp_path / "elsewhere").mkdir()
    same = write(tmp_path / "elsewhere" / "renamed", documents_of("uint16"), "uint16")
    tokens = write(tmp_path / "tokens", documents_of("uint16", seed=1), "uint16")
    lengths = write(tmp_path / "lengths", documents_of("uint16", LENGTHS[::-1]), "uint16")
    digests = {file.prefix: Corpus.open("any", [file.prefix]).digest for file in (first, same, tokens, lengths)}
    assert digests[first.prefix] == digests[same.prefix] and len(set(digests.values())) == 3
    orders = [
        Corpus.open("any", order).digest for order in ([first.prefix, tokens.prefix], [tokens.prefix, first.prefix])
    ]
    assert orders[0] != orders[1]
    # without side files the tokens are not covered by digests, but the indices are
    for file in (first, tokens, lengths):
        os.unlink(f"{file.prefix}.xxh3")
    bare = [Corpus.open("any", [file.prefix]).digest for file in (first, tokens, lengths)]
    assert bare[0] == bare[1] != bare[2]


def test_the_root_of_a_file_is_the_side_files(tmp_path):
    file = write(tmp_path / "file", documents_of("uint16", [100_000]), "uint16")
    assert root_digest(f"{file.prefix}.bin") == file.digests.bin_root
    assert root_digest(f"{file.prefix}.idx") == file.digests.idx_root
    file.digests.check_roots()
    assert Path(f"{file.prefix}.xxh3").stat().st_size == 56 + 8 * (-(-200_000 // BLOCK_BYTES) + 1)
