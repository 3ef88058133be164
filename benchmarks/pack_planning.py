"""The cost of planning packs and how full packs are, compared with concatenation and first-fit, each in a process on one core.

    python benchmarks/pack_planning.py [--documents 1000000] [--lengths FILE.json] [--context 131072] [--packs 32]

Lengths are drawn with replacement from the file, a JSON list, and each is changed by up to 5 %, so that there are about
as many different lengths as in a large corpus. Without a file they are drawn from quantiles of a long-context corpus of
web pages, books and code (ProLong: 575 to 340,149 tokens, median 1,914), with logarithms interpolated between them.

"seconds" is wall-clock time; "CPU s" excludes the time that other programs take. "peak GB" is the process's peak
memory, including the lengths (4 bytes per document, mapped). "utilisation" counts existing packs only, since the last
step may have fewer. "cuts" is the number of pieces minus that of documents. "work max/mean" is, per step, the largest
attention work of a pack (sum of squared lengths) over the mean, averaged over all steps. A contestant that loses or
repeats tokens or overfills a pack is rejected. First-fit takes quadratic time and is left out above 50,000 documents.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from process_guard import guard_processes

from distattn.data.packing.make_pack_plan import make_pack_plan
from distattn.data.packing.pack_plan import PackPlan
from distattn.data.packing.pack_rule import PackRule
from distattn.data.packing.permutation import permuted

QUANTILES = (0, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 1)
LENGTHS = (575, 678, 919, 1914, 6051, 16_270, 47_397, 239_610, 340_149)
MOST_FIRST_FIT = 50_000
# documents drawn at a time
PART = 1 << 22


@dataclass(frozen=True)
class Corpus:
    """A corpus that consists only of document lengths, in an int32 file."""

    path: str
    name: str = "documents"
    digest: str = ""

    @property
    def lengths(self) -> np.ndarray:
        return np.memmap(self.path, np.int32, "r")


class Row(NamedTuple):
    """The measurements of one contestant."""

    seconds: float
    cpu_seconds: float
    peak_gb: float
    utilisation: float
    cuts: int
    most_documents: int
    work: float


# for each step: the lengths of all packs' pieces in order, and for each pack the index at which its pieces end
Steps = Iterator[tuple[np.ndarray, np.ndarray]]


def main() -> None:
    """Measure all contestants and print one table per context length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--context", type=int, nargs="+", default=[131_072, 32_768])
    parser.add_argument("--packs", type=int, default=32, help="packs of a step")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-documents", type=int, help="of a pack, in the plans")
    parser.add_argument("--max-cost", type=float, help="of a pack, in the plans")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    arguments = parser.parse_args()
    caps = {"max_documents": arguments.max_documents, "max_cost": arguments.max_cost, "window": arguments.window}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "lengths.int32")
        tokens = draw(path, arguments.documents, arguments.lengths)
        print_line(
            f"{arguments.documents:,} documents, {tokens:,} tokens, drawn from {arguments.lengths or 'quantiles'}"
        )
        for context in arguments.context:
            print_line(f"\n{arguments.packs} packs of {context:,} tokens a step")
            print_line(
                f"{'':20s} seconds    CPU s  us/document  peak GB  utilisation     cuts  documents/pack  work max/mean"
            )
            for name in arguments.only:
                if name == "first-fit" and arguments.documents > MOST_FIRST_FIT:
                    print_line(f"{name:20s} left out: quadratic, {MOST_FIRST_FIT:,} documents at most")
                    continue
                row = in_a_process(name, path, context, arguments.packs, caps)
                each = row.cpu_seconds / arguments.documents * 1e6
                print_line(
                    f"{name:20s} {row.seconds:7.1f} {row.cpu_seconds:8.1f} {each:12.2f} {row.peak_gb:8.2f} "
                    f"{row.utilisation:12.4%} {row.cuts:8,d} {row.most_documents:15,d} {row.work:14.2f}"
                )


def in_a_process(*arguments: object) -> Row:
    """Run one contestant in a separate process, to measure its peak memory."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(send, *arguments))
    process.start()
    send.close()
    try:
        row: Row = receive.recv()
    finally:
        process.join()
    return row


def measure(send: object, name: str, path: str, context: int, packs: int, caps: dict[str, object]) -> None:
    """Run a contestant, check that it places every token once and overfills no pack, and send its measurements."""
    corpus = Corpus(path)
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        began, cpu_began = time.perf_counter(), time.process_time()
        steps = CONTESTANTS[name](corpus, context, packs, caps, str(Path(folder) / "plan"))
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        pieces = tokens = room = most = 0
        works = []
        for lengths, ends in steps():
            begins = np.concatenate([[0], ends[:-1]])
            lengths = lengths.astype(np.int64)
            assert np.add.reduceat(lengths, begins).max() <= context, "a pack is overfull"
            work = np.add.reduceat(lengths**2, begins)
            works.append(work.max() / work.mean())
            pieces, tokens = pieces + len(lengths), tokens + int(lengths.sum())
            room, most = room + len(ends) * context, max(most, int((ends - begins).max()))
    assert tokens == corpus.lengths.sum(dtype=np.int64), "tokens are lost or repeated"
    send.send(Row(seconds, cpu_seconds, peak, tokens / room, pieces - len(corpus.lengths), most, float(np.mean(works))))  # type: ignore[attr-defined]


def plan(
    corpus: Corpus, context: int, packs: int, caps: dict[str, object], path: str, level: bool = False
) -> Callable[[], Steps]:
    """Make our plan and write it to a file. Return a function that yields its steps."""
    rule = PackRule(context=((0, context),), tokens_per_step=packs * context, level=level, **caps)  # type: ignore[arg-type]
    pack_plan: PackPlan = make_pack_plan(path, [corpus], seed=0, rule=rule, max_epochs=[1.0])

    def steps() -> Steps:
        for number in range(pack_plan.steps):
            step = pack_plan.step(number)
            yield step.rows["length"], step.ends

    return steps


def level_plan(*arguments: object) -> Callable[[], Steps]:
    """Make our plan with nearly equal work in all packs of each step. Return a function that yields its steps."""
    return plan(*arguments, level=True)  # type: ignore[arg-type]


def concatenated(corpus: Corpus, context: int, packs: int, caps: dict[str, object], path: str) -> Callable[[], Steps]:
    """Concatenate shuffled documents and cut them at every pack's end. Return a function that yields the steps."""
    lengths = corpus.lengths[permuted(np.arange(len(corpus.lengths)), len(corpus.lengths), 0)]
    ends = np.cumsum(lengths, dtype=np.int64)
    bounds = np.union1d(ends, np.arange(context, ends[-1], context))

    def steps() -> Steps:
        for first in range(0, int(ends[-1]), packs * context):
            begin, end = np.searchsorted(bounds, [first, first + packs * context], side="right")
            inside = np.concatenate([[first], bounds[begin:end]])
            pack_of_piece = (inside[:-1] - first) // context
            yield np.diff(inside), np.cumsum(np.bincount(pack_of_piece))

    return steps


def first_fit(corpus: Corpus, context: int, packs: int, caps: dict[str, object], path: str) -> Callable[[], Steps]:
    """Cut documents at the context length, shuffle them, and put each into the first pack with room.

    Return a function that yields the steps.
    """
    lengths = corpus.lengths.astype(np.int64)
    whole, rest = np.divmod(lengths, context)
    pieces = np.concatenate([np.full(whole.sum(), context), rest[rest > 0]])
    packed = _first_fit(pieces.tolist(), context)

    def steps() -> Steps:
        for first in range(0, len(packed), packs):
            these = packed[first : first + packs]
            yield pieces[np.concatenate(these)], np.cumsum([len(pack) for pack in these])

    return steps


CONTESTANTS: dict[str, Callable[..., Callable[[], Steps]]] = {
    "plan": plan,
    "plan, level": level_plan,
    "concatenate, cut": concatenated,
    "first-fit": first_fit,
}


def draw(path: str, documents: int, source: Path | None) -> int:
    """Draw the lengths of `documents` documents and write them as int32. Return their sum."""
    rng = np.random.default_rng(0)
    known_lengths = np.array(json.loads(source.read_text())) if source else None
    tokens = 0
    with open(path, "wb") as file:
        for first in range(0, documents, PART):
            count = min(PART, documents - first)
            if known_lengths is None:
                lengths = np.exp(np.interp(rng.random(count), QUANTILES, np.log(LENGTHS)))
            else:
                lengths = rng.choice(known_lengths, count) * rng.uniform(0.95, 1.05, count)
            lengths = np.maximum(lengths, 1).astype(np.int32)
            tokens += int(lengths.sum(dtype=np.int64))
            file.write(lengths.tobytes())
    return tokens


def print_line(line: str) -> None:
    """Print a line and flush stdout."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _first_fit(lengths: list[int], pack_tokens: int) -> list[list[int]]:
    """Put each document into the first pack with room for it. Return the indices of each pack's documents."""
    packs: list[list[int]] = []
    # free tokens of each pack; there are at most as many packs as documents
    free = np.full(len(lengths), pack_tokens)
    for document in np.random.default_rng(0).permutation(len(lengths)).tolist():
        first = int(np.argmax(free[: len(packs) + 1] >= lengths[document]))
        if first == len(packs):
            packs.append([])
        packs[first].append(document)
        free[first] -= lengths[document]
    return packs


if __name__ == "__main__":
    guard_processes()
    main()
