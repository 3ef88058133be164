"""Check that a finished plan reads every token of every document exactly once in each epoch.

The plan is read step by step. For each unfinished epoch the check keeps one bit per document, and the pieces of each cut document
until it has seen all of them. So memory does not depend on the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from distattn.data.packing.blend import epoch_order, most_documents
from distattn.data.packing.make_pack_plan import CorpusLengths
from distattn.data.packing.pack_plan import PackPlan
from distattn.data.packing.pack_windows import MOST_WINDOWS_WAITED, PIECE
from distattn.ir.errors import DamagedDataError

_PART_ROWS = 1 << 20
# the maximum number of steps that an error lists
_MOST_NAMED = 8


class CorpusCoverage(NamedTuple):
    """The part of a corpus that a plan reads.

    epochs: the number of complete epochs. documents: the number of complete documents in epochs that the plan's end cuts off.
    """

    corpus: str
    epochs: int
    documents: int


def check_coverage(
    plan: PackPlan, corpora: Sequence[CorpusLengths], progress: Callable[[int, int], None] | None = None
) -> list[CorpusCoverage]:
    """Check that every token of every document is read once in every epoch. Return the coverage of each corpus.

    corpora: in the order of the plan's sources. progress: called with (steps done, total steps). If the plan ends after a given
    number of steps, an epoch may lack documents only if the next epoch began in the plan's last windows. Raises DamagedDataError
    naming the first document that is read twice, not to its end, or not at all, and the same errors as `PackPlan.step`.
    """
    checker = _Checker(plan, corpora)
    rows: list[np.ndarray] = []
    count = 0
    for step in range(plan.steps):
        rows.append(plan.step(step).rows)
        count += len(rows[-1])
        if count >= _PART_ROWS or step == plan.steps - 1:
            checker.add(np.concatenate(rows), np.cumsum([len(step_rows) for step_rows in rows]), step + 1 - len(rows))
            rows, count = [], 0
            if progress:
                progress(step + 1, plan.steps)
    return checker.finish()


class _Epoch:
    """One epoch of a corpus.

    done: one bit per document, set if complete. parts: the pieces of incomplete documents, PIECE (N,). documents: the number of
    complete documents.
    """

    def __init__(self, documents: int) -> None:
        self.done = np.zeros(-(-documents // 8), np.uint8)
        self.parts = np.empty(0, PIECE)
        self.documents = 0

    def has(self, document: np.ndarray) -> np.ndarray:
        """Return which of the documents with indices `document` are complete, bool (N,)."""
        return (self.done[document >> 3] >> (document & 7) & 1).astype(np.bool_)

    def add(self, document: np.ndarray) -> None:
        """Mark documents as complete. document: their indices in ascending order, int64 (N,)."""
        if not len(document):
            return
        place = document >> 3
        begins = np.flatnonzero(np.diff(place, prepend=-1))
        self.done[place[begins]] |= np.bitwise_or.reduceat(np.uint8(1) << (document & 7).astype(np.uint8), begins)
        self.documents += len(document)


class _Corpus:
    """The state of the coverage check for one corpus.

    under_way: the incomplete epochs. complete: the indices of the complete epochs. first_steps: the first step with tokens of
    each epoch, by epoch. tokens: the number of tokens read.
    """

    def __init__(self) -> None:
        self.under_way: dict[int, _Epoch] = {}
        self.complete: set[int] = set()
        self.first_steps: dict[int, int] = {}
        self.tokens = 0


class _Checker:
    """The state of a coverage check for all corpora."""

    def __init__(self, plan: PackPlan, corpora: Sequence[CorpusLengths]) -> None:
        self._plan = plan
        self._lengths = [corpus.lengths for corpus in corpora]
        self._full = [int(np.count_nonzero(lengths)) for lengths in self._lengths]
        self._states = [_Corpus() for _ in corpora]

    def add(self, rows: np.ndarray, ends: np.ndarray, first_step: int) -> None:
        """Check the pieces of consecutive steps.

        rows: the pieces, PIECE (N,). ends: the end of each step in `rows`, int64 (S,). first_step: the number of the first step.
        """
        keys = rows["corpus"].astype(np.int64) << 16 | rows["epoch"]
        for key in np.unique(keys).tolist():
            corpus, epoch = key >> 16, key & 0xFFFF
            if corpus >= len(self._lengths):
                raise DamagedDataError(f"{self._plan.path}: has pieces of corpus {corpus}, which does not exist.")
            epoch_rows = rows.compress(keys == key)
            self._check_pieces(corpus, epoch, epoch_rows)
            state = self._states[corpus]
            state.tokens += int(epoch_rows["length"].sum(dtype=np.int64))
            if epoch in state.complete:
                raise self._wrong(corpus, epoch, int(epoch_rows["document"][0]), "is read twice")
            if epoch not in state.under_way:
                state.under_way[epoch] = _Epoch(len(self._lengths[corpus]))
                step = int(np.searchsorted(ends, int((keys == key).argmax()), "right"))
                state.first_steps[epoch] = first_step + step
            self._add(corpus, epoch, state.under_way[epoch], epoch_rows)
            if state.under_way[epoch].documents == self._full[corpus]:
                del state.under_way[epoch]
                state.complete.add(epoch)

    def finish(self) -> list[CorpusCoverage]:
        """Check that nothing is missing. Return the coverage of each corpus."""
        for number, source in enumerate(self._plan.sources):
            self._check_epochs(number)
            if (tokens := self._states[number].tokens) != source.planned_tokens:
                raise DamagedDataError(
                    f"{self._plan.path}: has {tokens:,} tokens of corpus {source.name}, but its header says "
                    f"{source.planned_tokens:,}; make the plan again."
                )
        return [
            CorpusCoverage(source.name, len(state.complete), sum(epoch.documents for epoch in state.under_way.values()))
            for source, state in zip(self._plan.sources, self._states, strict=True)
        ]

    def _check_pieces(self, corpus: int, epoch: int, rows: np.ndarray) -> None:
        """Raise DamagedDataError for a piece that extends outside its document or disagrees with the document's length."""
        lengths = self._lengths[corpus]
        outside = rows["document"] >= len(lengths)
        if outside.any():
            raise self._wrong(corpus, epoch, int(rows["document"][outside][0]), "is read, but does not exist")
        ends, whole = rows["start"].astype(np.int64) + rows["length"], lengths[rows["document"]]
        wrong = (rows["length"] == 0) | (ends > whole) | (rows["ends_document"] != (ends == whole))
        if wrong.any():
            at = int(wrong.argmax())
            problem = f"has {whole[at]:,} tokens, but a piece of it is {rows['start'][at]:,} to {ends[at]:,}"
            raise self._wrong(corpus, epoch, int(rows["document"][at]), problem)

    def _add(self, corpus: int, epoch: int, state: _Epoch, rows: np.ndarray) -> None:
        """Mark the documents completed by the pieces `rows`. Raise DamagedDataError for tokens that are read twice."""
        is_whole = (rows["start"] == 0) & rows["ends_document"]
        parts = np.concatenate([state.parts, rows.compress(~is_whole)])
        parts = parts.take(np.lexsort((parts["start"], parts["document"])))
        document, start = parts["document"].astype(np.int64), parts["start"].astype(np.int64)
        begins = np.flatnonzero(np.diff(document, prepend=-1))
        # the end of the previous piece of the same document
        before = np.concatenate([[0], (start + parts["length"])[:-1]])[: len(parts)]
        before[begins] = 0
        twice = (start < before) | state.has(document)
        if twice.any():
            raise self._wrong(corpus, epoch, int(document[twice.argmax()]), "is read twice")
        complete = np.zeros(len(begins), np.bool_)
        if len(begins):
            complete = np.logical_and.reduceat(start == before, begins) & np.maximum.reduceat(
                parts["ends_document"], begins
            )
        done = np.sort(
            np.concatenate([rows["document"].compress(is_whole).astype(np.int64), document[begins][complete]])
        )
        twice = np.append(done[1:] == done[:-1], False)[: len(done)] | state.has(done)
        if twice.any():
            raise self._wrong(corpus, epoch, int(done[twice.argmax()]), "is read twice")
        state.add(done)
        state.parts = parts.compress(~np.repeat(complete, np.diff(begins, append=len(parts))))

    def _check_epochs(self, corpus: int) -> None:
        """Check that no document is missing from the epochs that should be complete."""
        plan, source, state = self._plan, self._plan.sources[corpus], self._states[corpus]
        most = most_documents(source.documents, source.max_epochs) if plan.ends_with_corpora else None
        if most is not None:
            due, rest = divmod(most, source.documents)
        else:
            # when the next epoch begins, documents may still be carried for up to MOST_WINDOWS_WAITED windows of `steps` steps
            steps = max(-(-plan.rule.window // plan.rule.packs_at(first)) for first, _ in plan.rule.context)
            limit = plan.steps - steps * (MOST_WINDOWS_WAITED + 1)
            due, rest = max((epoch for epoch, first in state.first_steps.items() if first < limit), default=0), 0
        for epoch in range(due):
            if epoch not in state.complete:
                self._check_there(corpus, epoch, source.documents, lambda positions: positions)
        # the plan also ends with a partial epoch, which counts as complete if all documents that it leaves out are empty
        if rest and due not in state.complete:
            order = partial(epoch_order, plan.seed, corpus, due, source.documents)
            self._check_there(corpus, due, rest, order)

    def _check_there(
        self, corpus: int, epoch: int, count: int, documents_at: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        """Raise DamagedDataError for the first incomplete document among the first `count` of an epoch's order."""
        lengths, state = self._lengths[corpus], self._states[corpus].under_way.get(epoch)
        for first in range(0, count, _PART_ROWS):
            documents = documents_at(np.arange(first, min(first + _PART_ROWS, count)))
            missing = lengths[documents] > 0
            if state is not None:
                missing &= ~state.has(documents)
            if missing.any():
                raise self._wrong(corpus, epoch, int(documents[missing.argmax()]), "is not read to its end")

    def _wrong(self, corpus: int, epoch: int, document: int, problem: str) -> DamagedDataError:
        steps = self._plan.find(corpus, document)
        where = f"steps {', '.join(map(str, steps[:_MOST_NAMED]))}" if steps else "no step"
        return DamagedDataError(
            f"{self._plan.path}: document {document:,} of corpus {self._plan.sources[corpus].name} {problem} in epoch {epoch} "
            f"({where} of the plan); make the plan again."
        )
