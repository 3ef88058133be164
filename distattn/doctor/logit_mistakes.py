"""Find the mistake behind different logits by emulating the ranks in one process with each known mistake."""

# N tokens in all micro-batches, M tokens in one micro-batch, T tokens on a rank, V vocabulary

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
    """The data of a micro-batch that hypotheses need.

    tokens: the indices of each rank's tokens (T,) in the micro-batch. passed: the positions (T,) that each rank passed to the
    model. planned: the document lengths in the ranks' plan. padding: the token ids of each rank's padding.
    """

    pack: PackedBatch
    tokens: list[Tensor]
    passed: list[Tensor]
    planned: list[int]
    padding: list[Tensor]

    def right(self) -> list[Tensor]:
        """Return the correct positions of each rank's tokens."""
        whole = torch.cat([torch.arange(length) for length in self.pack.lengths])
        return [whole[tokens] for tokens in self.tokens]

    def documents(self) -> list[tuple[int, int]]:
        """Return the range of each document's tokens as (first, end), end excluded."""
        ends = list(accumulate(self.pack.lengths, initial=0))
        return list(pairwise(ends))


# the token sequences that recurrent layers read; the state is reset at the start of each sequence
Readings = list[Tensor]


def _read_documents(batch: MicroBatch) -> Readings:
    return [torch.arange(begin, end) for begin, end in batch.documents()]


class Hypothesis(NamedTuple):
    """A possible mistake, and its effect on a micro-batch.

    positions: the ranks' positions. allowed: the mask (M, M) of allowed (query, key) pairs. mistake: the mistake in layers.
    readings: the sequences that recurrent layers and convolutions read. convolved: the convolutions' sequences; None if the same.
    """

    finding: Finding
    positions: Callable[[MicroBatch], list[Tensor]]
    allowed: Callable[[MicroBatch], Tensor]
    mistake: Mistake = Mistake()
    readings: Callable[[MicroBatch], Readings] = _read_documents
    convolved: Callable[[MicroBatch], Readings] | None = None


# (hypothesis, on one rank) -> the logits (N, V) of the ranks, or of one rank with all tokens; None if the model fails
Emulation = Callable[[Hypothesis, bool], Tensor | None]
# hypothesis -> the largest difference from the ranks' results, divided by the difference that rounding explains; None if the
# model fails
Score = Callable[[Hypothesis], float | None]


def micro_batches_of(reference: ReferenceResult, ranks: Sequence[RankResult]) -> list[MicroBatch]:
    """Combine the ranks' parts of each micro-batch."""
    out, first = [], 0
    for number, pack in enumerate(reference.packs):
        parts = [result["parts"][number] for result in ranks]
        tokens = [part["tokens"] - first for part in parts]
        ids = [
            part["input_ids"].flatten() if "input_ids" in part else rank_tokens
            for part, rank_tokens in zip(parts, tokens, strict=True)
        ]
        padding = [rank_ids[len(rank_tokens) :] for rank_ids, rank_tokens in zip(ids, tokens, strict=True)]
        batch = MicroBatch(pack, tokens, [], list(parts[0]["documents"]), padding)
        for part, right in zip(parts, batch.right(), strict=True):
            positions = part.get("position_ids")
            has_positions = positions is not None and positions.dim() == 2
            batch.passed.append(positions.flatten()[: len(right)] if has_positions else right)
        out.append(batch)
        first += len(pack.ids_N)
    return out


def first_different_module(
    reference: ReferenceResult, ranks: Sequence[RankResult], tolerances: Tolerances
) -> str | None:
    """Return the first module, in execution order, whose output differs from the reference; None if no output does."""
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
    """Find the mistake that reproduces the ranks' results in one process. Return None if no mistake does.

    tolerance: the largest permitted norm of a difference in logits. of_other_layers: returns hypotheses about layers
    without attention; it is called after the model has been run.
    """
    ratio = score(RIGHT)
    if ratio is not None and ratio <= 1:
        right = emulation(RIGHT, False)
        return None if right is None else _explain_model(reference, right, tolerance, emulation)
    batches = micro_batches_of(reference, ranks)
    tried = {_identity(RIGHT, batches)}
    for hypotheses in (chain(_hypotheses(ranks), of_other_layers()), _positions_of_some_ranks(len(ranks))):
        explanations: list[tuple[float, Finding]] = []
        for hypothesis in hypotheses:
            # skip a hypothesis that has the same effect on these batches as an earlier hypothesis or as no mistake
            if (identity := _identity(hypothesis, batches)) in tried:
                continue
            tried.add(identity)
            ratio = score(hypothesis)
            if ratio is not None and ratio <= 1:
                explanations.append((ratio, hypothesis.finding))
        if explanations:
            # choose the first hypothesis that fits about as well as the best
            best = min(ratio for ratio, _ in explanations)
            return next(finding for ratio, finding in explanations if ratio <= 2 * best + 1 / 16)
    return None


def _wrong_window(reference: ReferenceResult, tolerance: float, emulation: Emulation) -> Finding | None:
    """Find a window length that is off by one: with the opposite change, the emulated ranks match the reference."""
    for hypothesis in _wrong_windows():
        mended = emulation(hypothesis._replace(mistake=Mistake(window_change=-hypothesis.mistake.window_change)), False)
        if mended is not None and distance(mended, reference.logits_NV) <= tolerance:
            return hypothesis.finding
    return None


def _identity(hypothesis: Hypothesis, batches: Sequence[MicroBatch]) -> tuple[str, Mistake]:
    """Return a key of a hypothesis's effect: a digest of positions, masks and sequences, and the mistake in layers."""
    tensors: list[Tensor] = []
    for batch in batches:
        tensors += [*hypothesis.positions(batch), hypothesis.allowed(batch)]
        for reading in hypothesis.readings, hypothesis.convolved or hypothesis.readings:
            # -1 marks the end of a sequence
            sequences = (sequence for sequence in reading(batch) if len(sequence))
            tensors += [torch.cat([sequence, sequence.new_full((1,), -1)]) for sequence in sequences]
    return digest(*tensors), hypothesis.mistake


def _explain_model(reference: ReferenceResult, split: Tensor, tolerance: float, emulation: Emulation) -> Finding | None:
    """Find a mistake inside the model that shows only on several ranks, although all inputs are right.

    split: the logits (N, V) of emulated ranks without a mistake.
    """
    moved = emulation(RIGHT._replace(positions=lambda batch: [right + 1 + right % 3 for right in batch.right()]), False)
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
    "the attention that layers ask of the batch is right, but results depend on the tokens of a rank: a layer computes attention "
    "itself, or another operation mixes tokens",
    "call the batch's attention in every attention layer, its recurrence and causal_conv1d in recurrent layers and convolutions; "
    "a mean over tokens cannot be split; look at the first module that differs",
)


def _hypotheses(ranks: Sequence[RankResult]) -> Iterator[Hypothesis]:
    yield from _wrong_positions()
    for positions in _POSITIONS:
        yield from _wrong_masks(positions, ranks[0]["document_mask"])
    yield from _wrong_options()


def _right(batch: MicroBatch) -> list[Tensor]:
    return batch.right()


def _passed(batch: MicroBatch) -> list[Tensor]:
    return batch.passed


def _local(batch: MicroBatch) -> list[Tensor]:
    return [torch.arange(len(tokens)) for tokens in batch.tokens]


def _over_the_pack(batch: MicroBatch) -> list[Tensor]:
    return batch.tokens


def _from_rank_on(batch: MicroBatch) -> list[Tensor]:
    """Return the positions that tokens would have if each rank held one contiguous segment of the batch, in rank order."""
    return [torch.arange(len(tokens)) + rank * len(tokens) for rank, tokens in enumerate(batch.tokens)]


def positions_over_pack() -> Hypothesis:
    """Return the hypothesis that positions are not reset at document starts."""
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
    """Return a causal mask over each rank's own tokens, in their local order."""
    return _rank_local(batch, [torch.zeros(len(tokens), dtype=torch.bool) for tokens in batch.tokens])


def _on_one_rank_by_positions(batch: MicroBatch) -> Tensor:
    """Return the mask of `_on_one_rank`, starting a document wherever positions do not rise by one, as transformers does."""
    return _rank_local(batch, [passed.diff(prepend=passed[:1] - 1) != 1 for passed in batch.passed])


def _rank_local(batch: MicroBatch, begins: list[Tensor]) -> Tensor:
    allowed = torch.zeros_like(_causal_over_the_pack(batch))
    for tokens, begin in zip(batch.tokens, begins, strict=True):
        document = begin.cumsum(0)
        causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        allowed[tokens[:, None], tokens[None]] = causal & (document[:, None] == document[None])
    return allowed


_POSITIONS = (_right, _passed, _local, _over_the_pack)
RIGHT = Hypothesis(Finding("", "", ""), _right, _causal_in_documents)


def _wrong_positions() -> Iterator[Hypothesis]:
    remedy = "pass the part's position_ids on to the model: they are sharded with the tokens"
    for positions, observed in (
        (_local, "each rank counts positions from 0: its tokens get the positions of others"),
        (_passed, "positions are not those of the documents"),
        (_over_the_pack, "positions are not reset at documents"),
        (
            _from_rank_on,
            "each rank counts positions from its number times its tokens, as if its tokens were one segment",
        ),
    ):
        yield Hypothesis(Finding("positions not sharded", observed, remedy), positions, _causal_in_documents)


def _positions_of_some_ranks(ranks: int) -> Iterator[Hypothesis]:
    """Yield hypotheses with wrong positions on one rank, or with positions off by one on one rank or on all ranks."""
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
        (_over_the_pack, "has positions that are not reset at documents"),
        (_from_rank_on, "counts positions from its number times its tokens"),
        (later(1), "has positions that are one too large"),
        (later(-1), "has positions that are one too small"),
    )
    for positions, description in mistakes:
        for rank in range(ranks):
            finding = Finding("positions not sharded", f"rank {rank} {description}", remedy)
            yield Hypothesis(finding, on_rank(rank, positions), _causal_in_documents)
    for step, adjective in ((1, "large"), (-1, "small")):
        finding = Finding("positions not sharded", f"positions are one too {adjective}", remedy)
        yield Hypothesis(finding, later(step), _causal_in_documents)


def _wrong_masks(
    positions: Callable[[MicroBatch], list[Tensor]], document_mask: str | tuple[int, int]
) -> Iterator[Hypothesis]:
    finding = Finding(
        "documents not separated",
        "documents attend to one another: the pack is taken for one document",
        "pass document_lengths (or position_ids that are reset at documents) to ContextParallel.shard",
    )
    yield Hypothesis(
        finding, positions, _causal_over_the_pack, readings=lambda batch: [torch.arange(len(batch.pack.ids_N))]
    )
    finding = Finding(
        "documents not those of the batch",
        "the ranks' plan has other documents than the batch",
        "pass the batch's own document_lengths to ContextParallel.shard",
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
