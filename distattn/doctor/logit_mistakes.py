"""Which mistake explains logits that differ: the ranks are emulated in one process with the mistake in it, and compared."""

# N tokens of all micro-batches, T tokens on a rank, V vocabulary; M tokens of one micro-batch

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.batch.packed_batch import PackedBatch
from distattn.doctor.comparison import Finding, RankResult, distance
from distattn.doctor.emulation import ATTENTION_OPTIONS, Mistake
from distattn.doctor.recording import digest
from distattn.doctor.reference import ReferenceResult, Tolerances, outputs_of_ranks


class MicroBatch(NamedTuple):
    """A micro-batch as hypotheses need it: of each rank its tokens (T,), counted from the first of the micro-batch, and the
    positions (T,) it gave to the model; the lengths of documents as the ranks' plan has them; the ids of each rank's padding."""

    pack: PackedBatch
    tokens: list[Tensor]
    given: list[Tensor]
    planned: list[int]
    padding: list[Tensor]

    def right(self) -> list[Tensor]:
        """The documents' positions."""
        whole = torch.cat([torch.arange(length) for length in self.pack.lengths])
        return [whole[own] for own in self.tokens]

    def documents(self) -> list[tuple[int, int]]:
        """First token of each document, and its end."""
        ends = list(accumulate(self.pack.lengths, initial=0))
        return list(pairwise(ends))


# tokens that recurrent layers read one after another, by sequence: each begins anew
Readings = list[Tensor]


def _read_documents(batch: MicroBatch) -> Readings:
    return [torch.arange(begin, end) for begin, end in batch.documents()]


class Hypothesis(NamedTuple):
    """A mistake, and what it does to a micro-batch: the ranks' positions, what may be attended to (M, M), and in layers.

    readings: what recurrent layers and convolutions read; convolved: what convolutions read, where that is something else.
    """

    finding: Finding
    positions: Callable[[MicroBatch], list[Tensor]]
    allowed: Callable[[MicroBatch], Tensor]
    mistake: Mistake = Mistake()
    readings: Callable[[MicroBatch], Readings] = _read_documents
    convolved: Callable[[MicroBatch], Readings] | None = None


# a hypothesis -> the logits (N, V) of ranks, or of one rank that has all tokens; None where the model cannot be run so
Emulation = Callable[[Hypothesis, bool], Tensor | None]
# a hypothesis -> the largest difference from what ranks computed, over what rounding explains; None where it cannot be run
Score = Callable[[Hypothesis], float | None]


def micro_batches_of(reference: ReferenceResult, ranks: Sequence[RankResult]) -> list[MicroBatch]:
    """Put the ranks' parts of each micro-batch together."""
    out, first = [], 0
    for number, pack in enumerate(reference.packs):
        parts = [found["parts"][number] for found in ranks]
        tokens = [part["tokens"] - first for part in parts]
        ids = [
            part["input_ids"].flatten() if "input_ids" in part else own for part, own in zip(parts, tokens, strict=True)
        ]
        padding = [one[len(own) :] for one, own in zip(ids, tokens, strict=True)]
        batch = MicroBatch(pack, tokens, [], list(parts[0]["documents"]), padding)
        for part, own, right in zip(parts, tokens, batch.right(), strict=True):
            given = part.get("position_ids")
            batch.given.append(right if given is None or given.dim() != 2 else given.flatten()[: len(own)])
        out.append(batch)
        first += len(pack.ids_N)
    return out


def first_different_module(
    reference: ReferenceResult, ranks: Sequence[RankResult], tolerances: Tolerances
) -> str | None:
    """Name the first module, in the order of execution, whose output is not that of one process."""
    for name, expected in reference.outputs.items():
        there = outputs_of_ranks(reference, ranks, name)
        if there is not None and distance(there, expected) > tolerances.outputs[name]:
            return name
    return None


def explain_logits(
    reference: ReferenceResult,
    ranks: Sequence[RankResult],
    tolerance: float,
    emulation: Emulation,
    score: Score,
    of_other_layers: Callable[[], Iterable[Hypothesis]],
) -> Finding | None:
    """Find the mistake that gives what ranks computed in one process, None where none does.

    tolerance: of the norm of differences of logits. of_other_layers: mistakes of layers without attention, asked for once the
    model has been run.
    """
    ratio = score(RIGHT)
    if ratio is not None and ratio <= 1:
        right = emulation(RIGHT, False)
        return None if right is None else _explain_model(reference, right, tolerance, emulation)
    batches = micro_batches_of(reference, ranks)
    tried = {_identity(RIGHT, batches)}
    for hypotheses in (
        chain(_hypotheses(ranks), of_other_layers()),
        _positions_of_some_ranks(len(ranks)),
    ):
        found: list[tuple[float, Finding]] = []
        for hypothesis in hypotheses:
            # a hypothesis that comes to the same as an earlier one for these batches, or as no mistake, is not tried
            if (identity := _identity(hypothesis, batches)) in tried:
                continue
            tried.add(identity)
            ratio = score(hypothesis)
            if ratio is not None and ratio <= 1:
                found.append((ratio, hypothesis.finding))
        if found:
            # the first of those that fit as well as the best one
            best = min(ratio for ratio, _ in found)
            return next(finding for ratio, finding in found if ratio <= 2 * best + 1 / 16)
    return None


def _wrong_window(reference: ReferenceResult, tolerance: float, emulation: Emulation) -> Finding | None:
    """Find whether the model is right in one process once its windows are longer or shorter."""
    for hypothesis in _wrong_windows():
        mended = emulation(hypothesis._replace(mistake=Mistake(window_change=-hypothesis.mistake.window_change)), False)
        if mended is not None and distance(mended, reference.logits_NV) <= tolerance:
            return hypothesis.finding
    return None


def _identity(hypothesis: Hypothesis, batches: Sequence[MicroBatch]) -> tuple[str, Mistake]:
    """What a hypothesis comes to: a digest of positions and masks, and what is wrong in layers."""
    tensors: list[Tensor] = []
    for batch in batches:
        tensors += [*hypothesis.positions(batch), hypothesis.allowed(batch)]
        for reading in hypothesis.readings, hypothesis.convolved or hypothesis.readings:
            # -1 ends a sequence
            tensors += [torch.cat([one, one.new_full((1,), -1)]) for one in reading(batch) if len(one)]
    return digest(*tensors), hypothesis.mistake


def _explain_model(reference: ReferenceResult, split: Tensor, tolerance: float, emulation: Emulation) -> Finding | None:
    """Find what a model does itself that only goes well unsplit: its ranks are right about all that they give to it.

    split: the logits (N, V) of such ranks.
    """
    moved = emulation(RIGHT._replace(positions=lambda batch: [given + 1 + given % 3 for given in batch.right()]), False)
    whole, first = emulation(RIGHT, True), reference.lengths[0]
    if whole is None or distance(whole[:first], reference.logits_NV[:first]) > tolerance:
        return _wrong_window(reference, tolerance, emulation)
    if moved is not None and distance(moved, split) <= tolerance:
        observed = (
            "the model does not read position_ids: on every rank it counts positions from 0 itself, or mixes tokens outside of "
            "attention"
        )
        return Finding("positions not sharded", observed, "have its forward take the part's position_ids, and use them")
    return TOKENS_MIXED


TOKENS_MIXED = Finding(
    "tokens mixed",
    "the attention that is asked of the batch is right, but results depend on which tokens a rank has: a layer attends by "
    "itself, or something else mixes tokens",
    "have every attention layer ask the batch, and recurrent layers and convolutions its recurrence and causal_conv1d; a mean "
    "over tokens cannot be split; look at the first module that differs",
)


def _hypotheses(ranks: Sequence[RankResult]) -> Iterator[Hypothesis]:
    yield from _wrong_positions()
    for positions in _POSITIONS:
        yield from _wrong_masks(positions, ranks[0]["document_mask"])
    yield from _wrong_options()


def _right(batch: MicroBatch) -> list[Tensor]:
    return batch.right()


def _given(batch: MicroBatch) -> list[Tensor]:
    return batch.given


def _local(batch: MicroBatch) -> list[Tensor]:
    return [torch.arange(len(own)) for own in batch.tokens]


def _over_the_pack(batch: MicroBatch) -> list[Tensor]:
    return batch.tokens


def _from_rank_on(batch: MicroBatch) -> list[Tensor]:
    """Return positions as if each rank had one stretch of the batch, in the order of ranks."""
    return [torch.arange(len(own)) + rank * len(own) for rank, own in enumerate(batch.tokens)]


def over_the_pack() -> Hypothesis:
    """Return the mistake of positions that go on from document to document."""
    return RIGHT._replace(positions=_over_the_pack)


def _causal_in_documents(batch: MicroBatch) -> Tensor:
    return _in_documents(batch).tril()


def _in_documents(batch: MicroBatch) -> Tensor:
    return _documents(batch.pack.lengths)


def _in_planned_documents(batch: MicroBatch) -> Tensor:
    return _documents(batch.planned).tril()


def _read_planned_documents(batch: MicroBatch) -> Readings:
    return list(torch.arange(sum(batch.planned)).split(batch.planned))


def _documents(lengths: Sequence[int]) -> Tensor:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return document[:, None] == document[None]


def _causal_over_the_pack(batch: MicroBatch) -> Tensor:
    return torch.ones(len(batch.pack.ids_N), len(batch.pack.ids_N), dtype=torch.bool).tril()


def _on_one_rank(batch: MicroBatch) -> Tensor:
    """Causal over each rank's own tokens, in their local order."""
    return _rank_local(batch, [torch.zeros(len(own), dtype=torch.bool) for own in batch.tokens])


def _on_one_rank_by_positions(batch: MicroBatch) -> Tensor:
    """The same, where a document ends wherever positions do not go on by one, as transformers takes it."""
    return _rank_local(batch, [given.diff(prepend=given[:1] - 1) != 1 for given in batch.given])


def _rank_local(batch: MicroBatch, begins: list[Tensor]) -> Tensor:
    allowed = torch.zeros_like(_causal_over_the_pack(batch))
    for own, begin in zip(batch.tokens, begins, strict=True):
        document = begin.cumsum(0)
        mine = torch.ones(len(own), len(own), dtype=torch.bool).tril() & (document[:, None] == document[None])
        allowed[own[:, None], own[None]] = mine
    return allowed


_POSITIONS = (_right, _given, _local, _over_the_pack)
RIGHT = Hypothesis(Finding("", "", ""), _right, _causal_in_documents)


def _wrong_positions() -> Iterator[Hypothesis]:
    remedy = "pass the part's position_ids on to the model: they are sharded with the tokens"
    for positions, observed in (
        (_local, "each rank counts positions from 0: it gives its tokens those of others"),
        (_given, "positions are not those of the documents"),
        (_over_the_pack, "positions go on from document to document"),
        (
            _from_rank_on,
            "each rank counts positions from its number times its tokens, as if its tokens were one stretch",
        ),
    ):
        yield Hypothesis(Finding("positions not sharded", observed, remedy), positions, _causal_in_documents)


def _positions_of_some_ranks(ranks: int) -> Iterator[Hypothesis]:
    """Yield wrong positions of one rank, and positions that are off by a few on one rank or on all."""
    remedy = "pass the part's position_ids on to the model: they are sharded with the tokens"

    def on_rank(odd: int, positions: Callable[[MicroBatch], list[Tensor]]) -> Callable[[MicroBatch], list[Tensor]]:
        def some(batch: MicroBatch) -> list[Tensor]:
            pairs = enumerate(zip(positions(batch), batch.right(), strict=True))
            return [other if rank == odd else right for rank, (other, right) in pairs]

        return some

    def later(step: int) -> Callable[[MicroBatch], list[Tensor]]:
        return lambda batch: [(right + step).clamp(min=0) for right in batch.right()]

    mistakes = (
        (_local, "counts positions from 0"),
        (_over_the_pack, "has positions that go on from document to document"),
        (_from_rank_on, "counts positions from its number times its tokens"),
        (later(1), "has positions that are one too large"),
        (later(-1), "has positions that are one too small"),
    )
    for positions, words in mistakes:
        for rank in range(ranks):
            finding = Finding("positions not sharded", f"rank {rank} {words}", remedy)
            yield Hypothesis(finding, on_rank(rank, positions), _causal_in_documents)
    for step, words in ((1, "large"), (-1, "small")):
        finding = Finding("positions not sharded", f"positions are one too {words}", remedy)
        yield Hypothesis(finding, later(step), _causal_in_documents)


def _wrong_masks(
    positions: Callable[[MicroBatch], list[Tensor]], document_mask: str | tuple[int, int]
) -> Iterator[Hypothesis]:
    finding = Finding(
        "documents not separated",
        "documents attend to one another: the pack is taken for one document",
        "give document_lengths (or position_ids that begin anew) to ContextParallel.shard",
    )
    yield Hypothesis(
        finding, positions, _causal_over_the_pack, readings=lambda batch: [torch.arange(len(batch.pack.ids_N))]
    )
    finding = Finding(
        "documents not those of the batch",
        "the ranks' plan has other documents than the batch",
        "give the batch's own document_lengths to ContextParallel.shard",
    )
    yield Hypothesis(finding, positions, _in_planned_documents, readings=_read_planned_documents)
    finding = Finding("mask not causal", "tokens see what comes after them", 'use document_mask="causal"')
    yield Hypothesis(finding, positions, _in_documents)
    if not isinstance(document_mask, str):
        left, right = document_mask

        def band(batch: MicroBatch) -> Tensor:
            return _in_documents(batch).tril(right).triu(-left)

        observed = f"document_mask={document_mask} of ContextParallel is not what the model computes in one process"
        yield Hypothesis(Finding("document_mask", observed, 'use document_mask="causal"'), positions, band)
    finding = Finding(
        "context parallelism off",
        "each rank attends to its own tokens only: context parallelism does nothing",
        'select attn_implementation="distattn", and pass context_parallel on to the model',
    )
    yield Hypothesis(finding, positions, _on_one_rank, readings=lambda batch: batch.tokens)
    yield Hypothesis(finding, positions, _on_one_rank_by_positions)


def _wrong_options() -> Iterator[Hypothesis]:
    for name in ATTENTION_OPTIONS:
        finding = Finding(
            f"{name} dropped", f"the layers' {name} is not computed", f"pass {name} on to the attention call"
        )
        yield Hypothesis(finding, _right, _causal_in_documents, Mistake(dropped=name))
    yield from _wrong_windows()


def _wrong_windows() -> Iterator[Hypothesis]:
    for change in (-1, 1):
        observed = f"windows have a token too {'many' if change > 0 else 'few'}"
        remedy = "window counts the token itself: window = 6 sees it and the five before it"
        finding = Finding("window off by one", observed, remedy)
        yield Hypothesis(finding, _right, _causal_in_documents, Mistake(window_change=change))
