"""Pack a stream of documents into steps, one window at a time.

A window is a number of whole steps. Slightly more documents than would fill it are read and packed, and the fullest packs become
its steps. The documents of the other packs are carried over: the next window packs them first, fills their packs further, and
puts these packs into its steps before any others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from distattn.data.packing.best_fit import BestFitPacks
from distattn.data.packing.blend import DocumentColumns
from distattn.data.packing.cut_documents import CorpusSpans, cut_documents
from distattn.data.packing.pack_rule import PackLimits, PackRule
from distattn.data.packing.permutation import derived_key, permuted

# a piece of a document: tokens [start, start + length), the epoch in which it is read, and whether the document ends with it
PIECE = np.dtype(
    [
        ("document", "<u4"),
        ("start", "<u4"),
        ("length", "<u4"),
        ("corpus", "<u2"),
        ("epoch", "<u2"),
        ("ends_document", "?"),
    ]
)
# tells the keys of windows from the keys of corpora, whose indices are lower
_WINDOW = 1 << 32
# a document is packed at most this many windows after the window it was read for, whatever the rule (`plan_windows`)
MOST_WINDOWS_WAITED = 12
# an extra 1 / _MORE_PART of a window is read, so that the emptiest packs can be carried over and filled up
_MORE_PART = 64
# numbers below this sort faster, because numpy uses a radix sort for 16-bit integers
_FEW = 1 << 16


class PackedWindow(NamedTuple):
    """The packed steps of a window.

    packs: number of packs in each step, int64 (S,). pieces: number of pieces in each pack, int64 (P,). rows: all pieces, PIECE
    (N,). waited: number of windows through which each piece was carried, int64 (N,).
    """

    packs: np.ndarray
    pieces: np.ndarray
    rows: np.ndarray
    waited: np.ndarray


def plan_windows(
    rule: PackRule,
    documents: Iterator[DocumentColumns],
    seed: int,
    spans: Mapping[int, CorpusSpans] = MappingProxyType({}),
) -> Iterator[PackedWindow]:
    """Yield packed windows until all documents are packed. Each has a whole number of steps, at least one.

    Every document, or every piece of it, is in exactly one pack. Every step is full, except that the last may have fewer packs,
    and that packs of several slots may leave slots free that no other pack fits into. A document is packed in the window it was
    read for or in one of the next two, or one of the next six if the documents or the cost of a pack are capped. A change of the
    context length within that time may double it.

    spans: by corpus index, the spans of tokens that must stay in one pack. Documents to be kept whole must fit into a step
    (`make_pack_plan` checks this). Raises DistattnError for a span that does not fit into a pack.
    """
    reader = _DocumentReader(documents)
    rows, read_in = np.empty(0, PIECE), np.empty(0, np.int64)
    step = window = 0
    while True:
        packs_per_step, limits = rule.packs_at(step), rule.limits_at(step)
        steps = _steps_of_window(rule, step)
        rows, source = _cut(rows, rule, step, spans)
        read_in = read_in[source]
        packs = BestFitPacks(limits)
        pack_of_row = packs.add(_lengths(rows))
        carried_packs = len(packs.slots)
        slots = steps * packs_per_step
        # one pass is enough unless documents were cut at spans, because such pieces may cost less than the reader assumed
        while packs.slots.sum() < slots:
            fresh, _ = _cut(reader.read(limits, slots + slots // _MORE_PART, _lengths(rows)), rule, step, spans)
            if not len(fresh):
                break
            pack_of_row = np.concatenate([pack_of_row, packs.add(_lengths(fresh))])
            rows = np.concatenate([rows, fresh])
            read_in = np.concatenate([read_in, np.full(len(fresh), window)])
        if not len(rows):
            return
        key = derived_key(seed, _WINDOW, window)
        work = np.bincount(pack_of_row, _lengths(rows) ** 2) if rule.level else None
        step_of_pack = _choose_steps(packs, carried_packs, steps, packs_per_step, work, key)
        leaving, order = _order_of_rows(step_of_pack, pack_of_row, _lengths(rows) > limits.tokens, key)
        yield PackedWindow(
            np.bincount(step_of_pack[step_of_pack >= 0]),
            np.bincount(pack_of_row, minlength=len(step_of_pack))[leaving],
            rows.take(order),
            window - read_in[order],
        )
        staying = step_of_pack[pack_of_row] < 0
        rows, read_in = rows.compress(staying), read_in[staying]
        step += int(step_of_pack.max()) + 1
        window += 1


class _DocumentReader:
    """A reader that takes only as many documents from a stream as are needed."""

    def __init__(self, documents: Iterator[DocumentColumns]) -> None:
        self._documents = documents
        self._buffer = DocumentColumns(*(np.empty(0, np.int64) for _ in range(4)))

    def read(self, limits: PackLimits, slots: int, carried: np.ndarray) -> np.ndarray:
        """Read just enough documents to fill `slots` slots together with the carried pieces. Return PIECE (D,).

        carried: lengths of the carried pieces. "Enough" means that the tokens, or the number or cost of documents if capped, use
        up the capacity of the slots. Reads all remaining documents if there are too few.
        """
        read = [np.empty(0, PIECE)]
        missing = [total - int(sums[-1]) if len(sums) else total for total, sums in self._sums(limits, slots, carried)]
        while min(missing) > 0:
            if not len(self._buffer.length):
                block = next(self._documents, None)
                if block is None:
                    break
                self._buffer = block
            sums = [sums for _, sums in self._sums(limits, slots, self._buffer.length)]
            count = min(
                int(np.searchsorted(running, needed)) + 1 for running, needed in zip(sums, missing, strict=True)
            )
            count = min(count, len(self._buffer.length))
            missing = [needed - int(running[count - 1]) for running, needed in zip(sums, missing, strict=True)]
            rows = np.zeros(count, PIECE)
            rows["ends_document"] = True
            for name in self._buffer._fields:
                rows[name] = getattr(self._buffer, name)[:count]
            read.append(rows)
            self._buffer = self._buffer.rows(slice(count, None))
        return np.concatenate(read)

    def _sums(self, limits: PackLimits, slots: int, lengths: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Return, for each limit, (capacity of `slots` slots, running sums (D,) of what D documents use of it)."""
        sums = [(slots * limits.tokens, np.cumsum(lengths))]
        if limits.max_documents is not None:
            sums.append((slots * limits.max_documents, np.arange(1, len(lengths) + 1)))
        if limits.max_cells is not None:
            # a piece alone in a pack uses at most the whole pack, regardless of its cost
            whole, rest = np.divmod(lengths, limits.tokens)
            most_of_rest = np.where(rest > 0, np.minimum(limits.cost.of(rest), limits.max_cells), 0)
            whole_cells = min(limits.cost.of(limits.tokens), limits.max_cells)
            sums.append((slots * limits.max_cells, np.cumsum(whole * whole_cells + most_of_rest)))
        return sums


def _lengths(rows: np.ndarray) -> np.ndarray:
    """Return the number of tokens in each piece, int64 (N,)."""
    return rows["length"].astype(np.int64)


def _steps_of_window(rule: PackRule, step: int) -> int:
    """Return the number of steps in the window that begins at `step`.

    The steps up to a change of the context length are split into windows of similar size.
    """
    steps = -(-rule.window // rule.packs_at(step))
    change = rule.next_change(step)
    if change is None:
        return steps
    return -(-(change - step) // -(-(change - step) // steps))


def _cut(
    rows: np.ndarray, rule: PackRule, step: int, spans: Mapping[int, CorpusSpans]
) -> tuple[np.ndarray, np.ndarray]:
    """Cut pieces longer than a pack, unless the rule keeps them whole. Return (PIECE (N,), the source row of each (N,))."""
    if rule.long_documents == "keep":
        return rows, np.arange(len(rows))
    return cut_documents(rows, rule.context_at(step), spans)


def _choose_steps(
    packs: BestFitPacks, carried: int, steps: int, packs_per_step: int, work: np.ndarray | None, key: int
) -> np.ndarray:
    """Return the step of each pack, counted from 0, or -1 for packs to carry over, (P,).

    The first `carried` packs get a step before any others. work: the work of each pack (P,), to give each step packs of nearly
    equal work, or None to shuffle. Steps with free slots come last, and no step is empty.
    """
    slots, room = packs.slots, packs.room
    step = np.full(len(slots), -1)
    free = np.full(steps, packs_per_step)
    is_fresh = np.arange(len(slots)) >= carried
    # place packs of several slots first, largest first, each in the first step with enough free slots; fresh packs take only
    # slots that carried packs do not need
    spare = steps * packs_per_step - int(slots[:carried].sum())
    large = np.flatnonzero(slots > 1)
    for pack in large[np.lexsort((-slots[large], is_fresh[large]))].tolist():
        fitting = np.flatnonzero(free >= slots[pack])
        if len(fitting) and (pack < carried or slots[pack] <= spare):
            step[pack] = fitting[0]
            free[fitting[0]] -= slots[pack]
            spare -= int(slots[pack]) if pack >= carried else 0
    small = np.flatnonzero(slots == 1)
    small = small[np.lexsort((room[small], is_fresh[small]))][: free.sum()]
    if work is None:
        small = small[permuted(np.arange(len(small)), len(small), derived_key(key, 0))]
    else:
        small = small[np.argsort(-work[small], kind="stable")]
    step[small] = np.repeat(np.arange(steps), free)[: len(small)]
    return _shuffle_steps(step, slots, packs_per_step, derived_key(key, 1))


def _shuffle_steps(step: np.ndarray, slots: np.ndarray, packs_per_step: int, key: int) -> np.ndarray:
    """Number the steps again: full steps first, shuffled, then steps with free slots. Steps without packs are dropped."""
    leaving = step >= 0
    filled = np.bincount(step[leaving], slots[leaving])
    full = np.flatnonzero(filled == packs_per_step)
    order = np.concatenate(
        [full[permuted(np.arange(len(full)), len(full), key)], np.flatnonzero((filled > 0) & (filled < packs_per_step))]
    )
    number = np.empty(len(filled), np.int64)
    number[order] = np.arange(len(order))
    out = step.copy()
    out[leaving] = number[step[leaving]]
    return out


def _order_of_rows(
    step_of_pack: np.ndarray, pack_of_row: np.ndarray, is_long: np.ndarray, key: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (the packs that have a step, ordered by step; their rows in that order).

    Packs within a step are shuffled. The rows of a pack keep their order, except that a document longer than a pack comes first.
    """
    leaving = np.flatnonzero(step_of_pack >= 0)
    leaving = leaving[permuted(np.arange(len(leaving)), len(leaving), derived_key(key, 2))]
    leaving = leaving[np.argsort(step_of_pack[leaving], kind="stable")]
    place = np.full(len(step_of_pack), len(leaving))
    place[leaving] = np.arange(len(leaving))
    place_of_row = place[pack_of_row]
    if is_long.any():
        place_of_row = place_of_row * 2 + ~is_long
    if len(place_of_row) and place_of_row.max() < _FEW:
        place_of_row = place_of_row.astype(np.uint16)
    count = int((step_of_pack[pack_of_row] >= 0).sum())
    return leaving, np.argsort(place_of_row, kind="stable")[:count]
