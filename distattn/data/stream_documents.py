"""From an item of a stream, whatever its shape, to documents of token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.ir.errors import DistattnError

_MOST_ID = (1 << 31) - 1


class StreamDocument(NamedTuple):
    """Token ids, int32 (n,), and each token's own label, int32 (n,), or None where the stream has no labels.

    follows: the own label of the token after the last one, where this is a piece of a document that goes on; else -100.
    """

    ids: np.ndarray
    labels: np.ndarray | None
    follows: int = IGNORE_INDEX


class DocumentReader:
    """Finds the documents in items, and counts them. count: documents so far; they are numbered from 0.

    An item is a document, or a batch of them. A document is a list or array of token ids, or a mapping that has them under
    `field`, and optionally `labels` of the same length; or text, where there is a tokenizer. A batch is a list of documents, an
    array of rows, or a mapping of lists or rows. Where a mapping has an `attention_mask`, tokens whose mask is 0 are left out.
    """

    def __init__(self, field: str, tokenizer: Callable[[str], Sequence[int]] | None) -> None:
        self.count = 0
        self._field, self._tokenizer = field, tokenizer
        # of the first document; the others have to be alike
        self.has_labels: bool | None = None

    def documents(self, item: Any) -> Iterator[StreamDocument]:
        """Yield the documents of an item. Raises DistattnError naming the first by its number that is none."""
        if isinstance(item, Mapping):
            yield from self._of_mapping(item)
        elif _holds_several(item):
            for one in item:
                yield from self.documents(one)
        else:
            yield self._document(item, None, None)

    def _of_mapping(self, item: Mapping[str, Any]) -> Iterator[StreamDocument]:
        given = item.get(self._field)
        if given is None:
            raise self._refused(
                f"has no {self._field!r}, but {', '.join(map(repr, item)) or 'nothing'}; name its field"
            )
        columns = [given, item.get("labels"), item.get("attention_mask")]
        if not _holds_several(given):
            yield self._document(*columns)
            return
        for name, column in zip(("labels", "attention_mask"), columns[1:], strict=True):
            if column is not None and len(column) != len(given):
                raise self._refused(f"is of a batch with {len(given)} rows and {len(column)} of {name}")
        for row in range(len(given)):
            yield self._document(*(None if column is None else column[row] for column in columns))

    def _document(self, given: Any, labels: Any, mask: Any) -> StreamDocument:
        if isinstance(given, str):
            if self._tokenizer is None:
                raise self._refused("is text; give a tokenizer, a function from text to token ids")
            given = self._tokenizer(given)
        ids = self._numbers(given, "token ids")
        wrong = ids[(ids < 0) | (ids > _MOST_ID)]
        if len(wrong):
            raise self._refused(f"has the token id {wrong[0]}; ids are 0 to {_MOST_ID:,}")
        if self.has_labels is None:
            self.has_labels = labels is not None
        if self.has_labels != (labels is not None):
            raise self._refused(f"has {'no ' if self.has_labels else ''}labels, unlike those before it")
        kept = None if mask is None else self._numbers(mask, "attention_mask") != 0
        own = None if labels is None else self._numbers(labels, "labels")
        if own is not None and own.dtype.kind == "u" and len(own):
            raise self._refused(
                f"has labels that are {own.dtype}, which cannot hold {IGNORE_INDEX} (no label); give int32 or int64"
            )
        for name, column in (("labels", own), ("attention_mask", kept)):
            if column is not None and len(column) != len(ids):
                raise self._refused(f"has {len(ids):,} token ids and {len(column):,} of {name}")
        if own is not None and len(wrong := own[((own < 0) & (own != IGNORE_INDEX)) | (own > _MOST_ID)]):
            raise self._refused(f"has the label {wrong[0]}; labels are token ids, or {IGNORE_INDEX}")
        if kept is not None:
            ids, own = ids[kept], None if own is None else own[kept]
        self.count += 1
        return StreamDocument(ids.astype(np.int32), None if own is None else own.astype(np.int32))

    def _numbers(self, given: Any, what: str) -> np.ndarray:
        """Whole numbers (n,). Raises DistattnError for anything else."""
        try:
            array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
        except (ValueError, TypeError):
            array = np.empty(0, object)
        if array.ndim == 1 and not array.size and array.dtype != object:
            return np.empty(0, np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            kind = f"{array.dtype} {array.shape}" if array.dtype != object else f"a {type(given).__name__}"
            raise self._refused(f"has {what} that are {kind}; whole numbers (n,) are wanted")
        return array

    def _refused(self, what: str) -> DistattnError:
        return DistattnError(f"document {self.count:,} of the stream {what}.")


def _holds_several(value: Any) -> bool:
    """Whether a value is several documents, and not one."""
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim == 2
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and isinstance(value[0], (Mapping, list, tuple, str, np.ndarray, Tensor))
        and not (isinstance(value[0], (np.ndarray, Tensor)) and value[0].ndim == 0)
    )
