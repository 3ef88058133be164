"""Which labels, summed up in which way, give what ranks call their loss."""

# T tokens on one rank

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.doctor.comparison import Finding, RankResult
from distattn.doctor.rank_run import ReferenceResult, cross_entropy


class _LabelMistake(NamedTuple):
    """Wrong labels: labels(reference, global coordinates of a rank's tokens (T,)) -> labels (T,); right ones have no cause."""

    labels: Callable[[ReferenceResult, Tensor], Tensor]
    cause: str
    observed: str
    remedy: str


class _Sums(NamedTuple):
    """Over each rank's tokens: summed token losses and numbers of labels, (ranks,) each."""

    losses: Tensor
    labels: Tensor


def explain_loss(reference: ReferenceResult, ranks: Sequence[RankResult], losses: Tensor, tolerance: float) -> Finding:
    """Find the mistake that gives the ranks' losses (ranks,)."""
    for mistake in _LABEL_MISTAKES:
        sums = _sums(reference, ranks, mistake)
        for reduction, candidate in _reductions(sums, reference.rows.valid_labels):
            same = bool(((losses - candidate).abs() <= tolerance * candidate.abs().max()).all())
            if same and mistake.cause:
                observed = mistake.observed + (f"; {reduction}" if reduction else "")
                return Finding(mistake.cause, observed, mistake.remedy)
            if same and reduction:
                cause = "mean of means" if reduction is _OWN_MEANS else "loss not divided"
                return Finding(cause, reduction, "multiply the sum of token losses by the part's loss_scale")
    observed = "no labels and no way to sum that the doctor knows gives this loss"
    remedy = "sum the token losses of part['labels'] and multiply by part['loss_scale']"
    return Finding("loss differs", observed, remedy)


_OWN_MEANS = "each rank divides by its own tokens"
_NOT_DIVIDED = "sums are not divided by the number of tokens"


def _sums(reference: ReferenceResult, ranks: Sequence[RankResult], mistake: _LabelMistake) -> _Sums:
    """Sum the token losses that the ranks' logits have with these labels."""
    totals, counts = [], []
    for found in ranks:
        own = found["tokens"]
        labels = mistake.labels(reference, own)
        totals.append(cross_entropy(found["logits"][: len(own)], labels).sum())
        counts.append((labels != IGNORE_INDEX).sum())
    return _Sums(torch.stack(totals), torch.stack(counts))


def _reductions(sums: _Sums, labels: int) -> Iterator[tuple[str, Tensor]]:
    """What ranks may call their loss, (ranks,), and the mistake in it, empty for none.

    A loss may be each rank's share or the whole. labels: how many the batch has.
    """
    total, count = sums.losses, sums.labels
    means = total / count.clamp(min=1)
    for right in (total / count.sum(), (total.sum() / count.sum()).expand_as(total), total / max(labels, 1)):
        yield "", right
    for wrong in (means, means / len(means), means.mean().expand_as(means)):
        yield _OWN_MEANS, wrong
    yield _NOT_DIVIDED, total


def _right(reference: ReferenceResult, own: Tensor) -> Tensor:
    return reference.rows.labels_N[own]


def _shifted_late(reference: ReferenceResult, own: Tensor) -> Tensor:
    labels = reference.labels_N[own]
    return torch.cat([labels[1:], labels.new_full((min(len(own), 1),), IGNORE_INDEX)])


def _unshifted(reference: ReferenceResult, own: Tensor) -> Tensor:
    return reference.labels_N[own]


def _over_ends(reference: ReferenceResult, own: Tensor) -> Tensor:
    shifted = torch.cat([reference.labels_N[1:], reference.labels_N.new_full((1,), IGNORE_INDEX)])
    return shifted[own]


def _unmasked(reference: ReferenceResult, own: Tensor) -> Tensor:
    ids, targets = reference.rows.ids_N, reference.rows.labels_N
    ends = torch.tensor(reference.rows.lengths).cumsum(0) - 1
    shifted = torch.cat([ids[1:], ids[:1]])
    shifted[ends] = IGNORE_INDEX
    return torch.where(targets == IGNORE_INDEX, shifted, targets)[own]


_LABEL_MISTAKES = (
    _LabelMistake(_right, "", "", ""),
    _LabelMistake(
        _shifted_late,
        "labels shifted after sharding",
        "the last token of every shard has lost its label, or has a stranger's",
        "use the part's labels, which are shifted already; a loss that shifts labels itself shall not",
    ),
    _LabelMistake(
        _unshifted, "labels not shifted", "tokens predict themselves", "use the part's labels: each token's successor"
    ),
    _LabelMistake(
        _over_ends,
        "labels over document ends",
        "last tokens of documents predict the next document's first",
        "use the part's labels: last tokens have none",
    ),
    _LabelMistake(
        _unmasked,
        "label mask dropped",
        "tokens whose label is -100 have a loss",
        "give labels to ContextParallel.shard, and ignore -100",
    ),
)
