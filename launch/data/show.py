"""`distattn data show`: print the packs of a step as text, document by document."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from distattn.data.files.corpus import Corpus
from distattn.data.files.manifest import Manifest
from distattn.data.files.text import VOCABULARY
from distattn.data.packing.pack_config import load_pack_config, open_configured_plan, open_corpora
from distattn.data.tokenizing.tokenizer import Tokenizer, load_tokenizer
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.launch.command_line import CommandParser, ResultConsole, print_to_stderr
from distattn.training.reporting.step_documents import documents_of_step
from distattn.training.run_folder import RunFolder

USAGE = """usage: distattn data show PACKS.toml|RUN STEP [--pack N] [--tokens N] [--json]

Prints the packs of a step (counted from 0) as text, each document below a line that names it, for example to find the documents
behind a spike in the loss. RUN is the folder of a run that has trained the step; if several times, the last time counts.
Step 18 of metrics.jsonl is step 17 here.

  --pack N     only the pack of this number
  --tokens N   tokens to show from the start and from the end of each document (default 64); 0 for all of it
  --json       the documents without their text, one line each

If the tokenizer that made the tokens is not available any more, token ids are shown instead.
"""

# width in characters of the heading lines above packs and documents
_LINE_WIDTH = 100
# a function of (first token, count, size of the vocabulary or None) that reads a document's tokens
_Read = Callable[[int, int, int | None], np.ndarray]
# control characters that a terminal would interpret, that is, all except line feed and tab
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    parser = CommandParser("data show")
    parser.add_argument("config")
    parser.add_argument("step", type=int)
    parser.add_argument("--pack", type=int)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.tokens < 0:
        raise DistattnError(
            f"data show: --tokens: must be at least 1, or 0 for all of a document, not {options.tokens}."
        )
    if os.path.isdir(options.config):
        _show_run(RunFolder(Path(options.config)), options.step, options.pack, options.tokens, options.json)
        return 0
    config = load_pack_config(options.config)
    corpora = open_corpora(config)
    plan = open_configured_plan(config, corpora)
    packs = plan.step(options.step).packs
    if options.pack is not None and not 0 <= options.pack < len(packs):
        raise DistattnError(f"data show: --pack: step {options.step:,} has packs 0 to {len(packs) - 1:,}.")
    texts = _Texts()
    for number, pack in enumerate(packs) if options.pack is None else [(options.pack, packs[options.pack])]:
        if not options.json:
            pieces = f"{len(pack.rows):,} document{'s' if len(pack.rows) > 1 else ''}"
            _print_line(f"==== step {options.step:,}, pack {number:,}: {pieces}, {pack.tokens:,} tokens ", "=", "bold")
        for row in pack.rows:
            facts = {name: int(row[name]) for name in ("document", "epoch", "start", "length")}
            corpus = corpora[row["corpus"]]
            if options.json:
                line = {"step": options.step, "pack": number, "corpus": corpus.name, **facts}
                sys.stdout.write(json.dumps(line | {"file": corpus.file_of(facts["document"])[0].prefix}) + "\n")
                continue
            _print_line(f"---- {_title(corpus, **facts)} ", "-", "bold cyan")
            prefix, read = corpus.file_of(facts["document"])[0].prefix, partial(corpus.read, facts["document"])
            texts.print(prefix, read, facts["start"], facts["length"], options.tokens)
    return 0


def _show_run(run: RunFolder, step: int, pack: int | None, most: int, as_json: bool) -> None:
    """Print the packs of a step that a run has trained on, from the run's records. most: see `_Texts.print`."""
    if step < 0:
        raise DistattnError(f"data show: there is no step {step}; steps are counted from 0.")
    rows = documents_of_step(run.documents_file, step)
    packs = rows[-1]["pack"] + 1
    if pack is not None and not 0 <= pack < packs:
        raise DistattnError(f"data show: --pack: step {step:,} has packs 0 to {packs - 1:,}.")
    texts = _Texts(str(run.corpus_prefix))
    for number, group in groupby(rows, key=itemgetter("pack")):
        pieces = list(group)
        if pack not in (None, number):
            continue
        if not as_json:
            count = f"{len(pieces):,} document{'s' if len(pieces) > 1 else ''}"
            tokens = sum(row["length"] for row in pieces)
            _print_line(f"==== step {step:,}, pack {number:,}: {count}, {tokens:,} tokens ", "=", "bold")
        for row in pieces:
            if as_json:
                sys.stdout.write(json.dumps(row) + "\n")
                continue
            part = f", from token {row['start']:,} on" if row["start"] else ""
            title = f"{row['corpus']} {row['document']:,} ({row['file']}), epoch {row['epoch']}: {row['length']:,} tokens{part}"
            _print_line(f"---- {title} ", "-", "bold cyan")
            texts.print(row["file"].removesuffix(".bin"), partial(_read_row, row), row["start"], row["length"], most)


def _read_row(row: Mapping[str, Any], first: int, count: int, vocabulary: int | None) -> np.ndarray:
    """Return `count` tokens of a row's document, from token `first` on. Raise DamagedDataError if the file no longer has them."""
    dtype = np.dtype(row["dtype"])
    offset = row["byte"] + (first - row["start"]) * dtype.itemsize
    try:
        tokens = np.fromfile(row["file"], dtype.newbyteorder("<"), count, offset=offset)
    except OSError as error:
        raise DamagedDataError(f"{row['file']}: cannot be read: {error.strerror}; the run has read it.") from None
    if len(tokens) < count or vocabulary and count and tokens.max() >= vocabulary:
        raise DamagedDataError(
            f"{row['file']}: byte {offset:,}: is not what the run read; restore the file from a copy."
        )
    return tokens


def _print_line(title: str, fill: str, style: str) -> None:
    """Print a title padded to _LINE_WIDTH characters with `fill`, in color on a terminal."""
    ResultConsole(highlight=False).print(Text(title.ljust(_LINE_WIDTH, fill), style), soft_wrap=True)


def _title(corpus: Corpus, document: int, epoch: int, start: int, length: int) -> str:
    """Describe a piece: its document, and its place in the document."""
    file, number = corpus.file_of(document)
    document_length = int(corpus.lengths_of(np.array([document]))[0])
    part = "" if length == document_length else f" of {document_length:,} from {start:,} on"
    return f"{corpus.name} {document:,} ({file.prefix}.bin {number:,}), epoch {epoch}: {length:,} tokens{part}"


class _Texts:
    """A printer of tokens as text, with the tokenizers named in the files' manifests. of_bytes: a file of byte tokens."""

    def __init__(self, of_bytes: str | None = None) -> None:
        # (tokenizer, size of its vocabulary) by file
        self._tokenizers: dict[str, tuple[Tokenizer | None, int | None]] = {}
        if of_bytes is not None:
            self._tokenizers[os.path.abspath(of_bytes)] = load_tokenizer("bytes"), VOCABULARY

    def print(self, prefix: str, read: _Read, start: int, length: int, most: int) -> None:
        """Print a piece of a document: all of it if `most` is 0, otherwise at most `most` tokens from each of its ends."""
        text = self._of(prefix, read, start, length, most)
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")

    def _of(self, prefix: str, read: _Read, start: int, length: int, most: int) -> str:
        """Return the text that `print` prints, with control characters escaped."""
        tokenizer, vocabulary = self._tokenizer_of(prefix)

        def text(first: int, count: int) -> str:
            ids = read(first, count, vocabulary).tolist()
            return " ".join(map(str, ids)) if tokenizer is None else _CONTROL.sub(_escape, tokenizer.decode(ids))

        if not most or length <= 2 * most:
            return text(start, length)
        gap = f"\n... {length - 2 * most:,} tokens ...\n"
        return text(start, most) + gap + text(start + length - most, most)

    def _tokenizer_of(self, prefix: str) -> tuple[Tokenizer | None, int | None]:
        """Return (the tokenizer of a file, the size of its vocabulary), each None if it is not known.

        If the tokenizer is unknown, missing or has changed, print to stderr, once per file, why token ids are shown instead.
        """
        if prefix not in self._tokenizers:
            manifest, tokenizer, why = (
                Manifest.load(prefix),
                None,
                f"there is no {prefix}.json, which names its tokenizer",
            )
            if manifest is not None:
                try:
                    tokenizer = load_tokenizer(manifest.tokenizer, None if manifest.eos is None else str(manifest.eos))
                except DistattnError as error:
                    why = str(error).rstrip(".")
                if tokenizer and tokenizer.digest != manifest.tokenizer_digest:
                    tokenizer, why = None, f"{manifest.tokenizer} is another tokenizer than the one that made it"
            if tokenizer is None:
                print_to_stderr(f"data show: {prefix}: token ids are shown: {why}.")
            self._tokenizers[prefix] = tokenizer, None if manifest is None else manifest.vocabulary
        return self._tokenizers[prefix]


def _escape(control: re.Match[str]) -> str:
    return f"\\x{ord(control[0]):02x}"
