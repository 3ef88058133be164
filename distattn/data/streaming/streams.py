"""Pack documents from a third-party stream as they arrive, for data that cannot be planned because lengths are not known ahead.

A stream can give only some of the guarantees of a plan (`distattn.data.loader`). `StreamLoader.promises` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.data.packing.best_fit import BestFitPacks
from distattn.data.packing.pack_rule import PackCost, PackLimits
from distattn.data.packing.permutation import derived_key, permuted
from distattn.data.streaming.stream_documents import DocumentReader, StreamDocument
from distattn.data.streaming.stream_sources import stream_source
from distattn.ir.errors import DistattnError

# sentinel: no item of a stream is this object
_END = object()
_SETTINGS = ("context", "packs_per_step", "window", "max_documents")


class StreamLoader:
    """An iterator over steps that yields this share's micro-batches of each step as a list, ready for `ContextParallel.shard`.

    A micro-batch has `input_ids` (1, N), `document_lengths`, and `shift_labels` (1, N), where a token's label is the next token.
    Documents are packed by best fit, one window at a time. Those in the emptiest packs are carried over to the next window, which
    packs them before any others. Documents longer than `context` are cut. As in a plan, the label of a piece's last token is the
    next token of its document. Empty documents are left out.

    A second loop over the loader continues where the first loop stopped. When the stream ends, the last step may have fewer
    packs, and some shares may get none. To start another epoch, create a new loader. step: the number of steps yielded so far.
    """

    def __init__(
        self,
        stream: Any,
        *,
        context: int,
        packs_per_step: int,
        rank: int = 0,
        size: int = 1,
        field: str = "input_ids",
        tokenizer: Callable[[str], Sequence[int]] | None = None,
        window: int = 256,
        max_documents: int | None = None,
    ) -> None:
        """Check the settings and determine the kind of stream, without reading from it.

        stream: yields documents or batches of documents (see `stream_documents.py`); `stream_sources.py` lists the supported
        kinds. Pass the same stream on all shares. If the stream already splits its documents over ranks, use size=1.

        context: tokens per pack. packs_per_step: packs per step over all shares. rank, size: this share's number, and the number
        of shares. field: the key of the token ids or the text in documents that are mappings. tokenizer: a function from text to
        token ids. window: the number of packs filled at a time, rounded up to whole steps; their tokens are held in memory, 4
        bytes each. max_documents: the maximum number of documents per pack.

        Raises DistattnError naming the invalid argument.
        """
        self.context, self.packs_per_step, self.max_documents = context, packs_per_step, max_documents
        self.rank, self.size, self.window = rank, size, window
        for name in _SETTINGS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DistattnError(f"{name} is {value}; it must be at least 1.")
        if not 0 <= rank < size:
            raise DistattnError(f"rank {rank} of {size} shares: ranks are 0 to size - 1.")
        if size > packs_per_step:
            raise DistattnError(
                f"a step has {packs_per_step:,} packs, too few for {size:,} shares; use fewer shares, or more packs_per_step."
            )
        self.step = 0
        self._source = stream_source(stream)
        self._reader = DocumentReader(field, tokenizer)
        # the window that the next step belongs to, and the number of its steps yielded so far
        self._window = _WindowState(self._source.state(), [], 0, 0, False)
        self._given = 0
        self._steps: Iterator[list[dict[str, Any]]] | None = None

    def __iter__(self) -> StreamLoader:
        return self

    def __next__(self) -> list[dict[str, Any]]:
        if self._steps is None:
            self._steps = self._packed_steps()
        return next(self._steps)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume with any number of shares: tensors, integers and the stream's own state.

        The state is that at the start of the current window, whose documents are read again after a resume. It includes the
        tokens of the documents carried into the window, a few packs' worth.
        """
        carried = self._window.carried
        labels = [piece.labels for piece in carried if piece.labels is not None]
        return {
            "stream": self._window.stream,
            "documents": self._window.documents,
            "window": self._window.number,
            "ended": self._window.ended,
            "given": self._given,
            "step": self.step,
            "carried_lengths": [len(piece.ids) for piece in carried],
            "carried_ids": torch.from_numpy(np.concatenate([np.empty(0, np.int32), *(piece.ids for piece in carried)])),
            "carried_follows": [piece.follows for piece in carried],
            "carried_labels": torch.from_numpy(np.concatenate(labels)) if labels else None,
            "settings": {name: getattr(self, name) for name in _SETTINGS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state returned by `state_dict`. The stream must be at its start, and not yet read by this loader.

        Raises DistattnError if the state was saved with different settings, or if the stream rejects its part of the state.
        """
        if self._steps is not None:
            raise DistattnError(
                "this loader has begun; load a state into a new one, with the stream from its beginning."
            )
        if state.keys() != self.state_dict().keys():
            raise DistattnError(
                f"the state of a StreamLoader has {', '.join(self.state_dict())}, not {', '.join(state)}."
            )
        for name, value in state["settings"].items():
            if getattr(self, name) != value:
                raise DistattnError(
                    f"{name} is {getattr(self, name)}, but the state is of a run with {value}: the packs would differ."
                )
        self._source.load(state["stream"])
        ends = np.cumsum(state["carried_lengths"], dtype=np.int64)[:-1]
        ids = np.split(state["carried_ids"].numpy(), ends)
        labels = state["carried_labels"]
        own_labels = [None] * len(ids) if labels is None else np.split(labels.numpy(), ends)
        follows = state["carried_follows"]
        carried = [StreamDocument(*piece) for piece in zip(ids, own_labels, follows, strict=True)] if follows else []
        self._window = _WindowState(state["stream"], carried, state["documents"], state["window"], state["ended"])
        self._given, self.step = state["given"], state["step"]
        if carried:
            self._reader.has_labels = labels is not None

    def promises(self) -> list[str]:
        """Return sentences that tell the user what this loader guarantees for this stream and what it does not."""
        shares = f", so each of the {self.size} shares reads and packs the whole stream" if self.size > 1 else ""
        return [
            f"Packs and their order are the same at any number of shares: shares get packs of one order{shares}.",
            *self._source.promises,
            "Every document that the stream gives is in exactly one pack, or cut over several if it is longer than the context.",
            "Lengths are not known before their documents are read: nothing is planned farther ahead than this rank reads, and "
            "the ranks must exchange it.",
        ]

    def _packed_steps(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the steps from the current window on, skipping those already yielded."""
        self._reader.count = self._window.documents
        items = self._source.items()
        ended = self._window.ended
        while not ended:
            pieces, ended = self._read_window(items)
            steps, carried = self._pack(pieces, ended)
            following = _WindowState(self._source.state(), carried, self._reader.count, self._window.number + 1, ended)
            for packs in steps[self._given :]:
                self.step += 1
                self._given += 1
                if self._given == len(steps):
                    self._window, self._given = following, 0
                yield [_batch([pieces[piece] for piece in pack]) for pack in packs[self.rank :: self.size]]

    def _read_window(self, items: Iterator[Any]) -> tuple[list[StreamDocument], bool]:
        """Return (pieces, ended): the pieces of the next window, carried pieces first, and whether the stream has ended."""
        pieces = list(self._window.carried)
        tokens = self._packs_of_window * self.context - sum(len(piece.ids) for piece in pieces)
        most_pieces = self._packs_of_window * (self.max_documents or self.context)
        while tokens > 0 and len(pieces) < most_pieces:
            item = next(items, _END)
            if item is _END:
                return pieces, True
            for document in self._reader.documents(item):
                tokens -= len(document.ids)
                pieces += _cut(document, self.context)
        return pieces, False

    @property
    def _packs_of_window(self) -> int:
        return -(-self.window // self.packs_per_step) * self.packs_per_step

    def _pack(self, pieces: list[StreamDocument], ended: bool) -> tuple[list[list[np.ndarray]], list[StreamDocument]]:
        """Return (steps, carried): for each step its packs, as arrays of indices into `pieces`, and the pieces to carry over."""
        lengths = np.array([len(piece.ids) for piece in pieces], np.int64)
        if not len(lengths):
            return [], []
        packs = BestFitPacks(PackLimits(self.context, PackCost(), self.max_documents))
        carried = len(self._window.carried)
        pack_of_piece = np.concatenate(
            [packs.add(part) for part in (lengths[:carried], lengths[carried:]) if len(part)]
        )
        # packs with carried pieces leave the window first, then the fullest packs
        is_fresh = np.ones(len(packs.slots), np.bool_)
        is_fresh[pack_of_piece[:carried]] = False
        leaving = np.lexsort((packs.room, is_fresh))
        if not ended:
            leaving = leaving[: self._packs_of_window]
        # shuffle the packs, because best fit puts the long documents into the first packs
        leaving = leaving[permuted(np.arange(len(leaving)), len(leaving), derived_key(0, self._window.number))]
        members = np.split(np.argsort(pack_of_piece, kind="stable"), np.cumsum(np.bincount(pack_of_piece))[:-1])
        step = self.packs_per_step
        steps = [[members[pack] for pack in leaving[first : first + step]] for first in range(0, len(leaving), step)]
        staying = np.ones(len(members), np.bool_)
        staying[leaving] = False
        return steps, [pieces[piece] for piece in np.flatnonzero(staying[pack_of_piece]).tolist()]


class _WindowState(NamedTuple):
    """The state at the start of a window: the stream's state, carried pieces, number of documents read, and window index.

    ended: True if the stream has ended and everything was packed. It is stored because some streams start over when their last
    state is loaded.
    """

    stream: Any
    carried: list[StreamDocument]
    documents: int
    number: int
    ended: bool


def _cut(document: StreamDocument, context: int) -> list[StreamDocument]:
    """Cut a document into pieces of `context` tokens; the last may be shorter. Return no pieces for an empty document."""
    ids, labels, _ = document
    own_labels = ids if labels is None else labels
    pieces = []
    for begin in range(0, len(ids), context):
        end = begin + context
        follows = int(own_labels[end]) if end < len(ids) else IGNORE_INDEX
        pieces.append(StreamDocument(ids[begin:end], None if labels is None else labels[begin:end], follows))
    return pieces


def _batch(pieces: list[StreamDocument]) -> dict[str, Any]:
    """Return the micro-batch of a pack that consists of `pieces`."""
    labels = [np.append((piece.ids if piece.labels is None else piece.labels)[1:], piece.follows) for piece in pieces]
    return {
        "input_ids": torch.from_numpy(np.concatenate([piece.ids for piece in pieces]).astype(np.int64))[None],
        "document_lengths": [len(piece.ids) for piece in pieces],
        "shift_labels": torch.from_numpy(np.concatenate(labels).astype(np.int64))[None],
    }
