"""One pack of a plan as a batch. Each rank reads only the tokens that it computes.

Token ids and labels are read from the corpora's files on request, or ahead of time on a thread.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from distattn.batch.packed_batch import IGNORE_INDEX, local_tensors
from distattn.data.files.corpus import Corpus
from distattn.data.files.label_masks import LabelMasks
from distattn.data.packing.pack_plan import Pack
from distattn.data.reading_thread import PendingRead, ReadingThread
from distattn.ir.cached import cached_property
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout

# gaps of at most this many tokens are read together with the tokens around them, because another read would cost more
_MOST_SKIPPED = 64


class PlannedBatch:
    """A pack as a `Batch` for the driver: pieces of documents, concatenated along one axis of N tokens.

    lengths: the number of tokens in each piece, in order. tokens: N. digest: identifies the batch, so it is equal on all ranks.
    bytes_read: bytes of tokens copied from files so far; if the files have digests, entire blocks of 16 KiB are read in order to
    check them.

    A token's label is the next token of its document, even if the piece ends before the document does. The last token of a
    document has no label (-100), nor has a token whose next token is masked (`distattn.data.files.label_masks`).
    """

    def __init__(
        self,
        pack: Pack,
        corpora: Sequence[Corpus],
        digest: str,
        *,
        masks: Sequence[LabelMasks | None] | None = None,
        thread: ReadingThread | None = None,
        vocabulary: int | None = None,
        device: torch.device | str = "cpu",
        pin_memory: bool = True,
        corpus_ids: bool = False,
    ) -> None:
        """Prepare the batch of a pack, without reading.

        corpora: in the order of the plan's sources. masks: the masks of each corpus; by default those next to its files. thread:
        performs the reads started by `start_reading`; without a thread they are done immediately. vocabulary: all ids must be
        below it. device: the device of a rank's shard. pin_memory: read into pinned memory if CUDA is available. corpus_ids: add
        the corpus of each token to a rank's shard.
        """
        self._pins, self._has_corpus_ids = pin_memory, corpus_ids
        self.device = torch.device(device)
        self.digest = digest
        self.lengths: tuple[int, ...] = tuple(pack.lengths)
        self.tokens = sum(self.lengths)
        self.bytes_read = 0
        self._pack, self._corpora, self._thread, self._vocabulary = pack, corpora, thread, vocabulary
        self._masks = [corpus.masks for corpus in corpora] if masks is None else masks
        self._begins = np.cumsum([0, *self.lengths])
        self._started: list[tuple[np.ndarray, PendingRead[tuple[Tensor, Tensor]]]] = []
        self._lock = threading.Lock()

    @cached_property
    def valid_labels(self) -> int:
        """The number of tokens with a label.

        The plan alone determines it, unless there are masks: then one byte is read for each token of the pack. Raises
        DamagedDataError if a mask is damaged.
        """
        if not any(self._masks):
            return self.tokens - int(self._pack.ends_document.sum())
        # each token of a piece has a label, except the last one if the document ends there
        targets = np.array(self.lengths) - self._pack.ends_document
        return sum(
            count if masks is None else int(masks.may_be_labels(document, start + 1, count).sum())
            for masks, document, start, count in zip(
                map(self._masks.__getitem__, self._pack.corpus.tolist()),
                self._pack.document.tolist(),
                self._pack.start.tolist(),
                targets.tolist(),
                strict=True,
            )
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """An empty tuple: this batch has no tensors to be filled on a GPU."""
        return ()

    def read_ahead(self, layout: Layout, rank: int) -> None:
        """Start reading a rank's shard, which `local_shard` will return."""
        self.start_reading(layout.tokens(rank))

    def local_shard(self, layout: Layout, rank: int, pad_to: int = 1) -> dict[str, Tensor]:
        """Return a rank's `input_ids`, `labels` and `position_ids`, all (1, T), padded to a multiple of `pad_to`.

        They are read now unless `read_ahead` has started reading them. With corpus_ids the result also has `corpus_ids` (1, T):
        the index of each token's corpus in the plan's sources, and -1 for padding.
        """
        tokens = layout.tokens(rank)
        ids, labels = (read.to(self.device, non_blocking=True) for read in self.read_tensors(tokens))
        part = local_tensors(ids, labels, layout, tokens, pad_to)
        if self._has_corpus_ids:
            padded_tokens = part["input_ids"].shape[1]
            part["corpus_ids"] = self._corpus_ids(tokens, padded_tokens).to(self.device, non_blocking=True)[None]
        return part

    def start_reading(self, tokens: np.ndarray) -> None:
        """Start reading the token ids and labels at positions `tokens`. The next `read` of the same positions returns them.

        Memory is allocated here. Read errors are raised by `read`.
        """
        work = self._prepared(tokens)
        started = self._thread.start(work) if self._thread else PendingRead(work)
        if not self._thread:
            started.run()
        self._started.append((np.array(tokens), started))

    def read(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (token ids, labels) at positions `tokens` (T,) of the pack, in the same order; both int64 (T,).

        The positions may be in any order. They are merged into runs of neighbours in one document; each run is read in one call,
        with one more token, the label of the last. Raises DistattnError for positions outside the pack, and DamagedDataError
        naming the file and byte if a file is damaged.
        """
        ids, labels = self.read_tensors(tokens)
        return ids.numpy(), labels.numpy()

    def read_tensors(self, tokens: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the result of `read` as CPU tensors, in pinned memory if CUDA is available."""
        for at, (others, started) in enumerate(self._started):
            if np.array_equal(others, tokens):
                del self._started[at]
                return started.result()
        return self._prepared(tokens)()

    def _corpus_ids(self, tokens: np.ndarray, padded_tokens: int) -> Tensor:
        """Return the corpus of the token at each position, padded with -1: int64 (padded_tokens,)."""
        corpus_ids = torch.full((padded_tokens,), -1, dtype=torch.int64, pin_memory=self._pins and _pins_memory())
        pieces = np.searchsorted(self._begins, tokens, "right") - 1
        corpus_ids.numpy()[: len(tokens)] = self._pack.corpus[pieces]
        return corpus_ids

    def _prepared(self, tokens: np.ndarray) -> Callable[[], tuple[Tensor, Tensor]]:
        """Allocate memory for the positions `tokens`. Return a function that reads their token ids and labels into it."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DistattnError(
                f"tokens must be positions in the pack, whole numbers (T,), not {tokens.dtype} {tokens.shape}."
            )
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < self.tokens):
            raise DistattnError(
                f"tokens has positions {tokens.min():,} to {tokens.max():,}, but the pack has {self.tokens:,} tokens."
            )
        pinned = self._pins and _pins_memory()
        ids, labels = (torch.empty(len(tokens), dtype=torch.int64, pin_memory=pinned) for _ in range(2))
        tokens = tokens.astype(np.int64)

        def fill() -> tuple[Tensor, Tensor]:
            if (np.diff(tokens) > 0).all():
                self._fill(tokens, ids.numpy(), labels.numpy())
            else:
                ordered, place = np.unique(tokens, return_inverse=True)
                ordered_ids, ordered_labels = np.empty((2, len(ordered)), np.int64)
                self._fill(ordered, ordered_ids, ordered_labels)
                np.take(ordered_ids, place, out=ids.numpy())
                np.take(ordered_labels, place, out=labels.numpy())
            return ids, labels

        return fill

    def _fill(self, tokens: np.ndarray, ids: np.ndarray, labels: np.ndarray) -> None:
        """Read the tokens at ascending positions into `ids` and `labels`. All three arrays are (T,)."""
        copied = 0
        for first, last, piece in self._runs(tokens):
            corpus, document = self._corpora[self._pack.corpus[piece]], int(self._pack.document[piece])
            begin = int(tokens[first] - self._begins[piece]) + int(self._pack.start[piece])
            count = int(tokens[last - 1] - tokens[first]) + 1
            # also read the token after the last one, for its label, unless the document ends
            is_end = tokens[last - 1] + 1 == self._begins[piece + 1] and self._pack.ends_document[piece]
            read_tokens = corpus.read(document, begin, count + (not is_end), self._vocabulary)
            copied += read_tokens.nbytes
            # use a slice if no token is skipped
            at = slice(0, count) if last - first == count else tokens[first:last] - tokens[first]
            following = np.full(count, IGNORE_INDEX)
            following[: len(read_tokens) - 1] = read_tokens[1:]
            if (masks := self._masks[self._pack.corpus[piece]]) is not None:
                following[: len(read_tokens) - 1][~masks.may_be_labels(document, begin + 1, len(read_tokens) - 1)] = (
                    IGNORE_INDEX
                )
            ids[first:last] = read_tokens[:count][at]
            labels[first:last] = following[at]
        with self._lock:
            self.bytes_read += copied

    def _runs(self, tokens: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """Return (first, last + 1, piece) for each run of ascending positions (T,) that is read in one call."""
        gaps = np.flatnonzero(np.diff(tokens) > _MOST_SKIPPED + 1) + 1
        limits = np.unique(np.concatenate([[0], gaps, np.searchsorted(tokens, self._begins[1:-1]), [len(tokens)]]))
        pieces = np.searchsorted(self._begins, tokens[limits[:-1]], "right") - 1
        return zip(limits[:-1].tolist(), limits[1:].tolist(), pieces.tolist(), strict=True)


@functools.cache
def _pins_memory() -> bool:
    return torch.cuda.is_available()
