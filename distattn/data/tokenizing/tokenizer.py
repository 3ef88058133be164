"""Turn text into token ids: its bytes, or the tokens of any tokenizer.json of Hugging Face's `tokenizers` library."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from distattn.data.extra_packages import import_extra
from distattn.data.files.block_digests import combined_digest
from distattn.data.files.text import VOCABULARY as BYTE_VALUES
from distattn.ir.errors import DistattnError


class Encoded(NamedTuple):
    """Tokenized documents. tokens: ids of all documents, concatenated, (sum of lengths,). lengths: tokens per document, (D,)."""

    tokens: np.ndarray
    lengths: np.ndarray


class Tokenizer(Protocol):
    """A tokenizer. vocabulary: all ids are below it. eos: the id appended to each document, or None."""

    name: str
    vocabulary: int
    eos: int | None
    digest: str

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode documents. No token is added except `eos`, which ends each nonempty document."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that the tokens `ids` encode."""
        ...


def load_tokenizer(name: str, eos: str | None = None) -> Tokenizer:
    """Load the tokenizer `name`: "bytes", a tokenizer.json, or a folder that contains one.

    eos: a token of the vocabulary or its id. Raises DistattnError if there is no such tokenizer or token.
    """
    return ByteTokenizer(eos) if name == "bytes" else FileTokenizer(name, eos)


def token_dtype(vocabulary: int) -> np.dtype:
    """Return the narrowest dtype of the indexed format that holds all ids: uint8, uint16 or int32."""
    return np.dtype(np.uint8 if vocabulary <= 1 << 8 else np.uint16 if vocabulary <= 1 << 16 else np.int32)


class ByteTokenizer:
    """A tokenizer whose 256 tokens are the bytes of UTF-8 text."""

    name = "bytes"
    vocabulary = BYTE_VALUES

    def __init__(self, eos: str | None = None):
        self.eos = None if eos is None else _eos_number(eos, self.vocabulary, self.name)
        self.digest = combined_digest(self.name, self.eos)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode documents, see `Tokenizer.encode`. The tokens are uint8."""
        contents = [text.encode() for text in texts]
        if self.eos is not None:
            contents = [content + bytes([self.eos]) if content else content for content in contents]
        return Encoded(
            np.frombuffer(b"".join(contents), np.uint8), np.fromiter(map(len, contents), np.int64, len(contents))
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the tokens `ids`, with U+FFFD in place of bytes that are not valid UTF-8."""
        return bytes(ids).decode("utf-8", "replace")


class FileTokenizer:
    """A tokenizer loaded from a tokenizer.json. As in Hugging Face's library, special tokens within a text become their ids."""

    def __init__(self, path: str, eos: str | None = None):
        file = Path(path, "tokenizer.json") if os.path.isdir(path) else Path(path)
        tokenizers = import_extra("tokenizers", f"the tokenizer {path}")
        try:
            content = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise DistattnError(
                f"tokenizer {path}: {file} cannot be read: {reason}; name a tokenizer.json, a folder that has one, or bytes."
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        # the library raises bare Exceptions
        except Exception as error:
            raise DistattnError(f"tokenizer {path}: {file} is not a tokenizer of Hugging Face: {error}.") from None
        # turn off truncation and padding, which some files configure for batches of equal length
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # ids may have gaps
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.name, self.vocabulary = path, max(ids, default=-1) + 1
        if not self.vocabulary:
            raise DistattnError(f"tokenizer {path}: {file} has no tokens.")
        self.eos = None
        if eos is not None:
            # a number is an id, even if there is a token with the same spelling
            named = None if eos.isdecimal() else self._tokenizer.token_to_id(eos)
            self.eos = _eos_number(eos, self.vocabulary, path) if named is None else named
        self.digest = combined_digest(content, self.eos)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode documents, see `Tokenizer.encode`. The tokens have the dtype of `token_dtype`."""
        # unlike encode_batch, this does not record each token's position in the text, which is not needed
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        if self.eos is not None:
            ids = [[*document, self.eos] if document else document for document in ids]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = np.fromiter(itertools.chain.from_iterable(ids), token_dtype(self.vocabulary), int(lengths.sum()))
        return Encoded(tokens, lengths)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the tokens `ids`, including special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def _eos_number(eos: str, vocabulary: int, name: str) -> int:
    if not eos.isdecimal() or int(eos) >= vocabulary:
        raise DistattnError(
            f"tokenizer {name}: {eos!r} is not one of its tokens; give --eos a token of its vocabulary, or a number below "
            f"{vocabulary:,}."
        )
    return int(eos)
