"""Damaged indexed files: the damage is found on opening or on the first read, and named by file and byte."""

import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from distattn.data.files.block_digests import BLOCK_BYTES
from distattn.data.files.indexed_file import IndexedFile, IndexedFileWriter
from distattn.data.files.indexed_format import section_offsets
from distattn.ir.errors import DamagedDataError, DistattnError

VOCABULARY = 50_000
SUFFIXES = (".bin", ".idx", ".xxh3")
PAGE = 4096


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Write two files with the same number of tokens and of documents. Return their folder and the first file's
    documents.
    """
    folder = tmp_path_factory.mktemp("originals")
    rng = np.random.default_rng(3)
    # many documents, so that each section of the index spans several pages
    lengths = rng.permutation(np.concatenate([rng.integers(0, 60, 2998), [9000, 30_000]]))
    for name, order in (("file", lengths), ("other", lengths[::-1])):
        with IndexedFileWriter(str(folder / name), "uint16") as writer:
            writer.add_many(rng.integers(0, VOCABULARY, lengths.sum()), order)
    return folder, read_all(str(folder / "file"))


def read_all(prefix):
    """Open a file, read all lengths, and return all documents."""
    file = IndexedFile.open(prefix)
    lengths = file.document_lengths.tolist()
    return [file.read(number, 0, length, VOCABULARY) for number, length in enumerate(lengths)]


def flip(content, rng):
    at = int(rng.integers(len(content)))
    content[at] ^= 1 << int(rng.integers(8))


def zero_page(content, rng):
    at = int(rng.integers(-(-len(content) // PAGE))) * PAGE
    content[at : at + PAGE] = bytes(len(content[at : at + PAGE]))


def swap_pages(content, rng):
    pages = len(content) // PAGE
    first, second = (PAGE * int(page) for page in rng.choice(max(pages, 2), 2, replace=False))
    content[first : first + PAGE], content[second : second + PAGE] = (
        content[second : second + PAGE],
        content[first : first + PAGE],
    )


def cut(content, rng):
    del content[int(rng.integers(len(content))) :]


def lengthen(content, rng):
    content += rng.bytes(int(rng.integers(1, 100)))


def garble(content, rng):
    at = int(rng.integers(len(content)))
    end = min(at + int(rng.integers(1, 200)), len(content))
    content[at:end] = rng.bytes(end - at)


FAULTS = (flip, flip, flip, zero_page, swap_pages, cut, lengthen, garble)


def damaged_copies(originals, folder, faults, suffixes):
    """Yield copies of the first file with one fault each, as (fault, suffix, damaged content, prefix)."""
    rng = np.random.default_rng(11)
    source = originals[0]
    whole = {suffix: (source / f"file{suffix}").read_bytes() for suffix in suffixes}
    for suffix in suffixes:
        (folder / f"file{suffix}").write_bytes(whole[suffix])
    for number in range(faults):
        fault, suffix = FAULTS[number % len(FAULTS)], suffixes[number // len(FAULTS) % len(suffixes)]
        content = bytearray(whole[suffix])
        fault(content, rng)
        if content == whole[suffix]:
            continue
        (folder / f"file{suffix}").write_bytes(content)
        yield f"{number}: {fault.__name__} in {suffix}", suffix, content, str(folder / "file")
        (folder / f"file{suffix}").write_bytes(whole[suffix])


def test_no_fault_is_silent_where_there_are_digests(originals, tmp_path):
    refusals = 0
    for fault, _, _, prefix in damaged_copies(originals, tmp_path, 900, SUFFIXES):
        with pytest.raises(DamagedDataError) as refusal:
            read_all(prefix)
            pytest.fail(fault)
        message = str(refusal.value)
        # the message is one sentence with the file's name and the position of the fault
        assert str(tmp_path / "file.") in message and "\n" not in message, fault
        assert re.search(r"bytes? \d|a table of digests was altered", message), (fault, message)
        refusals += 1
    assert refusals >= 800


@pytest.mark.full
def test_without_digests_only_tokens_and_limits_of_documents_can_be_altered_unnoticed(originals, tmp_path):
    *_, ends, modes, _ = section_offsets(3000, 3001)
    whole = (originals[0] / "file.idx").read_bytes()
    silent = {".bin": 0, ".idx": 0}
    refusals = 0
    for fault, suffix, content, prefix in damaged_copies(originals, tmp_path, 640, (".bin", ".idx")):
        try:
            documents = read_all(prefix)
        except DamagedDataError as refusal:
            assert str(tmp_path / "file.") in str(refusal)
            refusals += 1
            continue
        silent[suffix] += 1
        if suffix == ".bin":
            # the fault goes unnoticed only if the file has the right size and every id is in the vocabulary
            assert len(content) == (originals[0] / "file.bin").stat().st_size, fault
            assert [len(document) for document in documents] == [len(document) for document in originals[1]]
        else:
            # altered lengths and pointers would contradict each other, so only document limits may differ, which must
            # still be in ascending order
            differing = [at for at in range(len(whole)) if whole[at] != content[at]]
            assert len(content) == len(whole) and ends <= min(differing) and max(differing) < modes, fault
            np.testing.assert_array_equal(np.concatenate(documents), np.concatenate(originals[1]))
    assert silent[".bin"] > 10 and refusals > 300


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_was_swapped_for_another_of_its_size_is_found(originals, tmp_path, suffix):
    for name in SUFFIXES:
        shutil.copy(originals[0] / f"{'other' if name == suffix else 'file'}{name}", tmp_path / f"file{name}")
    with pytest.raises(DamagedDataError, match=r"file\.(bin|idx): bytes 0 to 16,384 are not what was written"):
        read_all(str(tmp_path / "file"))


def test_a_stale_side_file_is_found(originals, tmp_path):
    for name, source in ((".bin", "other"), (".idx", "other"), (".xxh3", "file")):
        shutil.copy(originals[0] / f"{source}{name}", tmp_path / f"file{name}")
    with pytest.raises(DamagedDataError, match=r"digest in .*file\.xxh3"):
        IndexedFile.open(str(tmp_path / "file"))


def test_altered_tokens_are_found_when_they_are_read_and_not_before(originals, tmp_path):
    for name in SUFFIXES:
        shutil.copy(originals[0] / f"file{name}", tmp_path / f"file{name}")
    content = bytearray((tmp_path / "file.bin").read_bytes())
    content[3 * BLOCK_BYTES + 5] ^= 1
    (tmp_path / "file.bin").write_bytes(content)
    file = IndexedFile.open(str(tmp_path / "file"))
    with pytest.raises(DamagedDataError, match=rf"file\.bin: bytes {3 * BLOCK_BYTES:,} to {4 * BLOCK_BYTES:,} are not"):
        read_all(file.prefix)
    np.testing.assert_array_equal(file.read(0, 0, len(originals[1][0])), originals[1][0])
    # without the check the fault goes unnoticed
    unchecked = pickle.loads(pickle.dumps(IndexedFile.open(file.prefix, check_tokens=False)))
    read_documents = [unchecked.read(number, 0, len(document)) for number, document in enumerate(originals[1])]
    assert sum((here != there).sum() for here, there in zip(read_documents, originals[1], strict=True)) == 1


def test_a_file_that_is_cut_while_it_is_open_is_named(originals, tmp_path):
    for name in SUFFIXES:
        shutil.copy(originals[0] / f"file{name}", tmp_path / f"file{name}")
    for digests in (True, False):
        if not digests:
            (tmp_path / "file.xxh3").unlink()
        file = IndexedFile.open(str(tmp_path / "file"))
        whole = (tmp_path / "file.bin").read_bytes()
        (tmp_path / "file.bin").write_bytes(whole[:-10])
        last = len(file) - 1 - int(np.argmax(file.document_lengths[::-1] > 10))
        with pytest.raises(DamagedDataError, match=rf"file\.bin: byte {len(whole) - 10:,}: ends here"):
            [file.read(number, 0, int(file.document_lengths[number])) for number in range(last, len(file))]
        (tmp_path / "file.bin").write_bytes(whole)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", "float32"])
def test_ids_beyond_the_vocabulary_are_named_by_byte(tmp_path, dtype):
    documents = [[1, 2, 3], [4, 99, 100, 5]]
    if dtype != "uint16":
        documents.append([7, -1])
    if dtype == "float32":
        documents.append([7, float("nan")])
    with IndexedFileWriter(str(tmp_path / "file"), dtype) as writer:
        for document in documents:
            writer.add(np.array(document, dtype))
    file = IndexedFile.open(str(tmp_path / "file"))
    size = np.dtype(dtype).itemsize
    assert file.read(1, 0, 4, 101).tolist() == documents[1] and file.read(1, 0, 2, 100).tolist() == [4, 99]
    for number, at in ((1, 5), (2, 8), (3, 10))[: len(documents) - 1]:
        with pytest.raises(DamagedDataError, match=rf"file\.bin: byte {at * size}: token id .* is not below 100"):
            file.read(number, 0, len(documents[number]), 100)


def test_files_that_are_not_an_index_are_refused(tmp_path, originals):
    good = (originals[0] / "file.idx").read_bytes()
    shutil.copy(originals[0] / "file.bin", tmp_path / "file.bin")
    for content, why in (
        (b"", "byte 0: not an index"),
        (b"PK\x03\x04" * 100, "byte 0: not an index"),
        (good[:9] + b"\x02" + good[10:], "byte 9: version 2; only version 1"),
        (good[:17] + b"\x00" + good[18:], "byte 17: dtype code 0"),
        (good[:17] + b"\x04" + good[18:], r"byte 12,030: sequence 2,999 has \d+ tokens of 4 bytes"),
        (good[:18] + b"\xff" * 8 + good[26:], "sequences and 3,001 limits of documents take"),
        (good[:26] + bytes(8) + good[34:], "3,000 sequences and 0 limits of documents"),
        (good[:-1], r"byte 60,\d+: 60,\d+ bytes, but 3,000 sequences"),
    ):
        (tmp_path / "file.idx").write_bytes(content)
        with pytest.raises(DistattnError, match=why):
            IndexedFile.open(str(tmp_path / "file"))


def test_side_files_of_another_kind_are_refused(tmp_path, originals):
    for name in SUFFIXES:
        shutil.copy(originals[0] / f"file{name}", tmp_path / f"file{name}")
    good = Path(tmp_path / "file.xxh3").read_bytes()
    for content, why in (
        (b"", "has no block digests"),
        (b"something else" * 10, "has no block digests"),
        (good[:20] + b"\x01" + good[21:], "the header was altered"),
        (good[:-8], "cut or longer"),
        (good + bytes(8), "cut or longer"),
    ):
        (tmp_path / "file.xxh3").write_bytes(content)
        with pytest.raises(DamagedDataError, match=rf"file\.xxh3: byte [\d,]+: {why}"):
            IndexedFile.open(str(tmp_path / "file"))
