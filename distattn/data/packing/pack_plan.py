"""Read a pack plan from its file: the packs of each step, and the pieces of documents in each pack.

`distattn.data.packing.pack_plan_format` describes the file's layout.
"""

from __future__ import annotations

import json
import os
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from distattn.data.packing.pack_plan_format import (
    BLOCK_BYTES,
    CHECKSUM_BYTES,
    OFFSET_BYTES,
    RECORDS_BEGIN,
    loaded_pieces,
    read_bytes,
    read_header,
)
from distattn.data.packing.pack_rule import PackRule
from distattn.ir.cached import cached_property
from distattn.ir.errors import DamagedDataError, DistattnError


@dataclass(frozen=True)
class PlannedSource:
    """A corpus of a plan, and how much of it the plan reads.

    documents, empty_documents, tokens: the size of the corpus. planned_documents: the number of documents that the plan starts to
    read, over all epochs. planned_tokens: the number of tokens that it reads, over all epochs. last_step: the last step with
    tokens of the corpus, or -1. digest: digest of its files. masks: digest of their loss masks and spans, or None if they had
    neither.
    """

    name: str
    documents: int
    empty_documents: int
    tokens: int
    digest: str
    masks: str | None
    weight: float
    max_epochs: float | None
    planned_documents: int
    planned_tokens: int
    last_step: int

    @property
    def epochs(self) -> float:
        """The number of epochs of the corpus that the plan reads, measured in tokens."""
        return self.planned_tokens / self.tokens


@dataclass(frozen=True, eq=False)
class Pack:
    """Pieces of documents that are computed as one sequence. rows: the pieces in order, PIECE (N,)."""

    rows: np.ndarray

    @property
    def corpus(self) -> np.ndarray:
        """The corpus of each piece, as an index into `PackPlan.sources`, uint16 (N,)."""
        return self.rows["corpus"]

    @property
    def document(self) -> np.ndarray:
        """The document of each piece, as an index into the corpus, uint32 (N,)."""
        return self.rows["document"]

    @property
    def start(self) -> np.ndarray:
        """The position of each piece's first token in its document, uint32 (N,)."""
        return self.rows["start"]

    @property
    def epoch(self) -> np.ndarray:
        """The epoch of each piece, counted from 0, uint16 (N,)."""
        return self.rows["epoch"]

    @property
    def ends_document(self) -> np.ndarray:
        """A mask of the pieces that end with the last token of their document, bool (N,)."""
        return self.rows["ends_document"]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens in each piece, a list of N integers."""
        lengths: list[int] = self.rows["length"].tolist()
        return lengths

    @property
    def tokens(self) -> int:
        """The total number of tokens in the pack."""
        return int(self.rows["length"].sum(dtype=np.int64))


@dataclass(frozen=True, eq=False)
class StepPacks:
    """The packs of one step. context: tokens per slot of a pack.

    rows: the pieces of all packs, PIECE (N,). ends: the end of each pack in `rows`, int64 (P,).
    """

    step: int
    context: int
    rows: np.ndarray
    ends: np.ndarray

    @cached_property
    def packs(self) -> list[Pack]:
        """The packs in order."""
        ends = self.ends.tolist()
        return [Pack(self.rows[begin:end]) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    @property
    def slots(self) -> list[int]:
        """The number of packs that each pack replaces: 1 unless a document longer than a pack was kept whole."""
        begins = np.concatenate([[0], self.ends[:-1]])
        slots: list[int] = (
            -(-np.maximum.reduceat(self.rows["length"], begins).astype(np.int64) // self.context)
        ).tolist()
        return slots

    @property
    def tokens(self) -> int:
        """The total number of tokens in the step."""
        return int(self.rows["length"].sum(dtype=np.int64))


class PackPlan:
    """A plan backed by its file. `open` reads only the header, and `step` only that step's record."""

    def __init__(self, path: str, file: BinaryIO, digest: str, header: dict[str, Any]) -> None:
        self.path = path
        # digest of the header, which holds the digests of everything else: plans with equal digests are the same
        self.digest = digest
        self.steps: int = header["steps"]
        self.seed: int = header["seed"]
        self.packs: int = header["packs"]
        self.pieces: int = header["pieces"]
        self.tokens: int = header["tokens"]
        # the maximum number of windows through which a document was carried
        self.longest_wait: int = header["longest_wait"]
        # True if the plan has all documents of all epochs, because it was made without a number of steps
        self.ends_with_corpora: bool = header["ends_with_corpora"]
        self.rule = PackRule.from_dict(header["rule"])
        self.sources = tuple(PlannedSource(**source) for source in header["sources"])
        self._file = file
        weakref.finalize(self, file.close)
        self._index: int = header["index"]
        self._blocks: list[str] = header["blocks"]

    @classmethod
    def open(cls, path: str | Path, digest: str | None = None) -> PackPlan:
        """Open a plan's file. Memory and time do not depend on its size.

        digest: the expected digest of the plan. Raises DamagedDataError if the file is not a plan, is damaged, was truncated or
        has another version, and DistattnError if it cannot be read or has another digest.
        """
        path = os.fspath(path)
        try:
            # closed by PackPlan.close, or when the plan is garbage-collected
            file = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise DistattnError(f"{path}: cannot be read: {error.strerror}; name the file of a pack plan.") from None
        try:
            actual_digest, header = read_header(path, file)
            plan = cls(path, file, actual_digest, header)
            if digest is not None and digest != actual_digest:
                raise DistattnError(
                    f"{path}: is another plan (digest {actual_digest}) than the one asked for ({digest}); "
                    "use the plan that the run began with."
                )
        except BaseException:
            file.close()
            raise
        return plan

    def __reduce__(self) -> tuple[Any, ...]:
        """Return only the path and the digest for pickling: a loader's worker processes open the file themselves."""
        return PackPlan.open, (self.path, self.digest)

    def __enter__(self) -> PackPlan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def step(self, step: int) -> StepPacks:
        """Read the packs of a step.

        Raises DistattnError if there is no such step, and DamagedDataError if its record is damaged.
        """
        if not 0 <= step < self.steps:
            raise DistattnError(f"{self.path}: there is no step {step:,}; the plan has steps 0 to {self.steps - 1:,}.")
        place = self._index + step * OFFSET_BYTES
        begin, end = struct.unpack("<QQ", read_bytes(self.path, self._file, place, 2 * OFFSET_BYTES))
        place = self._index + (self.steps + 1 + step) * OFFSET_BYTES
        checksum = int.from_bytes(read_bytes(self.path, self._file, place, CHECKSUM_BYTES), "little")
        if not RECORDS_BEGIN <= begin < end <= self._index:
            raise self._damaged(f"the index of step {step:,} is damaged", self._index + step * OFFSET_BYTES)
        record = read_bytes(self.path, self._file, begin, end - begin)
        if xxhash.xxh3_64_intdigest(record, seed=step) != checksum:
            raise self._damaged(f"step {step:,} is not what was written", begin)
        packs = int.from_bytes(record[:4], "little")
        ends = np.cumsum(np.frombuffer(record, "<u4", packs, offset=4), dtype=np.int64)
        return StepPacks(step, self.rule.context_at(step), loaded_pieces(record, 4 + 4 * packs), ends)

    @cached_property
    def order_digest(self) -> str:
        """A digest of everything that determines the order of tokens.

        It is the xxh3-128 of the seed, the rule, and each corpus's files, masks, weight and epochs. It does not cover the number
        of steps, because a shorter plan is a prefix of a longer plan, nor, unlike `digest`, the file's contents.
        """
        corpora = [
            (source.name, source.digest, source.masks, source.weight, source.max_epochs) for source in self.sources
        ]
        content = json.dumps([self.seed, self.rule.as_dict(), corpora], sort_keys=True)
        return xxhash.xxh3_128_hexdigest(content.encode())

    @cached_property
    def full_steps(self) -> int:
        """The number of steps, not counting the last step if it has free slots. The first use reads that step.

        The last step of a plan that ends with its corpora contains only the remaining packs.
        """
        last = self.step(self.steps - 1)
        return self.steps - (sum(last.slots) < self.rule.packs_at(last.step))

    def find(self, corpus: int, document: int) -> list[int]:
        """Read all steps, and return the numbers of those with a piece of the document. Raises the same errors as `step`."""

        def holds(rows: np.ndarray) -> bool:
            return bool(((rows["document"] == document) & (rows["corpus"] == corpus)).any())

        return [step for step in range(self.steps) if holds(self.step(step).rows)]

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read all records and the index, and compare them with their digests.

        progress: called with (bytes read, total bytes). Raises DamagedDataError naming the first damaged block of 64 MiB.
        """
        total = self._index + (2 * self.steps + 1) * OFFSET_BYTES - RECORDS_BEGIN
        for number, expected in enumerate(self._blocks):
            first = number * BLOCK_BYTES
            size = min(BLOCK_BYTES, total - first)
            if xxhash.xxh3_128_hexdigest(read_bytes(self.path, self._file, RECORDS_BEGIN + first, size)) != expected:
                raise self._damaged(f"{size:,} bytes are not what was written", RECORDS_BEGIN + first)
            if progress:
                progress(first + size, total)

    def _damaged(self, problem: str, offset: int) -> DamagedDataError:
        return DamagedDataError(
            f"{self.path}: {problem} (byte {offset:,}); copy the file again, or make the plan again."
        )
