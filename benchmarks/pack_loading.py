"""The cost of loading packs of a plan: starting in the middle, reading runs of tokens, and bytes read per byte used.

    python benchmarks/pack_loading.py [--documents 1000000] [--folder DIR]

Two corpora of random uint16 tokens are written and planned first: many short documents (lengths of a long-context
corpus as in benchmarks/pack_planning.py, divided by 16) in packs of 8K, and 20,000 documents of the full lengths in
packs of 128K. Files are in the page cache, so our code is measured, not a disk. "Digests" are the digest files that our
writer makes for blocks; they are checked whenever tokens are read. Files without digests are like those that Megatron
writes.

"open and seek" is the time that a process needs, after imports, to get the batches of a step in the middle with all
their lengths. "first tokens" is the time to read its rank's tokens (CP 8, zigzag) in the first batch. Both are measured
once in a fresh process and as the median of ten more. "bytes" are the bytes copied, or read by the system, for all 8
ranks, over the bytes of the tokens that they use. Each rank opens the files itself, as a process does. With digests,
the first read of a block reads and checks the whole block, later reads only the requested bytes: "again" is a second
pass over the same 64 packs. Every read is compared with numpy's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pack_planning import draw
from process_guard import guard_processes

from distattn.data.files.corpus import Corpus
from distattn.data.files.indexed_file import IndexedFileWriter
from distattn.data.loader import PackLoader
from distattn.data.packing.make_pack_plan import make_pack_plan
from distattn.data.packing.pack_plan import PackPlan
from distattn.data.packing.pack_rule import PackRule
from distattn.data.planned_batch import PlannedBatch
from distattn.ir.layout import Layout

RANKS, RUN = 8, 8192
PART_TOKENS = 1 << 24


def main() -> None:
    """Write and plan both corpora, and print one table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--long-documents", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="where the files lie meanwhile; by default a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name, documents, divisor, context, packs in (
            ("short", arguments.documents, 16, 8192, 64),
            ("long", arguments.long_documents, 1, 131_072, 8),
        ):
            tokens = write(Path(folder, name), documents, divisor)
            print_line(f"{name}: {documents:,} documents, {tokens:,} tokens, packs of {context:,}, {packs} a step")
            for digests in (True, False):
                if not digests:
                    Path(folder, f"{name}.xxh3").unlink()
                corpus = Corpus.open(name, [f"{folder}/{name}"])
                rule = PackRule(((0, context),), packs * context, window=1024)
                make_pack_plan(f"{folder}/{name}.packs", [corpus], seed=0, rule=rule, max_epochs=[1.0]).close()
                print_line(f"  {'with' if digests else 'without'} digests")
                process = multiprocessing.get_context("spawn").Process(target=measure, args=(folder, name))
                process.start()
                process.join()
                if process.exitcode:
                    sys.exit("a measurement failed")


def measure(folder: str, name: str) -> None:
    """Measure one corpus, and print the results."""
    path, prefix = f"{folder}/{name}.packs", f"{folder}/{name}"

    def open_and_seek(step: int) -> PlannedBatch:
        return PackLoader(path, [Corpus.open(name, [prefix])], rank=0, size=4, start_step=step, steps=1).batches(step)[
            0
        ]

    def first_tokens(batch: PlannedBatch) -> None:
        batch.read(Layout.zigzag(batch.lengths, RANKS).tokens(0))

    with PackPlan.open(path) as plan:
        middle = plan.steps // 2
    taken = []
    for step in range(middle, middle + 11):
        began = time.perf_counter()
        batch = open_and_seek(step)
        taken.append((time.perf_counter() - began, timed(lambda batch=batch: first_tokens(batch))))  # type: ignore[misc]
    for suffix, seconds in zip(("open and seek", "first tokens"), zip(*taken, strict=True), strict=True):
        line(
            suffix, f"{seconds[0] * 1e3:.1f} ms in a fresh process, then {statistics.median(seconds[1:]) * 1e3:.1f} ms"
        )
    corpus = Corpus.open(name, [prefix])
    loader = PackLoader(path, [corpus], rank=0, size=1)
    lengths = statistics.median(timed(lambda step=step: loader.lengths(step)) for step in range(10))  # type: ignore[misc]
    batches = [batch for step in range(8) for batch in loader.batches(step)][:64]
    pieces = sum(len(batch.lengths) for batch in batches)
    labels = timed(lambda: sum(batch.valid_labels for batch in batches))
    line("lengths of a step", f"{lengths * 1e3:.2f} ms")
    line("counting labels", f"{labels / pieces * 1e6:.2f} us a document")
    line("documents a pack", f"{pieces / len(batches):.0f}")
    whole = np.memmap(f"{prefix}.bin", np.uint16, "r")
    corpora = [Corpus.open(name, [prefix]) for _ in range(RANKS)]
    # reading the counter is itself counted: subtract it
    looking = -(characters_read() - characters_read())
    for suffix in ("", ", again"):
        used = copied = by_system = 0
        busy = 0.0
        for batch in batches:
            layout = Layout.zigzag(batch.lengths, RANKS)
            axis = np.concatenate([whole[first : first + count] for first, count in places(corpus, batch._pack.rows)])
            for rank, of_rank in enumerate(corpora):
                tokens, mine = layout.tokens(rank), PlannedBatch(batch._pack, [of_rank], "")
                before = characters_read()
                read: list[np.ndarray] = []
                busy += timed(lambda mine=mine, tokens=tokens, read=read: read.extend(mine.read(tokens)))  # type: ignore[misc]
                by_system += characters_read() - before - looking
                assert (read[0] == axis[tokens]).all(), "other tokens than numpy reads"
                used += 2 * len(tokens)
                copied += mine.bytes_read
        line(f"CP {RANKS} zigzag{suffix}", f"{used / 2 / busy / 1e6:.0f} million tokens/s")
        line(f"bytes copied over bytes used{suffix}", f"{copied / used:.4f}")
        line(f"bytes read by the system over them{suffix}", f"{by_system / used:.4f}")
    # long runs within one document: the cost that does not depend on the number of documents
    longest = max(batches, key=lambda batch: max(batch.lengths))
    begin = int(np.cumsum([0, *longest.lengths])[int(np.argmax(longest.lengths))])
    runs = [np.arange(at, at + RUN) for at in range(begin, begin + max(longest.lengths) - RUN + 1, RUN)] or [
        np.arange(begin, begin + max(longest.lengths))
    ]
    once = statistics.median(timed(lambda: [longest.read(run) for run in runs]) for _ in range(20))
    line(f"runs of {len(runs[0]):,}", f"{len(runs) * len(runs[0]) / once / 1e6:.0f} million tokens/s")
    plain = statistics.median(
        timed(lambda: [whole[run[0] : run[0] + len(run) + 1].astype(np.int64) for run in runs]) for _ in range(20)
    )
    line("the same by numpy, mapped, ids only", f"{len(runs) * len(runs[0]) / plain / 1e6:.0f} million tokens/s")


def places(corpus: Corpus, rows: np.ndarray) -> list[tuple[int, int]]:
    """Return (first token in the file, number of tokens) of each piece."""
    firsts = corpus.files[0].pointers[rows["document"]] // 2 + rows["start"]
    return list(zip(firsts.tolist(), rows["length"].tolist(), strict=True))


def write(prefix: Path, documents: int, divisor: int) -> int:
    """Write a corpus of random tokens. Return the number of tokens."""
    rng = np.random.default_rng(0)
    draw(f"{prefix}.lengths", documents, None)
    lengths = np.fromfile(f"{prefix}.lengths", np.int32) // divisor
    ends = np.cumsum(lengths, dtype=np.int64)
    with IndexedFileWriter(str(prefix), "uint16") as writer:
        parts = np.unique(np.searchsorted(ends, np.arange(0, int(ends[-1]) + PART_TOKENS, PART_TOKENS)))
        for begin, end in zip(parts, np.append(parts[1:], documents), strict=True):
            part = lengths[begin:end]
            writer.add_many(rng.integers(0, 50_000, int(part.sum()), np.uint16), part)
    return int(ends[-1])


def characters_read() -> int:
    """Return the bytes that this process has read so far, including reads from the page cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


def timed(work: Callable[[], object]) -> float:
    """Call `work` and return the seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def line(label: str, value: str) -> None:
    """Print one line of the table."""
    print_line(f"    {label:44s} {value}")


def print_line(text: str) -> None:
    """Print a line and flush stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    guard_processes()
    main()
