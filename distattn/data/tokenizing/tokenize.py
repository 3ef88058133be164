"""Tokenize a corpus: plan the work, tokenize one shard, and join the finished shards.

Each shard becomes an indexed file in PREFIX.parts/, named by a digest of everything that determines its contents. So a command
that was killed resumes where it stopped, and reuses identical shards of other commands. `launch/data/tokenize_processes.py`
starts the processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from distattn.data.files.block_digests import combined_digest
from distattn.data.files.indexed_file import IndexedFile, IndexedFileWriter
from distattn.data.files.manifest import Manifest, read_json, write_json
from distattn.data.tokenizing.document_sources import Piece, Source, cut_shards, find_sources
from distattn.data.tokenizing.source_readers import read_documents
from distattn.data.tokenizing.tokenizer import Tokenizer, load_tokenizer, token_dtype
from distattn.ir.errors import DamagedDataError, DistattnError

# a batch of documents is encoded once it has this many characters or this many documents
_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 1024
# maximum seconds to wait for the processes of a killed command to end
_LOCK_SECONDS = 30.0


class Progress(NamedTuple):
    """The amount of finished work. stored_bytes: bytes read from the sources. text_bytes: bytes of the documents in UTF-8."""

    stored_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def plus(self, other: Progress) -> Progress:
        """Return the sum of `self` and `other`."""
        return Progress(*(amount + other_amount for amount, other_amount in zip(self, other, strict=True)))


class Part(NamedTuple):
    """The contents of a finished shard. documents: the number of documents in each piece."""

    documents: list[int]
    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class TokenizeJob:
    """Everything that determines the result of tokenizing a corpus, and where the result goes.

    tokenizer, eos and field are the command's options. tokenizer_digest, vocabulary and eos_id describe the loaded tokenizer.
    """

    prefix: str
    tokenizer: str
    eos: str | None
    tokenizer_digest: str
    vocabulary: int
    eos_id: int | None
    field: str
    sources: list[Source]
    shards: list[list[Piece]]

    @property
    def parts(self) -> str:
        """The folder with the finished shards."""
        return f"{self.prefix}.parts"

    def part_prefix(self, shard: int) -> str:
        """Return the path prefix of a shard's indexed file."""
        pieces = [[*self.sources[piece.source], piece.start, piece.stop] for piece in self.shards[shard]]
        return os.path.join(self.parts, combined_digest(self.tokenizer_digest, self.field, pieces))

    def describe(self, shard: int) -> str:
        """Return a human-readable description of a shard."""
        first, last = self.shards[shard][0], self.shards[shard][-1]
        names = [self.sources[piece.source].file for piece in (first, last)]
        if names[0] != names[1]:
            return f"files {names[0]} to {names[1]}"
        unit = "row groups" if self.sources[first.source].kind == "parquet" else "bytes"
        return f"{unit} {first.start:,} to {last.stop:,} of {names[0]}"

    def save(self) -> str:
        """Write the job to a file in the parts folder for the worker processes. Return the file's path."""
        write_json(os.path.join(self.parts, "job.json"), asdict(self))
        return os.path.join(self.parts, "job.json")

    @classmethod
    def load(cls, file: str) -> TokenizeJob:
        """Read a job written by `save`."""
        fields = read_json(file)
        fields["sources"] = [Source(*source) for source in fields["sources"]]
        fields["shards"] = [[Piece(*piece) for piece in shard] for shard in fields["shards"]]
        return cls(**fields)


def plan_job(
    prefix: str,
    paths: Sequence[str],
    tokenizer: str,
    *,
    eos: str | None = None,
    field: str = "text",
    suffix: str = "",
    exclude: Sequence[str] = (),
) -> TokenizeJob:
    """Find all files and load the tokenizer, without writing anything. Raise DistattnError for an invalid argument."""
    folder = os.path.dirname(prefix) or "."
    if not os.path.isdir(folder) or not os.path.basename(prefix):
        raise DistattnError(f"tokenize: --out {prefix}: there is no folder {folder}; make it, or name another.")
    if prefix.endswith((".bin", ".idx")):
        raise DistattnError(
            f"tokenize: --out {prefix}: give it without the suffix; {prefix[:-4]}.bin and .idx are written."
        )
    loaded = load_tokenizer(tokenizer, eos)
    sources = find_sources(paths, suffix, exclude)
    return TokenizeJob(
        prefix=prefix,
        tokenizer=tokenizer,
        eos=eos,
        tokenizer_digest=loaded.digest,
        vocabulary=loaded.vocabulary,
        eos_id=loaded.eos,
        field=field,
        sources=sources,
        shards=cut_shards(sources),
    )


@contextlib.contextmanager
def locked(job: TokenizeJob) -> Iterator[int]:
    """Create and lock the parts folder. Yield the lock's file descriptor, which the worker processes must inherit.

    The lock is released when all processes with the descriptor have ended, however they end. Raises DistattnError if another
    command holds the lock.
    """
    file = os.path.join(job.parts, "lock")
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            os.makedirs(job.parts, exist_ok=True)
            lock = os.open(file, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            # another command has just removed the folder
            continue
        except OSError as error:
            raise DistattnError(f"{job.parts}: cannot be written: {error.strerror}; choose another --out.") from None
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # another command may have finished and removed the folder while this one waited
            if _is_lock(lock, file):
                break
        os.close(lock)
        if time.monotonic() > end:
            raise DistattnError(
                f"{job.parts}: another tokenize command is using it; wait for it, or choose another --out."
            )
        time.sleep(0.1)
    try:
        yield lock
    finally:
        if _is_lock(lock, file) and os.listdir(job.parts) == ["lock"]:
            remove_parts(job)
        os.close(lock)


def remove_parts(job: TokenizeJob) -> None:
    """Remove the parts folder, including the lock file, which this process must hold."""
    # rename the folder first, because a command waiting for the lock may create it again during the removal
    os.rename(job.parts, f"{job.parts}.{os.getpid()}.old")
    # also remove the folders left by commands that were killed at this point
    for old in glob.glob(f"{glob.escape(job.parts)}.*.old"):
        shutil.rmtree(old, ignore_errors=True)


def finished_manifest(job: TokenizeJob) -> Manifest | None:
    """Return the manifest if the same command has finished before, otherwise None.

    Raises DistattnError if other files with the job's prefix exist.
    """
    files = [f"{job.prefix}{suffix}" for suffix in (".json", ".idx", ".bin", ".xxh3")]
    existing = [file for file in files if os.path.lexists(file)]
    if existing == files:
        with contextlib.suppress(DamagedDataError):
            manifest = Manifest.load(job.prefix)
            if manifest is not None and manifest.command == _command_digest(job):
                return manifest
    # remove the files of a command that was killed while renaming them
    if existing and os.path.exists(_publishing(job)) and f"{job.prefix}.json" not in existing:
        for file in existing:
            os.unlink(file)
        return None
    if existing:
        raise DistattnError(
            f"{existing[0]}: exists already, made from other files or by another command; remove it, or choose another --out."
        )
    return None


def finished_parts(job: TokenizeJob) -> dict[int, Part]:
    """Return the finished shards by number. Remove unfinished files left by killed processes."""
    for file in glob.glob(os.path.join(glob.escape(job.parts), "*.tmp")):
        os.unlink(file)
    parts = {}
    for shard in range(len(job.shards)):
        file = f"{job.part_prefix(shard)}.json"
        if os.path.exists(file):
            with contextlib.suppress(DamagedDataError, TypeError):
                parts[shard] = Part(**read_json(file))
    return parts


def tokenize_shard(job: TokenizeJob, tokenizer: Tokenizer, shard: int, report: Callable[[Progress], None]) -> None:
    """Tokenize one shard and write its part. `report` is called with the work done since its last call.

    Raises DistattnError if a text cannot be read or the part cannot be written.
    """
    prefix = job.part_prefix(shard)
    for suffix in (".json", ".bin", ".idx", ".xxh3"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(prefix + suffix)
    documents = [0] * len(job.shards[shard])
    total = Progress()
    with IndexedFileWriter(prefix, token_dtype(job.vocabulary)) as writer:
        for texts, stored_bytes in _batches(job, shard, documents):
            encoded = tokenizer.encode(texts)
            writer.add_many(*encoded)
            done = Progress(stored_bytes, len(texts), len(encoded.tokens), sum(len(text.encode()) for text in texts))
            total = total.plus(done)
            report(done)
    write_json(f"{prefix}.json", Part(documents, total.tokens, total.text_bytes)._asdict())


def publish(job: TokenizeJob, parts: Mapping[int, Part]) -> Manifest:
    """Join all parts under the final names, writing the manifest last. Return the manifest.

    Raises DistattnError if there is no text at all, or not enough disk space.
    """
    total = Progress(tokens=sum(part.tokens for part in parts.values()))
    if not total.tokens:
        raise DistattnError(f"tokenize: there is no text in {len(job.sources):,} files, such as {job.sources[0].file}.")
    documents = [0] * len(job.sources)
    for shard, pieces in enumerate(job.shards):
        for piece, count in zip(pieces, parts[shard].documents, strict=True):
            documents[piece.source] += count
    # a command killed from here on may leave files under their final names; this marker tells the next command to remove them
    with open(_publishing(job), "w"):
        pass
    try:
        with IndexedFileWriter(job.prefix, token_dtype(job.vocabulary)) as writer:
            for shard in range(len(job.shards)):
                file = IndexedFile.open(job.part_prefix(shard))
                if (file.documents, file.tokens) != (sum(parts[shard].documents), parts[shard].tokens):
                    raise DamagedDataError(
                        f"{file.prefix}.idx: its length differs from when it was written; remove {job.parts}."
                    )
                writer.append(file)
    except DistattnError:
        # the writer has already removed its files
        os.unlink(_publishing(job))
        raise
    sources = [
        {"file": source.file, "bytes": source.bytes, "modified": source.modified, "documents": count}
        for source, count in zip(job.sources, documents, strict=True)
    ]
    manifest = Manifest(
        command=_command_digest(job),
        tokenizer=job.tokenizer,
        tokenizer_digest=job.tokenizer_digest,
        vocabulary=job.vocabulary,
        eos=job.eos_id,
        field=job.field,
        documents=sum(documents),
        tokens=total.tokens,
        text_bytes=sum(part.text_bytes for part in parts.values()),
        sources=sources,
    )
    manifest.save(job.prefix)
    return manifest


def _batches(job: TokenizeJob, shard: int, documents: list[int]) -> Iterator[tuple[list[str], int]]:
    """Yield the texts of a shard in batches: (texts, stored bytes since the last batch). Also counts each piece's documents."""
    texts: list[str] = []
    characters = before = reported = 0
    for number, piece in enumerate(job.shards[shard]):
        for text, read in read_documents(job.sources[piece.source], piece, job.field):
            documents[number] += 1
            texts.append(text)
            characters += len(text)
            if characters >= _BATCH_CHARACTERS or len(texts) >= _BATCH_DOCUMENTS:
                yield texts, before + read - reported
                texts, characters, reported = [], 0, before + read
        before += piece.bytes
    yield texts, before - reported


def _command_digest(job: TokenizeJob) -> str:
    return combined_digest(job.sources, [os.path.basename(job.part_prefix(shard)) for shard in range(len(job.shards))])


def _is_lock(lock: int, file: str) -> bool:
    """Return True if the open lock file is still the file at this path."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(file))
    except FileNotFoundError:
        return False


def _publishing(job: TokenizeJob) -> str:
    return os.path.join(job.parts, "publishing")
