"""The cost of reading documents: with and without block digests, and with Megatron's reader.

    python benchmarks/indexed_reading.py [--megabytes 400] [--documents 20000] [--repeats 5]

Whole documents of log-normal lengths (uint16) are read in random order. "warm": from the page cache. "cold": from this
machine's disk, each time after asking the operating system to drop the file's pages. Times are microseconds per
document.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import Cell, Unsupported, compare, table

from distattn.data.files.block_digests import BLOCK_BYTES
from distattn.data.files.indexed_file import IndexedFile, IndexedFileWriter


def main() -> None:
    """Print one table with a warm and a cold case for short and for long documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    cells: list[Cell] = []
    # use the current folder, because /tmp may be in memory
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for name, mean in (("short", 7.2), ("long", 11.2)):
            prefix = str(Path(folder) / name)
            lengths = make(prefix, mean, arguments.megabytes * 500_000)
            asked = np.random.default_rng(1).permutation(len(lengths))[: arguments.documents].tolist()
            for cold in (False, True):
                cells += case(prefix, asked, lengths.tolist(), cold, arguments.repeats)
    sys.stdout.write(table(cells, {"us": lambda value: f"{value:.2f} us"}) + "\n")


def case(prefix: str, asked: list[int], sizes: list[int], cold: bool, repeats: int) -> list[Cell]:
    """Measure all readers on the same documents. Return their cells."""
    contestants: dict[str, Callable[[], Callable[[], int]]] = {
        "with digests": lambda: ours(prefix, asked, sizes, cold, True),
        "without digests": lambda: ours(prefix, asked, sizes, cold, False),
        "Megatron's reader": lambda: megatron(prefix, asked, cold),
    }
    tokens = sum(sizes[document] for document in asked)
    size = f"{len(asked):,} documents of {2 * tokens / len(asked):,.0f} bytes, blocks of {BLOCK_BYTES:,}"
    cells = compare(
        f"{'cold' if cold else 'warm'}, {size}",
        contestants,
        lambda count: "" if count == tokens else f"{count:,} tokens",
        repeats=repeats,
    )
    for cell in cells:
        cell.facts["us"] = 1e6 * (cell.median or 0) / len(asked)
    return cells


def make(prefix: str, mean: float, tokens: int) -> np.ndarray:
    """Write documents with about `tokens` tokens in total. Return their lengths."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(mean, 1.2, 1 << 20), 1, 1 << 20).astype(np.int64)
    lengths = lengths[: max(1, int(np.searchsorted(np.cumsum(lengths), tokens)))]
    with IndexedFileWriter(prefix, "uint16") as writer:
        for part in np.array_split(lengths, max(1, len(lengths) // 1000)):
            writer.add_many(rng.integers(0, 50_000, part.sum(), dtype=np.uint16), part)
    return lengths


def ours(prefix: str, asked: list[int], sizes: list[int], cold: bool, digests: bool) -> Callable[[], int]:
    """Return a function that reads with our reader, opened anew each time, and returns the number of tokens."""

    def run() -> int:
        file = IndexedFile.open(prefix, check_tokens=digests)
        drop(prefix, cold)
        return sum(len(file.read(document, 0, sizes[document])) for document in asked)

    return run


def megatron(prefix: str, asked: list[int], cold: bool) -> Callable[[], int]:
    """Return a function that reads with Megatron's IndexedDataset and returns the number of tokens.

    IndexedDataset returns views of a memory map. They are copied, because our reader returns copies, too.
    """
    try:
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    except ModuleNotFoundError as error:
        raise Unsupported(f"{error.name} is not installed") from None

    def run() -> int:
        drop(prefix, cold)
        file = IndexedDataset(prefix)
        return sum(len(file[document].copy()) for document in asked)

    return run


def drop(prefix: str, cold: bool) -> None:
    """Drop the token file's pages from the page cache if `cold`."""
    if cold:
        descriptor = os.open(f"{prefix}.bin", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
