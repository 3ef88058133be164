"""Make a pack plan: blend the corpora, pack them window by window, and write each window to the plan's file at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from distattn.data.files.label_masks import LabelMasks
from distattn.data.packing.blend import BlendSource, blend_documents
from distattn.data.packing.cut_documents import CorpusSpans
from distattn.data.packing.pack_plan import PackPlan, PlannedSource
from distattn.data.packing.pack_plan_writer import PackPlanWriter
from distattn.data.packing.pack_rule import MOST_TOKENS, PackRule
from distattn.data.packing.pack_windows import PackedWindow, plan_windows
from distattn.ir.errors import DistattnError

_SCAN_DOCUMENTS = 1 << 22


class CorpusLengths(Protocol):
    """The parts of a corpus that planning needs: a name, the document lengths, and a digest of the files.

    Like `Corpus`, it may also have `masks`: `LabelMasks` or None.
    """

    @property
    def name(self) -> str:
        """The name of the corpus in the plan and in errors."""

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens in each document, integers (documents,). The array may be memory-mapped."""

    @property
    def digest(self) -> str:
        """A digest that identifies the corpus's files."""


def make_pack_plan(
    path: str | Path,
    corpora: Sequence[CorpusLengths],
    *,
    seed: int,
    rule: PackRule,
    weights: Sequence[float] | None = None,
    max_epochs: Sequence[float | None] | None = None,
    steps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PackPlan:
    """Plan all steps of a run, write the plan's file, and open it.

    weights: each corpus's share of the tokens; by default its number of tokens. max_epochs: how often the documents of each
    corpus may be read; by default without limit. steps: the number of steps; without it the plan ends when all corpora have
    ended. A plan with fewer steps is a prefix of a plan with more. progress: called after each window with the (steps, tokens)
    planned so far.

    The plan depends only on the document lengths and spans in the order of the corpora, and on seed, rule, weights, max_epochs
    and steps. Raises DistattnError naming the invalid argument, and also for a plan that would never end or if all corpora end
    before `steps`.
    """
    sources = _sources(corpora, rule, weights, max_epochs)
    if not 0 <= seed < 1 << 64:
        raise DistattnError(f"seed: {seed} is out of range; name an integer from 0 to 2^64 - 1.")
    if steps is not None and steps < 1:
        raise DistattnError(f"steps: {steps} is too few; a plan has at least 1.")
    endless = [source.name for source in sources if source.max_epochs is None]
    if steps is None and endless:
        raise DistattnError(
            f"steps: without them a plan ends when all corpora have ended, and {endless[0]} has no max_epochs."
        )
    totals = _Totals(len(sources))
    documents = blend_documents(sources, [corpus.lengths for corpus in corpora], seed)
    masks = [_masks_of(corpus) for corpus in corpora]
    spans = {
        number: CorpusSpans(corpus.name, corpus_masks.spans_of)
        for number, (corpus, corpus_masks) in enumerate(zip(corpora, masks, strict=True))
        if corpus_masks and corpus_masks.has_spans
    }
    with PackPlanWriter(path) as writer:
        for window in plan_windows(rule, documents, seed, spans):
            kept = window if steps is None else _first_steps(window, steps - writer.steps)
            totals.add(kept, writer.steps)
            writer.add(kept)
            if progress:
                progress(writer.steps, sum(totals.tokens))
            if writer.steps == steps:
                break
        if writer.steps < (steps or 1):
            raise DistattnError(
                f"steps: all corpora end after {writer.steps:,} steps, before {steps or 1:,}; "
                "raise max_epochs, or plan fewer steps."
            )
        planned = [
            PlannedSource(
                source.name,
                source.documents,
                source.documents - int(np.count_nonzero(corpus.lengths)),
                source.tokens,
                corpus.digest,
                corpus_masks.digest if corpus_masks else None,
                source.weight,
                source.max_epochs,
                *totals.of(number),
            )
            for number, (source, corpus, corpus_masks) in enumerate(zip(sources, corpora, masks, strict=True))
        ]
        digest = writer.finish(
            seed=seed, rule=rule, sources=planned, longest_wait=totals.longest_wait, ends_with_corpora=steps is None
        )
    return PackPlan.open(path, digest)


def _masks_of(corpus: CorpusLengths) -> LabelMasks | None:
    masks: LabelMasks | None = getattr(corpus, "masks", None)
    return masks


class _Totals:
    """Running totals of the planned steps, per corpus."""

    def __init__(self, corpora: int) -> None:
        self.tokens = [0] * corpora
        self.longest_wait = 0
        self._documents = [0] * corpora
        self._last_step = np.full(corpora, -1)

    def add(self, window: PackedWindow, first_step: int) -> None:
        """Add the pieces of a window whose first step is `first_step`."""
        corpus, length = window.rows["corpus"], window.rows["length"]
        # bincount sums in float64, which is exact: a window has far fewer than 2^53 tokens
        tokens = np.bincount(corpus, length, len(self.tokens)).tolist()
        documents = np.bincount(corpus[window.rows["start"] == 0], minlength=len(self.tokens)).tolist()
        self.tokens = [a + int(b) for a, b in zip(self.tokens, tokens, strict=True)]
        self._documents = [a + b for a, b in zip(self._documents, documents, strict=True)]
        self.longest_wait = max(self.longest_wait, int(window.waited.max(initial=0)))
        step_of_pack = np.repeat(np.arange(len(window.packs)), window.packs)
        # steps are in ascending order and numpy keeps the last value assigned to an index, so each corpus gets its last step
        self._last_step[corpus] = first_step + np.repeat(step_of_pack, window.pieces)

    def of(self, corpus: int) -> tuple[int, int, int]:
        """Return (documents, tokens, last step) for a corpus."""
        return self._documents[corpus], self.tokens[corpus], int(self._last_step[corpus])


def _sources(
    corpora: Sequence[CorpusLengths],
    rule: PackRule,
    weights: Sequence[float] | None,
    max_epochs: Sequence[float | None] | None,
) -> list[BlendSource]:
    """Return the blend's sources, one per corpus. Raise DistattnError for invalid lengths and for lists of the wrong size."""
    names = [corpus.name for corpus in corpora]
    for argument, values in (("weights", weights), ("max_epochs", max_epochs)):
        if values is not None and len(values) != len(names):
            raise DistattnError(
                f"{argument}: {len(values)} for {len(names)} corpora; give one for each of {', '.join(names)}."
            )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DistattnError(f"corpora: two are called {twice[0]}; give each a name of its own.")
    keeps = rule.long_documents == "keep"
    longest = rule.tokens_per_step if keeps else MOST_TOKENS
    may_have = f"a document may have 0 to {longest:,}"
    if keeps:
        may_have += ', a step\'s, where it is kept whole: use long_documents = "cut", or more tokens_per_step'
    sources = []
    for number, corpus in enumerate(corpora):
        tokens = 0
        for first in range(0, len(corpus.lengths), _SCAN_DOCUMENTS):
            part = corpus.lengths[first : first + _SCAN_DOCUMENTS]
            if len(wrong := np.flatnonzero((part < 0) | (part > longest))):
                raise DistattnError(
                    f"corpus {corpus.name}: document {first + wrong[0]:,} has {part[wrong[0]]:,} tokens, and {may_have}."
                )
            tokens += int(part.sum(dtype=np.int64))
        weight = float(tokens if weights is None else weights[number])
        epochs = None if max_epochs is None else max_epochs[number]
        sources.append(
            BlendSource(corpus.name, len(corpus.lengths), tokens, weight, None if epochs is None else float(epochs))
        )
    return sources


def _first_steps(window: PackedWindow, steps: int) -> PackedWindow:
    """Return the first `steps` steps of a window, or all steps if it has fewer."""
    packs = window.packs[:steps]
    pieces = window.pieces[: packs.sum()]
    rows = int(pieces.sum())
    return PackedWindow(packs, pieces, window.rows[:rows], window.waited[:rows])
