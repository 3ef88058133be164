"""A block with a digest is read in full and checked once per process. After that, only the requested bytes are read."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distattn.data.files.block_digests import BLOCK_BYTES, CheckedBlocks
from distattn.data.files.indexed_file import IndexedFile, IndexedFileWriter
from distattn.ir.errors import DamagedDataError

# uint16 tokens in blocks of 8,192: nine full blocks and a partial block
TOKENS = 9 * BLOCK_BYTES // 2 + 777


@pytest.fixture
def prefix(tmp_path):
    with IndexedFileWriter(str(tmp_path / "file"), "uint16") as writer:
        writer.add(np.arange(TOKENS) % 50_000)
    return str(tmp_path / "file")


def flip(prefix, byte):
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[byte] ^= 16
    # change the file in place, because it is open
    with open(f"{prefix}.bin", "r+b") as file:
        file.write(content)


@pytest.fixture
def bytes_read(monkeypatch):
    """Return a list that collects the sizes of all reads of token files."""
    sizes, preadv = [], os.preadv

    def noted(file, buffers, offset):
        sizes.append(sum(map(len, buffers)))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", noted)
    return sizes


def test_a_block_is_read_whole_once(prefix, bytes_read):
    file, whole = IndexedFile.open(prefix), np.arange(TOKENS) % 50_000
    wanted = [
        # (first token, number of tokens, bytes read)
        (100, 50, BLOCK_BYTES),
        (100, 50, 100),
        (8000, 192, 384),
        # from a checked block into an unchecked block
        (8000, 300, 384 + BLOCK_BYTES),
        (8000, 300, 600),
        # into the last block, which is a partial block
        (TOKENS - 800, 800, BLOCK_BYTES + 2 * 777),
        (TOKENS - 800, 800, 1600),
        # an unchecked block between checked blocks, which are not read in full again
        (3 * 8192, 1, BLOCK_BYTES),
        (2 * 8192 - 5, 8192 + 10, 10 + BLOCK_BYTES + 10),
        (0, 0, None),
    ]
    for start, count, size in wanted:
        bytes_read.clear()
        np.testing.assert_array_equal(file.read(0, start, count), whole[start : start + count])
        assert bytes_read == ([] if size is None else [size])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, TOKENS - 1), st.integers(1, 40_000)), min_size=1, max_size=12),
    st.integers(0, 2 * TOKENS - 1),
)
def test_damage_is_found_when_its_block_is_first_read_whatever_was_read_before(prefix, reads, byte):
    whole = np.arange(TOKENS) % 50_000
    flip(prefix, byte)
    try:
        file, block = IndexedFile.open(prefix), byte // BLOCK_BYTES
        for start, count in reads:
            count = min(count, TOKENS - start)
            first, last = 2 * start // BLOCK_BYTES, (2 * (start + count) - 1) // BLOCK_BYTES
            if first <= block <= last:
                with pytest.raises(
                    DamagedDataError, match=f"file.bin: bytes {block * BLOCK_BYTES:,} to .* are not what"
                ):
                    file.read(0, start, count)
            else:
                np.testing.assert_array_equal(file.read(0, start, count), whole[start : start + count])
    finally:
        flip(prefix, byte)


def test_a_bit_that_flips_after_its_block_was_checked_is_found_by_the_next_process(prefix):
    file = IndexedFile.open(prefix)
    file.read(0, 10, 1)
    flip(prefix, 20)
    assert file.read(0, 10, 1) == 10 ^ 16
    with pytest.raises(DamagedDataError, match="file.bin: bytes 0 to 16,384 are not what was written"):
        IndexedFile.open(prefix).read(0, 10, 1)


def test_checked_blocks_are_what_was_added():
    checked, wanted, rng = CheckedBlocks(BLOCK_BYTES * 100 + 1), set(), np.random.default_rng(0)
    for _ in range(30):
        first, last = sorted(rng.integers(0, 102, 2).tolist())
        assert checked.first_missing(first, last) == min({*range(first, last)} - wanted, default=last)
        checked.add(first, last)
        wanted |= {*range(first, last)}
        assert [block in checked for block in range(101)] == [block in wanted for block in range(101)]
