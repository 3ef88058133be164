"""From text to token ids: bytes, or any tokenizer.json of Hugging Face's library `tokenizers`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from distattn.data.block_digests import combined_digest
from distattn.data.extra_packages import import_extra
from distattn.data.text import VOCABULARY as BYTE_VALUES
from distattn.ir.errors import DistattnError


class Encoded(NamedTuple):
    """Documents as tokens. tokens: ids of all documents in order, (sum of lengths,). lengths: of each document, (documents,)."""

    tokens: np.ndarray
    lengths: np.ndarray


class Tokenizer(Protocol):
    """What makes tokens of texts. vocabulary: ids are below it. eos: the id that ends a document, or None."""

    name: str
    vocabulary: int
    eos: int | None
    digest: str

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode documents. No token is added but `eos` at the end of each that has any text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some tokens, as well as they have one."""
        ...


def load_tokenizer(name: str, eos: str | None = None) -> Tokenizer:
    """Load a tokenizer: "bytes", a tokenizer.json, or a folder that has one.

    eos: a token of its vocabulary, or a number. Raises DistattnError where there is no such tokenizer or token.
    """
    return ByteTokenizer(eos) if name == "bytes" else FileTokenizer(name, eos)


def token_dtype(vocabulary: int) -> np.dtype:
    """The narrowest dtype of the indexed format that holds all ids: uint8, uint16 or int32."""
    return np.dtype(np.uint8 if vocabulary <= 1 << 8 else np.uint16 if vocabulary <= 1 << 16 else np.int32)


class ByteTokenizer:
    """The bytes of UTF-8 text: 256 tokens."""

    name = "bytes"
    vocabulary = BYTE_VALUES

    def __init__(self, eos: str | None = None):
        self.eos = None if eos is None else _eos_number(eos, self.vocabulary, self.name)
        self.digest = combined_digest(self.name, self.eos)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode documents, as `Tokenizer` says. tokens: uint8."""
        contents = [text.encode() for text in texts]
        if self.eos is not None:
            contents = [content + bytes([self.eos]) if content else content for content in contents]
        return Encoded(
            np.frombuffer(b"".join(contents), np.uint8), np.fromiter(map(len, contents), np.int64, len(contents))
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some tokens; bytes that are no UTF-8 are replaced."""
        return bytes(ids).decode("utf-8", "replace")


class FileTokenizer:
    """A tokenizer.json. Special tokens that a text spells out become their ids, as Hugging Face's tokenizers have it."""

    def __init__(self, path: str, eos: str | None = None):
        file = Path(path, "tokenizer.json") if os.path.isdir(path) else Path(path)
        tokenizers = import_extra("tokenizers", f"the tokenizer {path}")
        try:
            content = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise DistattnError(
                f"tokenizer {path}: {file} cannot be read: {reason}; name a tokenizer.json, a folder that has one, or bytes."
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        # the library raises bare Exceptions
        except Exception as error:
            raise DistattnError(f"tokenizer {path}: {file} is no tokenizer of Hugging Face's: {error}.") from None
        # settings for batches of equal length, which some files have: they would cut and fill documents
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # ids need not be without gaps
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.name, self.vocabulary = path, max(ids, default=-1) + 1
        if not self.vocabulary:
            raise DistattnError(f"tokenizer {path}: {file} has no tokens.")
        self.eos = None
        if eos is not None:
            # a number is an id, even where a token is written like it
            named = None if eos.isdecimal() else self._tokenizer.token_to_id(eos)
            self.eos = _eos_number(eos, self.vocabulary, path) if named is None else named
        self.digest = combined_digest(content, self.eos)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode documents, as `Tokenizer` says. tokens: of `token_dtype`."""
        # "fast" leaves out where in the text each token stands, and nothing else
        ids = [one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        if self.eos is not None:
            ids = [[*one, self.eos] if one else one for one in ids]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = np.fromiter(itertools.chain.from_iterable(ids), token_dtype(self.vocabulary), int(lengths.sum()))
        return Encoded(tokens, lengths)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some tokens, special ones spelt out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def _eos_number(eos: str, vocabulary: int, name: str) -> int:
    if not eos.isdecimal() or int(eos) >= vocabulary:
        raise DistattnError(
            f"tokenizer {name}: {eos!r} is none of its tokens; give --eos a token of its vocabulary, or a number below "
            f"{vocabulary:,}."
        )
    return int(eos)
