"""Turn the items of a stream, whatever their form, into documents of token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.ir.errors import DistattnError

_MOST_ID = (1 << 31) - 1


class StreamDocument(NamedTuple):
    """A document or a piece of a document. ids: token ids, int32 (n,). labels: each token's own label (not shifted), int32 (n,).

    labels is None if the stream has no labels. follows: the label of the token after the piece, or -100 if the document ends.
    """

    ids: np.ndarray
    labels: np.ndarray | None
    follows: int = IGNORE_INDEX


class DocumentReader:
    """A reader that extracts and counts the documents in stream items. count: the number of documents so far.

    An item is a document or a batch of documents. A document is a list or array of token ids, text (if there is a tokenizer), or
    a mapping that has one of these under `field`, and optionally `labels` of the same length. A batch is a list of documents, a
    2-D array, or a mapping of lists or 2-D arrays. If a mapping has an `attention_mask`, tokens whose mask is 0 are left out.
    """

    def __init__(self, field: str, tokenizer: Callable[[str], Sequence[int]] | None) -> None:
        self.count = 0
        self._field, self._tokenizer = field, tokenizer
        # whether the first document has labels, or None before it is read; all other documents must agree
        self.has_labels: bool | None = None

    def documents(self, item: Any) -> Iterator[StreamDocument]:
        """Yield the documents of an item. Raise DistattnError with the number of the first invalid document."""
        if isinstance(item, Mapping):
            yield from self._of_mapping(item)
        elif _holds_several(item):
            for entry in item:
                yield from self.documents(entry)
        else:
            yield self._document(item, None, None)

    def _of_mapping(self, item: Mapping[str, Any]) -> Iterator[StreamDocument]:
        field_value = item.get(self._field)
        if field_value is None:
            raise self._refused(
                f"has no {self._field!r}, but {', '.join(map(repr, item)) or 'nothing'}; name its field"
            )
        columns = [field_value, item.get("labels"), item.get("attention_mask")]
        if not _holds_several(field_value):
            yield self._document(*columns)
            return
        for name, column in zip(("labels", "attention_mask"), columns[1:], strict=True):
            if column is not None and len(column) != len(field_value):
                raise self._refused(f"is of a batch with {len(field_value)} rows and {len(column)} of {name}")
        for row in range(len(field_value)):
            yield self._document(*(None if column is None else column[row] for column in columns))

    def _document(self, content: Any, labels: Any, mask: Any) -> StreamDocument:
        if isinstance(content, str):
            if self._tokenizer is None:
                raise self._refused("is text; give a tokenizer, a function from text to token ids")
            content = self._tokenizer(content)
        ids = self._numbers(content, "token ids")
        wrong = ids[(ids < 0) | (ids > _MOST_ID)]
        if len(wrong):
            raise self._refused(f"has the token id {wrong[0]}; ids are 0 to {_MOST_ID:,}")
        if self.has_labels is None:
            self.has_labels = labels is not None
        if self.has_labels != (labels is not None):
            raise self._refused(f"has {'no ' if self.has_labels else ''}labels, unlike those before it")
        kept = None if mask is None else self._numbers(mask, "attention_mask") != 0
        own_labels = None if labels is None else self._numbers(labels, "labels")
        if own_labels is not None and own_labels.dtype.kind == "u" and len(own_labels):
            raise self._refused(
                f"has labels that are {own_labels.dtype}, which cannot hold {IGNORE_INDEX} (no label); give int32 or int64"
            )
        for name, column in (("labels", own_labels), ("attention_mask", kept)):
            if column is not None and len(column) != len(ids):
                raise self._refused(f"has {len(ids):,} token ids and {len(column):,} of {name}")
        if own_labels is not None:
            wrong = own_labels[((own_labels < 0) & (own_labels != IGNORE_INDEX)) | (own_labels > _MOST_ID)]
            if len(wrong):
                raise self._refused(f"has the label {wrong[0]}; labels are token ids, or {IGNORE_INDEX}")
        if kept is not None:
            ids, own_labels = ids[kept], None if own_labels is None else own_labels[kept]
        self.count += 1
        return StreamDocument(ids.astype(np.int32), None if own_labels is None else own_labels.astype(np.int32))

    def _numbers(self, values: Any, field: str) -> np.ndarray:
        """Return the values as an integer array (n,). Raise DistattnError if they are not integers in one dimension."""
        try:
            array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        except (ValueError, TypeError):
            array = np.empty(0, object)
        if array.ndim == 1 and not array.size and array.dtype != object:
            return np.empty(0, np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            kind = f"{array.dtype} {array.shape}" if array.dtype != object else f"a {type(values).__name__}"
            raise self._refused(f"has {field} that are {kind}; whole numbers (n,) are needed")
        return array

    def _refused(self, problem: str) -> DistattnError:
        return DistattnError(f"document {self.count:,} of the stream {problem}.")


def _holds_several(value: Any) -> bool:
    """Return True if a value holds several documents rather than one."""
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim == 2
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and isinstance(value[0], (Mapping, list, tuple, str, np.ndarray, Tensor))
        and not (isinstance(value[0], (np.ndarray, Tensor)) and value[0].ndim == 0)
    )
