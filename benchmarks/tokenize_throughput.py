"""Tokens per second of `distattn data tokenize`, the tokenizer alone, and the tools of other projects.

    python benchmarks/tokenize_throughput.py [--megabytes 30] [--vocabulary 8192] [--repeats 3] [--out FILE.jsonl]

The text is the Python standard library's source code as JSON lines, and the tokenizer is a byte-level BPE trained on it
first. Ours is the whole path from the file to indexed files with digests, synchronized to disk, including the start of
processes. "encode_batch" is the library `tokenizers` alone on texts in memory, which is the upper bound. "1 process,
Megatron's builder" is what Megatron's preprocessing does with a document: JSON, ids, IndexedDatasetBuilder (its tool is
not part of megatron-core). datatrove takes part if it is installed. "cpu s" is the CPU time of all processes and
threads in one run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
from harness import Unsupported, compare, table, write

from distattn.data.files.indexed_file import IndexedFile
from distattn.data.tokenizing.tokenize import plan_job
from distattn.launch.data.tokenize_processes import tokenize


def main() -> None:
    """Measure all contestants and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=30)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file to append the results to, as JSON lines")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = sources(int(arguments.megabytes * 1e6))
        size = sum(len(text.encode()) for text in texts)
        with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        trained = train(texts, arguments.vocabulary)
        trained.save(str(folder / "tokenizer.json"))
        expected = np.concatenate(
            [encoding.ids for encoding in trained.encode_batch_fast(texts, add_special_tokens=False)]
        )
        contestants: dict[str, Callable[[], Callable[[], object]]] = {
            "distattn, 1 process": lambda: ours(folder, "tokenizer.json", 1),
            "distattn, 2 processes": lambda: ours(folder, "tokenizer.json", 2),
            "encode_batch, 1 thread": lambda: encode_batch(trained, texts, "false"),
            f"encode_batch, {os.cpu_count()} threads": lambda: encode_batch(trained, texts, "true"),
            "1 process, Megatron's builder": lambda: megatron(folder, trained),
            "datatrove, 1 process": lambda: datatrove(folder),
        }
        case = (
            f"{len(texts):,} documents, {size / 1e6:.1f} MB, {len(expected):,} tokens of {trained.get_vocab_size():,}"
        )

        def check(result: object) -> str:
            tokens = result() if callable(result) else result
            if isinstance(tokens, int):
                return "" if tokens == len(expected) else f"{tokens:,} tokens instead of {len(expected):,}"
            return "" if np.array_equal(tokens, expected) else "other tokens"

        cells = compare(case, contestants, check, repeats=arguments.repeats, count=cpu_time, progress=print_line)
        contestants = {
            f"bytes, distattn, {count} processes": lambda count=count: ours(folder, "bytes", count) for count in (1, 2)
        }
        raw = "".join(texts).encode()
        cells += compare(
            f"the same as {len(raw):,} bytes",
            contestants,
            lambda result: "" if result().tobytes() == raw else "other bytes",
            repeats=arguments.repeats,
            count=cpu_time,
            progress=print_line,
        )
    for cell in cells:
        tokens = len(raw) if cell.contestant.startswith("bytes") else len(expected)
        cell.facts |= {"tokens/s": tokens / (cell.median or 1), "MB/s": size / 1e6 / (cell.median or 1)}
    columns = {
        "tokens/s": lambda rate: f"{rate:,.0f}",
        "MB/s": lambda rate: f"{rate:.1f} MB/s",
        "cpu_ms": lambda spent: f"{spent / 1e3:.1f} cpu s",
    }
    sys.stdout.write(table(cells, columns) + "\n")
    if arguments.out:
        write(arguments.out, cells)


def cpu_time() -> dict[str, int]:
    """Return the CPU milliseconds so far of this process and of the child processes that it has waited for."""
    return {"cpu_ms": int(1e3 * sum(os.times()[:4]))}


def sources(size: int) -> list[str]:
    """Return the standard library's UTF-8 source files, repeated until they have `size` bytes in total."""
    texts: list[str] = []
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    files = [file for file in files if "site-packages" not in file.parts]
    while size > 0:
        for file in files:
            try:
                texts.append(file.read_text("utf-8"))
            except UnicodeDecodeError:
                continue
            size -= file.stat().st_size
            if size <= 0:
                break
    return texts


def train(texts: list[str], vocabulary: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE on the first texts."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(texts[:500], trainer)
    return trained


def ours(folder: Path, tokenizer: str, processes: int) -> Callable[[], Callable[[], np.ndarray]]:
    """Return a function that runs the whole command from scratch. It returns a function that reads the tokens written."""
    prefix = str(folder / f"ours-{tokenizer}-{processes}")
    name = tokenizer if tokenizer == "bytes" else str(folder / tokenizer)

    def run() -> Callable[[], np.ndarray]:
        for suffix in (".bin", ".idx", ".xxh3", ".json"):
            Path(prefix + suffix).unlink(missing_ok=True)
        tokenize(plan_job(prefix, [str(folder / "text.jsonl")], name), processes, lambda progress: None)
        return lambda: np.concatenate(list(IndexedFile.open(prefix).iterate_tokens()))

    return run


def encode_batch(trained: tokenizers.Tokenizer, texts: list[str], parallel: str) -> Callable[[], int]:
    """Return a function that encodes with the library alone, without files, and returns the number of tokens."""

    def run() -> int:
        os.environ["TOKENIZERS_PARALLELISM"] = parallel
        batches = range(0, len(texts), 64)
        encoded = (trained.encode_batch_fast(texts[start : start + 64], add_special_tokens=False) for start in batches)
        return sum(len(encoding) for batch in encoded for encoding in batch)

    return run


def megatron(folder: Path, trained: tokenizers.Tokenizer) -> Callable[[], Callable[[], np.ndarray]]:
    """Return a function that writes one document after the other with Megatron's builder.

    It returns a function that reads the tokens written.
    """
    try:
        import torch
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    except ModuleNotFoundError as error:
        raise Unsupported(f"{error.name} is not installed") from None

    def run() -> Callable[[], np.ndarray]:
        dtype = DType.optimal_dtype(trained.get_vocab_size())
        builder = IndexedDatasetBuilder(str(folder / "megatron.bin"), dtype)
        with open(folder / "text.jsonl", encoding="utf-8") as file:
            for line in file:
                ids = trained.encode(json.loads(line)["text"], add_special_tokens=False).ids
                builder.add_document(torch.tensor(ids), [len(ids)])
        builder.finalize(str(folder / "megatron.idx"))
        return lambda: np.fromfile(folder / "megatron.bin", dtype)

    return run


def datatrove(folder: Path) -> Callable[[], Callable[[], np.ndarray]]:
    """Return a function that runs datatrove's pipeline without shuffling. It returns a function that reads the tokens."""
    if importlib.util.find_spec("datatrove") is None:
        raise Unsupported("datatrove is not installed: pip install 'datatrove[processing,io]'")
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    def run() -> Callable[[], np.ndarray]:
        out = tempfile.mkdtemp(dir=folder)
        steps = [
            JsonlReader(str(folder), glob_pattern="text.jsonl"),
            DocumentTokenizer(
                out, tokenizer_name_or_path=str(folder / "tokenizer.json"), eos_token=None, shuffle_documents=False
            ),
        ]
        LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=f"{out}/log").run()
        (file,) = Path(out).glob("*.ds")
        return lambda: np.fromfile(file, np.uint16)

    return run


def print_line(line: str) -> None:
    """Print a line of progress to stderr."""
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    main()
