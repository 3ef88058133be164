"""Resuming, packing and reading long documents: ours, Megatron, torchtitan, mosaicml-streaming and litdata in one run.

    python benchmarks/data_loading.py [--documents 200000] [--context 32768] [--rivals FOLDER] [--out FILE.jsonl]

FOLDER is the target of `pip install --target FOLDER mosaicml-streaming litdata torchtitan datasets torchdata`, for
rivals that the environment lacks. A missing rival is left out with the reason. The corpus is synthetic: 16-bit ids, and
lengths drawn from quantiles of a long-context corpus (`pack_planning.py`), divided by --scale. Each measurement runs in
a separate process.

"plan": the work done once before a run: wall-clock seconds, CPU seconds and peak memory. "resume": from making the
loader (without imports) to the token ids of the first sequence of a step in the middle, with files in the page cache:
the median, the minimum, the median CPU time (which excludes waiting and other programs), and the peak memory beyond
that of the imports, mapped pages included. A contestant is rejected unless it yields the same sequence there as without
an interruption. "state": bytes of the pickled state. "next": the median time of the sequences after that. "filled":
tokens over capacity. "cuts": number of cuts through documents. "dropped": share of tokens that are in no sequence.
"read/used": the bytes that one of --cp ranks reads in a step, including blocks read to check their digests, over the
bytes of the tokens that it computes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# import it before anything is timed: otherwise NumPy would import it at the first np.unique
import numpy.ma  # noqa: F401
import xxhash
from data_contestants import CONTESTANTS, END_OF_DOCUMENT, TOKEN, VOCABULARY, Case, Contestant
from harness import Unsupported, environment
from pack_planning import LENGTHS, QUANTILES
from process_guard import guard_processes

from distattn.data.files.indexed_file import IndexedFileWriter

SCALE = 4
PART = 10_000


def main() -> None:
    """Measure all contestants and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--scale", type=float, default=SCALE, help="lengths are divided by it")
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--packs", type=int, default=32, help="of a step")
    parser.add_argument("--cp", type=int, default=8, help="ranks that share a pack")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rivals", help="folder of packages that are not in the environment")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--folder", help="where files are written; by default a temporary folder")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        case = Case(os.path.join(folder, "corpus"), folder, arguments.context, arguments.packs, arguments.cp)
        tokens = write_corpus(case.corpus, arguments.documents, arguments.scale)
        step = tokens // (arguments.packs * arguments.context) // 2
        print_line(
            f"{arguments.documents:,} documents, {tokens:,} tokens; {arguments.packs} packs of {arguments.context:,} tokens a "
            f"step; resumed at step {step}\n{HEAD}"
        )
        ready, rows = [], {}
        for name in arguments.only:
            rows[name] = in_a_process(prepare, CONTESTANTS[name], case, step, arguments.rivals)
            if "left out" not in rows[name]:
                ready.append(name)
        resumed: dict[str, list[dict[str, Any]]] = {name: [] for name in ready}
        for repeat in range(arguments.repeats):
            # start with a different contestant each time
            for name in ready[repeat % len(ready) :] + ready[: repeat % len(ready)]:
                resumed[name].append(in_a_process(resume, CONTESTANTS[name], case, rows[name], arguments.rivals))
        for name, row in rows.items():
            row |= summary(resumed.get(name, []))
            print_line(line(name, row, rows[arguments.only[0]]))
        if arguments.out:
            with arguments.out.open("a") as file:
                for name, row in rows.items():
                    kept = {key: value for key, value in row.items() if key != "state"}
                    file.write(json.dumps({"contestant": name} | kept | environment()) + "\n")


def write_corpus(prefix: str, documents: int, scale: float = SCALE) -> int:
    """Write documents of random ids, each with an end token. Return the number of tokens.

    scale: the factor to divide lengths by.
    """
    rng = np.random.default_rng(0)
    total = 0
    with IndexedFileWriter(prefix, TOKEN) as writer:
        for first in range(0, documents, PART):
            drawn = np.exp(np.interp(rng.random(min(PART, documents - first)), QUANTILES, np.log(LENGTHS)))
            lengths = np.maximum(2, drawn / scale).astype(np.int64)
            tokens = rng.integers(END_OF_DOCUMENT + 1, VOCABULARY, lengths.sum(), TOKEN)
            tokens[np.cumsum(lengths) - 1] = END_OF_DOCUMENT
            writer.add_many(tokens, lengths)
            total += len(tokens)
    return total


def prepare(contestant: Contestant, case: Case, step: int) -> dict[str, Any]:
    """Convert, plan, and read up to a step without interruption.

    Return the times, how full sequences are, the digest of the step's first sequence, and the state before that
    sequence.
    """
    began = time.perf_counter()
    contestant.convert(case)
    row: dict[str, Any] = {"convert s": time.perf_counter() - began}
    peak = PeakMemory()
    began, cpu = time.perf_counter(), time.process_time()
    contestant.plan(case)
    if contestant.planned:
        row |= {
            "plan s": time.perf_counter() - began,
            "plan CPU s": time.process_time() - cpu,
            "plan MB": peak.megabytes(),
        }
    row |= contestant.filled(case)._asdict()
    sequences = contestant.sequences(case)
    for _ in range(step * case.packs):
        next(sequences)
    row["digest"] = digest(next(sequences))
    sequences.close()
    row["state"] = pickle.dumps(contestant.state(case, step))
    return row


def resume(contestant: Contestant, case: Case, row: dict[str, Any]) -> dict[str, Any]:
    """Resume from the state in `row`. Return the times of the first sequence and of those after it."""
    state = pickle.loads(row["state"])
    peak = PeakMemory()
    began, cpu = time.perf_counter(), time.process_time()
    sequences = contestant.sequences(case, state)
    first = next(sequences)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    times: dict[str, Any] = {"resume": seconds, "resume CPU": cpu_seconds, "resume MB": peak.megabytes()}
    if digest(first) != row["digest"]:
        raise AssertionError("resumed with another sequence than an uninterrupted run has")
    each, before, delivered = [], bytes_read(), 0
    for _ in range(case.packs):
        began = time.perf_counter()
        delivered += len(next(sequences))
        each.append(time.perf_counter() - began)
    # the operating system does not count reads from mapped files: count at least the bytes delivered
    read = max(bytes_read() - before, delivered * TOKEN().itemsize)
    used = case.packs * case.context / case.cp * TOKEN().itemsize
    return times | {"next": statistics.median(each), "read/used": read / used}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over all resumptions, the number of resumptions, and the seconds of the fastest."""
    if not rows:
        return {}
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return medians | {"least": min(row["resume"] for row in rows), "repeats": len(rows)}


HEAD = (
    f"{'':26s}{'plan s':>7s}{'CPU s':>7s}{'MB':>5s} | {'resume ms':>10s}{'least':>7s}{'CPU':>8s}{'':>8s}{'MB':>6s}"
    f"{'state B':>10s} | {'next ms':>8s}{'filled':>9s}{'cuts':>8s}{'dropped':>9s}{'read/used':>10s}"
)


def line(name: str, row: dict[str, Any], first: dict[str, Any]) -> str:
    """Format a row of the table. The CPU time of resuming is also shown relative to that of `first`."""
    if "left out" in row:
        return f"{name:26s}left out: {row['left out']}"
    plan = f"{row['plan s']:7.2f}{row['plan CPU s']:7.2f}{row['plan MB']:5.0f}" if "plan s" in row else f"{'none':>19s}"
    resume, least, cpu = (row[column] * 1e3 for column in ("resume", "least", "resume CPU"))
    ratio = f"({row['resume CPU'] / first['resume CPU']:.1f}x)" if "resume" in first else ""
    return (
        f"{name:26s}{plan} | {resume:10.1f}{least:7.1f}{cpu:8.1f}{ratio:>8s}{row['resume MB']:6.1f}{len(row['state']):10,d} | "
        f"{row['next'] * 1e3:8.2f}{row['utilisation']:9.3%}{row['cuts']:8,d}{row['dropped']:9.4%}{row['read/used']:10.2f}"
    )


class PeakMemory:
    """The increase of this process's peak memory since construction."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS")

    def megabytes(self) -> float:
        return (_status("VmHWM") - self._before) * 1024 / 1e6


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def bytes_read() -> int:
    """Return the number of bytes that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def digest(sequence: np.ndarray) -> str:
    """Return a digest of a sequence's token ids."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(sequence, np.int64).tobytes())


def in_a_process(work: Callable[..., dict[str, Any]], contestant: Contestant, *arguments: Any) -> dict[str, Any]:
    """Run `work` in a separate process. Return its result, or {"left out": reason} if it fails.

    The last of `arguments` is the folder with the rivals' packages; the others are passed to `work`.
    """
    receive, send = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run, args=(send, work, contestant, *arguments))
    process.start()
    send.close()
    try:
        result: dict[str, Any] = receive.recv()
    finally:
        process.join()
    return result


def _run(send: Any, work: Callable[..., dict[str, Any]], contestant: Contestant, *arguments: Any) -> None:
    *arguments, rivals = arguments
    # the environment's packages take precedence over those in the rivals' folder; all output is discarded
    sys.path += [rivals] if rivals else []
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        contestant.load()
        result = work(contestant, *arguments)
    except Unsupported as error:
        result = {"left out": str(error)}
    except Exception as error:
        result = {"left out": f"failed: {type(error).__name__}: {error}"}
    send.send(result)
    send.close()
    # do not wait for rivals' threads
    os._exit(0)


def print_line(text: str) -> None:
    """Print a line and flush stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    guard_processes()
    main()
