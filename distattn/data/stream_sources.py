"""Streams of documents that others made, with the state that each kind has, and what each can promise.

Kinds are told apart by what they offer, so that none of the packages needs to be installed:

* `state_dict(num_samples, from_beginning)`: mosaicml-streaming's `StreamingDataset`, which has its samples counted;
* `state_dict()` and `load_state_dict`: `torchdata.StatefulDataLoader`, Hugging Face's `IterableDataset`, and others;
* a length and items by number: lists, arrays, Hugging Face's `Dataset`, map-style datasets;
* anything else that can be iterated, which has no state: what was read before is read again and skipped.
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
    """A stream and its state. promises: what it says of resuming and of repeats."""

    promises: list[str]

    def items(self) -> Iterator[Any]:
        """The items from the loaded state on, or from the beginning."""

    def state(self) -> Any:
        """The state after the last item that was read."""

    def load(self, state: Any) -> None:
        """Have `items` begin there. Called before any item is read."""


def stream_source(stream: Any) -> StreamSource:
    """What a stream is. Raises DistattnError where it is none, or deals out its documents in a way that cannot be resumed."""
    if isinstance(stream, (str, bytes, Mapping)):
        raise DistattnError(f"a stream is an iterable of documents, not a {type(stream).__name__}.")
    if callable(getattr(stream, "state_dict", None)) and callable(getattr(stream, "load_state_dict", None)):
        counted = {"num_samples", "from_beginning"} <= inspect.signature(stream.state_dict).parameters.keys()
        return _CountedStream(stream) if counted else _StatefulStream(stream)
    # a mosaicml or torch iterable dataset may have a length; what has items by number as well can be entered anywhere
    if hasattr(stream, "__getitem__") and hasattr(stream, "__len__"):
        return _Sequence(stream)
    if not hasattr(stream, "__iter__"):
        raise DistattnError(f"a stream is an iterable of documents, not a {type(stream).__name__}.")
    return _PlainStream(stream)


class _StatefulStream:
    """Says its state itself."""

    promises = [
        "Resuming is as exact as the stream's own state_dict: documents that waited in a shuffle buffer of a Hugging Face "
        "IterableDataset, for example, are left out after a resume, and other streams may read some again.",
        "Whether documents are repeated, and whether their order depends on workers or ranks, is the stream's affair.",
    ]

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        # some say the state that was loaded only once they are iterated
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
    """Has its samples counted by the reader: a `StreamingDataset`."""

    promises = [
        "Resuming is exact, and reads only the window's own documents again: mosaicml-streaming enters its epoch anywhere.",
        "mosaicml-streaming repeats a few samples where the canonical nodes have unequally many, and its order depends on "
        "num_canonical_nodes, shuffle_seed, batch_size and num_workers: keep them.",
    ]

    def __init__(self, stream: Any) -> None:
        # as the package itself finds it
        ranks = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
        if ranks // (getattr(stream, "replication", None) or 1) > 1:
            raise DistattnError(
                f"the stream deals out its samples to {ranks} ranks by itself; ranks that pack them read unequally many, which "
                f"its state cannot tell: make it with replication={ranks}, and have rank and size deal out packs."
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
    """Has items by number; state is the next number."""

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
    """Has no state; state is the number of items that were read, which are skipped."""

    promises = [
        "Resuming reads everything before again, to skip it: the stream has no state. It must begin at its beginning and "
        "come in the same order; that it does is not checked.",
        "Whether documents are repeated is the stream's affair.",
    ]

    def __init__(self, stream: Iterable[Any]) -> None:
        self._stream = stream
        self._skipped = self._read = 0

    def items(self) -> Iterator[Any]:
        items = iter(self._stream)
        found = sum(1 for _ in islice(items, self._skipped))
        if found < self._skipped:
            raise DistattnError(
                f"the stream ended after {found:,} items, but the state is of one with {self._skipped:,} or more: give the same "
                "one, from its beginning."
            )
        for item in items:
            self._read += 1
            yield item

    def state(self) -> int:
        return self._skipped + self._read

    def load(self, state: int) -> None:
        self._skipped = state
