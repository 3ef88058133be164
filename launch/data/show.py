"""`distattn data show`: the packs of a step as text, with the borders of documents."""

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

Prints the packs of a step (counted from 0) as text, each document under a line that says which one it is: so it is found which
documents a spike in the loss was made of. RUN is the folder of a run: of a step that it has trained, last if several times.
What metrics.jsonl calls step 18 is step 17.

  --pack N     only the pack of this number
  --tokens N   tokens of each document that are shown, from its begin and its end (default 64); 0 for all of it
  --json       the documents without their text, one line each

Where the tokenizer that made the tokens is not known any more, token ids are shown instead.
"""

# of the lines above packs and documents, in characters
_LINE_WIDTH = 100
# tokens of a document by first token, count, and the size of the vocabulary or None
_Read = Callable[[int, int, int | None], np.ndarray]
# all but line feeds and tabs: a terminal would obey them
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    parser = CommandParser("data show")
    parser.add_argument("config")
    parser.add_argument("step", type=int)
    parser.add_argument("--pack", type=int)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if given.tokens < 0:
        raise DistattnError(f"data show: --tokens: at least 1, or 0 for all of a document, not {given.tokens}.")
    if os.path.isdir(given.config):
        _show_run(RunFolder(Path(given.config)), given.step, given.pack, given.tokens, given.json)
        return 0
    config = load_pack_config(given.config)
    corpora = open_corpora(config)
    plan = open_configured_plan(config, corpora)
    packs = plan.step(given.step).packs
    if given.pack is not None and not 0 <= given.pack < len(packs):
        raise DistattnError(f"data show: --pack: step {given.step:,} has packs 0 to {len(packs) - 1:,}.")
    texts = _Texts()
    for number, pack in enumerate(packs) if given.pack is None else [(given.pack, packs[given.pack])]:
        if not given.json:
            pieces = f"{len(pack.rows):,} document{'s' if len(pack.rows) > 1 else ''}"
            _print_line(f"==== step {given.step:,}, pack {number:,}: {pieces}, {pack.tokens:,} tokens ", "=", "bold")
        for row in pack.rows:
            facts = {name: int(row[name]) for name in ("document", "epoch", "start", "length")}
            corpus = corpora[row["corpus"]]
            if given.json:
                line = {"step": given.step, "pack": number, "corpus": corpus.name, **facts}
                sys.stdout.write(json.dumps(line | {"file": corpus.file_of(facts["document"])[0].prefix}) + "\n")
                continue
            _print_line(f"---- {_title(corpus, **facts)} ", "-", "bold cyan")
            prefix, read = corpus.file_of(facts["document"])[0].prefix, partial(corpus.read, facts["document"])
            texts.print(prefix, read, facts["start"], facts["length"], given.tokens)
    return 0


def _show_run(run: RunFolder, step: int, pack: int | None, most: int, as_json: bool) -> None:
    """Print the packs of a step that a run has trained, by what the run has written of it."""
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
            what = f"{row['corpus']} {row['document']:,} ({row['file']}), epoch {row['epoch']}: {row['length']:,} tokens{part}"
            _print_line(f"---- {what} ", "-", "bold cyan")
            texts.print(row["file"].removesuffix(".bin"), partial(_read_row, row), row["start"], row["length"], most)


def _read_row(row: Mapping[str, Any], first: int, count: int, vocabulary: int | None) -> np.ndarray:
    """Tokens of the document of a row, of the row's piece. Raises DamagedDataError where the file has them no longer."""
    dtype = np.dtype(row["dtype"])
    offset = row["byte"] + (first - row["start"]) * dtype.itemsize
    try:
        found = np.fromfile(row["file"], dtype.newbyteorder("<"), count, offset=offset)
    except OSError as error:
        raise DamagedDataError(f"{row['file']}: cannot be read: {error.strerror}; the run has read it.") from None
    if len(found) < count or vocabulary and count and found.max() >= vocabulary:
        raise DamagedDataError(
            f"{row['file']}: byte {offset:,}: is not what the run has read; take the file from a copy."
        )
    return found


def _print_line(title: str, fill: str, style: str) -> None:
    """Print a line across the terminal; where the output is none, lines are as easily told from text by their marks."""
    ResultConsole(highlight=False).print(Text(title.ljust(_LINE_WIDTH, fill), style), soft_wrap=True)


def _title(corpus: Corpus, document: int, epoch: int, start: int, length: int) -> str:
    """Which document a piece is of, and where it lies in it."""
    file, number = corpus.file_of(document)
    whole = int(corpus.lengths_of(np.array([document]))[0])
    part = "" if length == whole else f" of {whole:,} from {start:,} on"
    return f"{corpus.name} {document:,} ({file.prefix}.bin {number:,}), epoch {epoch}: {length:,} tokens{part}"


class _Texts:
    """Tokens as text, by the tokenizers that files say they were made with. of_bytes: a file whose tokens are bytes."""

    def __init__(self, of_bytes: str | None = None) -> None:
        # by file, with the size of the vocabulary
        self._known: dict[str, tuple[Tokenizer | None, int | None]] = {}
        if of_bytes is not None:
            self._known[os.path.abspath(of_bytes)] = load_tokenizer("bytes"), VOCABULARY

    def print(self, prefix: str, read: _Read, start: int, length: int, most: int) -> None:
        """Print a piece of a document: all of it, or so many tokens of its begin and its end."""
        text = self._of(prefix, read, start, length, most)
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")

    def _of(self, prefix: str, read: _Read, start: int, length: int, most: int) -> str:
        """A piece as text. Control characters are spelt out."""
        tokenizer, vocabulary = self._tokenizer_of(prefix)

        def text(first: int, count: int) -> str:
            ids = read(first, count, vocabulary).tolist()
            return " ".join(map(str, ids)) if tokenizer is None else _CONTROL.sub(_spelt_out, tokenizer.decode(ids))

        if not most or length <= 2 * most:
            return text(start, length)
        left = f"\n... {length - 2 * most:,} tokens ...\n"
        return text(start, most) + left + text(start + length - most, most)

    def _tokenizer_of(self, prefix: str) -> tuple[Tokenizer | None, int | None]:
        """(The tokenizer of a file, the size of its vocabulary), None where they are not known.

        Says so once on the error stream where token ids will be shown: nobody knows the tokenizer, or it is gone, or another one.
        """
        if prefix not in self._known:
            manifest, found, why = Manifest.load(prefix), None, f"there is no {prefix}.json, which names its tokenizer"
            if manifest is not None:
                try:
                    found = load_tokenizer(manifest.tokenizer, None if manifest.eos is None else str(manifest.eos))
                except DistattnError as error:
                    why = str(error).rstrip(".")
                if found and found.digest != manifest.tokenizer_digest:
                    found, why = None, f"{manifest.tokenizer} is another tokenizer than the one that made it"
            if found is None:
                print_to_stderr(f"data show: {prefix}: token ids are shown: {why}.")
            self._known[prefix] = found, None if manifest is None else manifest.vocabulary
        return self._known[prefix]


def _spelt_out(control: re.Match[str]) -> str:
    return f"\\x{ord(control[0]):02x}"
