"""Adapters for document streams from other libraries: how each kind saves its state, and what it guarantees.

Streams are recognised by their methods, so none of the libraries needs to be installed:

* `state_dict(num_samples, from_beginning)`: mosaicml-streaming's `StreamingDataset`, whose samples the reader must count;
* `state_dict()` and `load_state_dict`: `torchdata.StatefulDataLoader`, Hugging Face's `IterableDataset`, and others;
* a length and indexing: lists, arrays, Hugging Face's `Dataset`, map-style datasets;
* any other iterable: it has no state, so a resume reads the earlier items again and skips them.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

import torch.distributed as dist

from distattn.ir.errors import DistattnError


class StreamSource(Protocol):
    """A stream and its state. promises: sentences for the user about resuming and repeated documents."""

    promises: list[str]

    def items(self) -> Iterator[Any]:
        """Yield the items from the loaded state on, or from the start if no state was loaded."""

    def state(self) -> Any:
        """Return the state after the last item read."""

    def load(self, state: Any) -> None:
        """Load the state from which `items` starts. Call this before any item is read."""


def stream_source(stream: Any) -> StreamSource:
    """Return the adapter for a stream.

    Raises DistattnError if the object is not a stream, or splits its documents over ranks in a way that cannot be resumed.
    """
    if isinstance(stream, (str, bytes, Mapping)):
        raise DistattnError(f"a stream must be an iterable of documents, not a {type(stream).__name__}.")
    if callable(getattr(stream, "state_dict", None)) and callable(getattr(stream, "load_state_dict", None)):
        counted = {"num_samples", "from_beginning"} <= inspect.signature(stream.state_dict).parameters.keys()
        return _CountedStream(stream) if counted else _StatefulStream(stream)
    # iterable datasets of mosaicml or torch may have a length, so a length alone does not mean that they can be indexed
    if hasattr(stream, "__getitem__") and hasattr(stream, "__len__"):
        return _Sequence(stream)
    if not hasattr(stream, "__iter__"):
        raise DistattnError(f"a stream must be an iterable of documents, not a {type(stream).__name__}.")
    return _PlainStream(stream)


class _StatefulStream:
    """A stream that saves and loads its own state."""

    promises = [
        "Resuming is as exact as the stream's own state_dict: documents that waited in a shuffle buffer of a Hugging Face "
        "IterableDataset, for example, are left out after a resume, and other streams may read some again.",
        "The stream determines whether documents are repeated, and whether their order depends on workers or ranks.",
    ]

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        # until it is iterated, a stream may not return the state that was loaded into it
        self._before_reading = stream.state_dict()
        self._began = False

    def items(self) -> Iterator[Any]:
        for item in self._stream:
            self._began = True
            yield item

    def state(self) -> Any:
        return self._stream.state_dict() if self._began else self._before_reading

    def load(self, state: Any) -> None:
        self._stream.load_state_dict(state)
        self._before_reading = state


class _CountedStream:
    """A `StreamingDataset` of mosaicml-streaming, whose `state_dict` must be told the number of samples read."""

    promises = [
        "Resuming is exact, and reads only the window's own documents again: mosaicml-streaming can begin anywhere in an epoch.",
        "mosaicml-streaming repeats a few samples if canonical nodes have different numbers of them, and its order depends on "
        "num_canonical_nodes, shuffle_seed, batch_size and num_workers: keep them.",
    ]

    def __init__(self, stream: Any) -> None:
        # count the ranks as mosaicml-streaming does
        ranks = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
        if ranks // (getattr(stream, "replication", None) or 1) > 1:
            raise DistattnError(
                f"the stream deals out its samples to {ranks} ranks by itself; ranks that pack them read different numbers, "
                f"which its state does not record: make it with replication={ranks}, and deal out packs by rank and size."
            )
        self._stream = stream
        self._read = 0
        self._before_reading = stream.state_dict(num_samples=0, from_beginning=False)

    def items(self) -> Iterator[Any]:
        for item in self._stream:
            self._read += 1
            yield item

    def state(self) -> Any:
        return (
            self._stream.state_dict(num_samples=self._read, from_beginning=False)
            if self._read
            else self._before_reading
        )

    def load(self, state: Any) -> None:
        self._stream.load_state_dict(state)
        self._before_reading = state


class _Sequence:
    """A stream that can be indexed. Its state is the next index."""

    promises = [
        "Resuming is exact, and reads only the window's own documents again: the stream has items by number.",
        "Nothing is repeated or left out; the order is that of the numbers.",
    ]

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._next = 0

    def items(self) -> Iterator[Any]:
        while self._next < len(self._stream):
            self._next += 1
            yield self._stream[self._next - 1]

    def state(self) -> int:
        return self._next

    def load(self, state: int) -> None:
        if not 0 <= state <= len(self._stream):
            raise DistattnError(
                f"the state is of a stream with {state:,} items or more; this one has {len(self._stream):,}: give the same one."
            )
        self._next = state


class _PlainStream:
    """A stream without state of its own. Its state is the number of items read, which a resume skips."""

    promises = [
        "Resuming reads all earlier items again, to skip them: the stream has no state. It must begin at its beginning and "
        "have the same order; this is not checked.",
        "The stream determines whether documents are repeated.",
    ]

    def __init__(self, stream: Iterable[Any]) -> None:
        self._stream = stream
        self._skipped = self._read = 0

    def items(self) -> Iterator[Any]:
        items = iter(self._stream)
        skipped = sum(1 for _ in islice(items, self._skipped))
        if skipped < self._skipped:
            raise DistattnError(
                f"the stream ended after {skipped:,} items, but the state is of one with {self._skipped:,} or more: give the "
                "same one, from its beginning."
            )
        for item in items:
            self._read += 1
            yield item

    def state(self) -> int:
        return self._skipped + self._read

    def load(self, state: int) -> None:
        self._skipped = state
