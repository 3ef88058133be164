"""One pack of a plan as a batch, of which a rank reads only the tokens that it computes.

Token ids and labels are read from the corpora's files at the moment they are asked for, or ahead on a thread.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from distattn.batch.packed_batch import IGNORE_INDEX, local_tensors
from distattn.data.corpus import Corpus
from distattn.data.label_masks import LabelMasks
from distattn.data.pack_plan import Pack
from distattn.data.reading_thread import ReadingThread, Started
from distattn.ir.cached import cached_property
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout

# so few tokens that nobody asked for are read with those around them: another call would cost more
_MOST_SKIPPED = 64


class PlannedBatch:
    """A pack: pieces of documents, laid end to end on one axis of N tokens; a `Batch` to the driver.

    lengths: tokens of each piece, in order. tokens: N. digest: two ranks with equal digests have the same batch. bytes_read: of
    the tokens that were copied out of files so far; where files have digests, whole blocks of 16 KiB are read to check them.

    A token's label is its successor in its document, also where the piece ends before the document does. The last token of a
    document has none (-100), nor has one whose successor is masked (`distattn.data.label_masks`).
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
        """corpora: in the order of the plan's sources. masks: of each corpus; by default those that lie beside its files.

        thread: does what `start_reading` begins; without one it is done at once. vocabulary: all ids must be below it. device: of
        a rank's part. pin_memory: read into pinned memory where CUDA is available. corpus_ids: a rank's part says of which corpus
        each token is.
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
        self._started: list[tuple[np.ndarray, Started[tuple[Tensor, Tensor]]]] = []
        self._lock = threading.Lock()

    @cached_property
    def valid_labels(self) -> int:
        """How many of the N tokens have a label.

        Needs nothing but the plan; where there are masks, those of the whole pack: a byte for each token. Raises
        DamagedDataError where a mask is damaged.
        """
        if not any(self._masks):
            return self.tokens - int(self._pack.ends_document.sum())
        # those of a piece's first token to its last but one, and of the last where the document goes on
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
        """None: nobody fills them on a GPU."""
        return ()

    def read_ahead(self, layout: Layout, rank: int) -> None:
        """A rank will ask for its part soon."""
        self.start_reading(layout.tokens(rank))

    def local_shard(self, layout: Layout, rank: int, pad_to: int = 1) -> dict[str, Tensor]:
        """`input_ids`, `labels` and `position_ids` (1, T) of a rank, read now or ahead; padded to a multiple.

        With corpus_ids also these (1, T): the number of each token's corpus in the plan's sources, -1 of padding.
        """
        tokens = layout.tokens(rank)
        ids, labels = (read.to(self.device, non_blocking=True) for read in self.read_tensors(tokens))
        part = local_tensors(ids, labels, layout, tokens, pad_to)
        if self._has_corpus_ids:
            padded_tokens = part["input_ids"].shape[1]
            part["corpus_ids"] = self._corpus_ids(tokens, padded_tokens).to(self.device, non_blocking=True)[None]
        return part

    def start_reading(self, tokens: np.ndarray) -> None:
        """Have the token ids and labels at these positions read ahead: the next `read` of the same positions returns them.

        Memory is allocated here; errors of reading are raised by `read`.
        """
        work = self._prepared(tokens)
        started = self._thread.start(work) if self._thread else Started(work)
        if not self._thread:
            started.run()
        self._started.append((np.array(tokens), started))

    def read(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, labels) at positions `tokens` (T,) of the pack's axis, in their order; int64 (T,) both.

        Positions may be any, in any order. They are merged into runs: of each run of neighbours in one document its tokens are
        copied, and one more for the last label. Raises DistattnError for positions that the pack does not have, and
        DamagedDataError naming file and byte where a file is damaged.
        """
        ids, labels = self.read_tensors(tokens)
        return ids.numpy(), labels.numpy()

    def read_tensors(self, tokens: np.ndarray) -> tuple[Tensor, Tensor]:
        """As `read`, but tensors on the CPU, pinned where CUDA is available."""
        for at, (others, started) in enumerate(self._started):
            if np.array_equal(others, tokens):
                del self._started[at]
                return started.result()
        return self._prepared(tokens)()

    def _corpus_ids(self, tokens: np.ndarray, padded_tokens: int) -> Tensor:
        """The corpus of each of these positions, then -1: int64 (padded_tokens,)."""
        found = torch.full((padded_tokens,), -1, dtype=torch.int64, pin_memory=self._pins and _pins_memory())
        pieces = np.searchsorted(self._begins, tokens, "right") - 1
        found.numpy()[: len(tokens)] = self._pack.corpus[pieces]
        return found

    def _prepared(self, tokens: np.ndarray) -> Callable[[], tuple[Tensor, Tensor]]:
        """What reads these positions into memory that is allocated now."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DistattnError(
                f"tokens are positions in the pack, whole numbers (T,), not {tokens.dtype} {tokens.shape}."
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
                found = np.empty((2, len(ordered)), np.int64)
                self._fill(ordered, *found)
                np.take(found[0], place, out=ids.numpy())
                np.take(found[1], place, out=labels.numpy())
            return ids, labels

        return fill

    def _fill(self, tokens: np.ndarray, ids: np.ndarray, labels: np.ndarray) -> None:
        """Read rising positions, all three (T,)."""
        copied = 0
        for first, last, piece in self._runs(tokens):
            corpus, document = self._corpora[self._pack.corpus[piece]], int(self._pack.document[piece])
            begin = int(tokens[first] - self._begins[piece]) + int(self._pack.start[piece])
            count = int(tokens[last - 1] - tokens[first]) + 1
            # the token after the last is read, unless there is none
            is_end = tokens[last - 1] + 1 == self._begins[piece + 1] and self._pack.ends_document[piece]
            found = corpus.read(document, begin, count + (not is_end), self._vocabulary)
            copied += found.nbytes
            # a slice where nothing is skipped
            at = slice(0, count) if last - first == count else tokens[first:last] - tokens[first]
            following = np.full(count, IGNORE_INDEX)
            following[: len(found) - 1] = found[1:]
            if (masks := self._masks[self._pack.corpus[piece]]) is not None:
                following[: len(found) - 1][~masks.may_be_labels(document, begin + 1, len(found) - 1)] = IGNORE_INDEX
            ids[first:last] = found[:count][at]
            labels[first:last] = following[at]
        with self._lock:
            self.bytes_read += copied

    def _runs(self, tokens: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(first, last + 1, piece) of tokens that are read at once, for rising positions (T,)."""
        gaps = np.flatnonzero(np.diff(tokens) > _MOST_SKIPPED + 1) + 1
        limits = np.unique(np.concatenate([[0], gaps, np.searchsorted(tokens, self._begins[1:-1]), [len(tokens)]]))
        pieces = np.searchsorted(self._begins, tokens[limits[:-1]], "right") - 1
        return zip(limits[:-1].tolist(), limits[1:].tolist(), pieces.tolist(), strict=True)


@functools.cache
def _pins_memory() -> bool:
    return torch.cuda.is_available()
