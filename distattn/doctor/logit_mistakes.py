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
    logits_NV: Tensor,
    tolerance: float,
    emulation: Emulation,
    of_other_layers: Callable[[], Iterable[Hypothesis]],
) -> Finding:
    """Find the mistake that gives the same logits (N, V) in one process.

    of_other_layers: mistakes of layers without attention, asked for once the model has been run.
    """
    right = emulation(RIGHT, False)
    if right is not None and distance(logits_NV, right) <= tolerance:
        return _explain_model(reference, right, tolerance, emulation) or _UNKNOWN
    found: list[tuple[float, Finding]] = []
    batches = micro_batches_of(reference, ranks)
    tried = {_identity(RIGHT, batches)}
    for hypothesis in chain(_hypotheses(ranks), of_other_layers()):
        # where nothing is wrong in the way that it says it is another one, or none
        if (identity := _identity(hypothesis, batches)) in tried:
            continue
        tried.add(identity)
        other = emulation(hypothesis, False)
        if other is not None and (difference := distance(logits_NV, other)) <= tolerance:
            found.append((difference, hypothesis.finding))
    if found:
        # of those that fit as well as the best one the first
        best = min(difference for difference, _ in found)
        return next(finding for difference, finding in found if difference <= 2 * best + tolerance / 16)
    return _UNKNOWN


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
    observed = (
        "the attention that is asked of the batch is right, but results depend on which tokens a rank has: a layer attends by "
        "itself, or something else mixes tokens"
    )
    remedy = (
        "have every attention layer ask the batch, and recurrent layers and convolutions its recurrence and causal_conv1d; a "
        "mean over tokens cannot be split; look at the first module that differs"
    )
    return Finding("tokens mixed", observed, remedy)


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


_UNKNOWN = Finding(
    "unknown",
    "logits differ, and no mistake that the doctor knows explains them",
    "look at the first module that differs; leave out what the script does there",
)
_POSITIONS = (_right, _given, _local, _over_the_pack)
RIGHT = Hypothesis(Finding("", "", ""), _right, _causal_in_documents)


def _wrong_positions() -> Iterator[Hypothesis]:
    remedy = "pass the part's position_ids on to the model: they are sharded with the tokens"
    for positions, observed in (
        (_local, "each rank counts positions from 0: it gives its tokens those of others"),
        (_given, "positions are not those of the documents"),
        (_over_the_pack, "positions go on from document to document"),
    ):
        yield Hypothesis(Finding("positions not sharded", observed, remedy), positions, _causal_in_documents)


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
