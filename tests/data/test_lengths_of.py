"""Lengths of some documents are read without the rest of the index, and match those of the whole file."""

import numpy as np
import pytest
from planned_data import write_corpus

from distattn.data.files.corpus import Corpus
from distattn.data.files.indexed_file import IndexedFile
from distattn.data.files.indexed_format import HEADER, MAGIC, VERSION
from distattn.ir.errors import DamagedDataError, DistattnError


def write_sequences(prefix, documents):
    """Write a uint8 indexed file whose documents have zero or more sequences."""
    lengths = np.array([length for document in documents for length in document], "<i4")
    limits = np.cumsum([0, *map(len, documents)]).astype("<i8")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths).astype("<i8")
    header = HEADER.pack(MAGIC, VERSION, 1, len(lengths), len(limits))
    (prefix.parent / f"{prefix.name}.idx").write_bytes(
        header + lengths.tobytes() + pointers.tobytes() + limits.tobytes()
    )
    (prefix.parent / f"{prefix.name}.bin").write_bytes(bytes(int(lengths.sum())))
    return IndexedFile.open(str(prefix))


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 0, 0, 3], []])
def test_documents_of_one_several_or_no_sequences(tmp_path, order):
    file = write_sequences(tmp_path / "a", [[5], [1, 0, 7], [], [3], [0], [2, 2]])
    assert file.document_lengths.tolist() == [5, 8, 0, 3, 0, 4]
    np.testing.assert_array_equal(file.lengths_of(np.array(order, np.int64)), file.document_lengths[order])


def test_documents_of_several_files(tmp_path):
    rng = np.random.default_rng(2)
    lengths = [rng.integers(0, 30, count).tolist() for count in (700, 1, 900)]
    plain = write_corpus(tmp_path, "web", lengths)
    corpus = Corpus.open("web", [file.prefix for file in plain.files])
    some = rng.integers(0, corpus.documents, 500)
    np.testing.assert_array_equal(corpus.lengths_of(some), np.concatenate(lengths)[some])
    with pytest.raises(DistattnError, match=r"web-2.idx: there is no document 900; it has 900"):
        corpus.lengths_of(np.array([0, 1601]))


@pytest.mark.parametrize("digests", [True, False])
def test_an_altered_entry_is_refused_when_it_is_read(tmp_path, digests):
    corpus = write_corpus(tmp_path, "web", [[9] * 8000])
    index = bytearray((tmp_path / "web-0.idx").read_bytes())
    # flip the top bit of the length of document 6000
    index[HEADER.size + 4 * 6000 + 3] ^= 0x80
    (tmp_path / "web-0.idx").write_bytes(index)
    if not digests:
        (tmp_path / "web-0.xxh3").unlink()
    file = IndexedFile.open(corpus.files[0].prefix)
    assert file.lengths_of(np.array([0, 1, 3])).tolist() == [9, 9, 9]
    with pytest.raises(DamagedDataError, match=r"web-0.idx: byte"):
        file.lengths_of(np.array([3, 6000]))
