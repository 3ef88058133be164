"""Infer the labels and weights of a loss from the gradient of the logits, and find mistakes in them.

For cross entropy, a token's gradient is weight * (softmax(logits) - onehot(label)), which determines label and weight exactly.
"""

# T tokens in a part (one rank's share of a micro-batch), V vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.doctor.comparison import Finding, PartResult, RankResult, parts_of
from distattn.doctor.reference import ReferenceResult

# A token has no loss if its gradient is below this fraction of the usual gradient. A label fits if it leaves at most this
# fraction of the gradient unexplained. The limit is loose because bf16 has only two significant digits.
_NO_LOSS = _FITS = 0.05
# the largest relative difference at which the weights of a part's tokens count as equal
_UNEQUAL = 0.05
# the fraction of a token's gradient that cross entropy may leave unexplained
_FORM = 2e-3
# a token with a smaller norm of softmax - onehot is predicted with near certainty, so its gradient shows nothing
_SURE = 0.02


class PartLoss(NamedTuple):
    """The labels and weights that a part's loss used.

    right_T: the correct labels. labels_T: the labels used, IGNORE_INDEX for tokens without a loss. weights_T: the weights of the
    tokens' losses. clear_T: True for tokens whose gradient reveals label and weight. upstream: the factor by which backward
    multiplied the loss; the weights do not include it. eps: the eps of the gradient's dtype. misfit: the fraction of a token's
    gradient that cross entropy does not explain, as the median over tokens. smoothing: the label smoothing that explains the
    misfit, or 0.
    """

    rank: int
    tokens_T: Tensor
    right_T: Tensor
    labels_T: Tensor
    weights_T: Tensor
    clear_T: Tensor
    upstream: float
    eps: float
    misfit: float
    smoothing: float

    @property
    def weight(self) -> float:
        """The median weight of the tokens with a loss; 0 if no token has a loss."""
        counted = self.weights_T[self.clear_T & (self.labels_T != IGNORE_INDEX)]
        return float(counted.median()) if len(counted) else 0.0

    @property
    def labels(self) -> int:
        """The number of tokens with a label."""
        return int((self.right_T != IGNORE_INDEX).sum())

    @property
    def spread(self) -> float:
        """The spread of the tokens' weights: (largest - smallest) / median."""
        counted = self.weights_T[self.clear_T & (self.labels_T != IGNORE_INDEX)]
        return float((counted.max() - counted.min()) / counted.median().abs()) if len(counted) else 0.0


def read_losses(reference: ReferenceResult, ranks: Sequence[RankResult]) -> list[PartLoss]:
    """Infer the labels and weights of every part's loss. Return an empty list if no logits received a gradient."""
    parts = list(parts_of(ranks))
    if not any("logits_gradient" in part for _, part in parts):
        return []
    return [
        _read_loss(rank, part, reference.shifted_labels_N[part["tokens"]])
        for rank, part in parts
        if len(part["tokens"])
    ]


def _read_loss(rank: int, part: PartResult, right_T: Tensor) -> PartLoss:
    tokens_T, logits_TV = part["tokens"], part["logits"][: len(part["tokens"])]
    recorded_TV = part.get("logits_gradient", torch.zeros_like(part["logits"]))[: len(tokens_T)]
    upstream = part.get("loss_gradient") or 1.0
    gradient_TV = recorded_TV.double() / upstream
    probability_TV = logits_TV.double().softmax(-1)
    labels_T, weights_T = _labels_and_weights(gradient_TV, probability_TV, right_T)
    # the gradient's norm for a loss of weight 1 with the right label; for tokens without a label, a typical norm, 1
    unit_T = _direction(probability_TV, right_T).norm(dim=-1).masked_fill(right_T == IGNORE_INDEX, 1.0)
    sure_weights = weights_T[unit_T > _SURE].abs()
    usual = float(sure_weights.median()) if len(sure_weights) else 0.0
    none_T = gradient_TV.norm(dim=-1) <= _NO_LOSS * (usual or float(weights_T.abs().max())) * unit_T
    misfit, smoothing = _misfit_and_smoothing(gradient_TV, probability_TV, labels_T, ~none_T & (unit_T > _SURE))
    return PartLoss(
        rank,
        tokens_T,
        right_T,
        labels_T.masked_fill(none_T, IGNORE_INDEX),
        weights_T.masked_fill(none_T, 0.0),
        unit_T > _SURE,
        upstream,
        torch.finfo(recorded_TV.dtype).eps,
        misfit,
        smoothing,
    )


def _misfit_and_smoothing(
    gradient_TV: Tensor, probability_TV: Tensor, labels_T: Tensor, counted_T: Tensor
) -> tuple[float, float]:
    """Return the fraction of gradients that cross entropy leaves unexplained, and the label smoothing that explains it, or 0."""
    if not counted_T.any():
        return 0.0, 0.0
    gradient_TV, direction_TV = gradient_TV[counted_T], _direction(probability_TV, labels_T)[counted_T]
    rest_TV = gradient_TV - _along(gradient_TV, direction_TV)[:, None] * direction_TV
    norm_T = gradient_TV.norm(dim=-1).clamp(min=1e-30)
    misfit = float((rest_TV.norm(dim=-1) / norm_T).median())
    # weight * (direction + smoothing * (onehot - 1 / V))
    even_TV = F.one_hot(labels_T[counted_T].clamp(min=0), gradient_TV.shape[1]) - 1 / gradient_TV.shape[1]
    terms = torch.stack([direction_TV, even_TV.to(direction_TV)], -1)
    solved = torch.linalg.lstsq(terms, gradient_TV[..., None]).solution.squeeze(-1)
    left = float(((torch.einsum("tvk,tk->tv", terms, solved) - gradient_TV).norm(dim=-1) / norm_T).median())
    return misfit, float((solved[:, 1] / solved[:, 0]).median()) if left < misfit / 3 else 0.0


def _labels_and_weights(gradient_TV: Tensor, probability_TV: Tensor, right_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels and weights that best fit the tokens' gradients. If the right label of a token fits, it is preferred."""
    weights_T = _along(gradient_TV, _direction(probability_TV, right_T))
    rest_TV = gradient_TV - weights_T[:, None] * _direction(probability_TV, right_T)
    fits_T = (right_T != IGNORE_INDEX) & (rest_TV.norm(dim=-1) <= _FITS * gradient_TV.norm(dim=-1))
    # the label's entry has the opposite sign of all others; a negative weight flips all signs
    largest_T, smallest_T = gradient_TV.max(-1), gradient_TV.min(-1)
    guess_T = torch.where(largest_T.values > -smallest_T.values, largest_T.indices, smallest_T.indices)
    labels_T = torch.where(fits_T, right_T, guess_T)
    return labels_T, _along(gradient_TV, _direction(probability_TV, labels_T))


def _direction(probability_TV: Tensor, label_T: Tensor) -> Tensor:
    """Return the gradient (T, V) of each token's cross entropy with respect to its logits."""
    return probability_TV - F.one_hot(label_T.clamp(min=0), probability_TV.shape[1])


def _along(gradient_TV: Tensor, direction_TV: Tensor) -> Tensor:
    """Return the multiple (T,) of each token's direction that comes closest to its gradient."""
    return (gradient_TV * direction_TV).sum(-1) / direction_TV.square().sum(-1).clamp(min=1e-30)


def explain_form(losses: Sequence[PartLoss]) -> Finding | None:
    """Return a finding if a loss is not plain cross entropy, which the reference uses."""
    odd = [loss for loss in losses if loss.misfit > max(_FORM, 3 * loss.eps)]
    if not odd:
        return None
    share = f"{100 * odd[0].misfit:.2g} %"
    observed = f"cross entropy does not explain {share} of the gradient of logits, first on rank {odd[0].rank}"
    if odd[0].smoothing:
        observed += f"; labels are smoothed by {odd[0].smoothing:.3g}"
    remedy = "compare the plain cross entropy of tokens: leave label smoothing and penalties out of the script's loss"
    return Finding("loss not cross entropy", observed, remedy)


class _LabelMistake(NamedTuple):
    """A labeling mistake.

    labels: computes the labels (T,) that the mistake would give a part, from the reference and the batch indices of its tokens.
    """

    labels: Callable[[ReferenceResult, Tensor], Tensor]
    cause: str
    observed: str
    remedy: str


def explain_labels(reference: ReferenceResult, losses: Sequence[PartLoss]) -> Finding | None:
    """Find the mistake in the loss's labels. Return None if the labels are right."""
    if all(_has_labels(loss, loss.right_T) for loss in losses):
        return None
    for mistake in _LABEL_MISTAKES:
        if all(_has_labels(loss, mistake.labels(reference, loss.tokens_T)) for loss in losses):
            return Finding(mistake.cause, mistake.observed, mistake.remedy)
    return _single_labels(losses)


def _has_labels(loss: PartLoss, labels_T: Tensor) -> bool:
    return torch.equal(loss.labels_T[loss.clear_T], labels_T[loss.clear_T])


def _single_labels(losses: Sequence[PartLoss]) -> Finding:
    """Count the lost, leaked and wrong labels, and name the first token of the most frequent kind."""
    masks = {
        "labels lost": lambda loss: (loss.labels_T == IGNORE_INDEX) & (loss.right_T != IGNORE_INDEX) & loss.clear_T,
        "labels leaked": lambda loss: (loss.labels_T != IGNORE_INDEX) & (loss.right_T == IGNORE_INDEX),
        "labels wrong": lambda loss: (
            (loss.labels_T != loss.right_T)
            & (loss.right_T != IGNORE_INDEX)
            & (loss.labels_T != IGNORE_INDEX)
            & loss.clear_T
        ),
    }
    descriptions = {
        "labels lost": "have a label but no loss",
        "labels leaked": "have a loss although they have no label: last tokens of documents, or masked ones",
        "labels wrong": "have the loss of another label than their own",
    }
    counts = {cause: [int(mask(loss).sum()) for loss in losses] for cause, mask in masks.items()}
    cause = max(counts, key=lambda cause: sum(counts[cause]))
    place = next(index for index, count in enumerate(counts[cause]) if count)
    first = losses[place]
    token = int(first.tokens_T[masks[cause](first)][0])
    total = sum(counts[cause])
    observed = f"{total} tokens {descriptions[cause]}; token {token} of the batch, on rank {first.rank}, is the first"
    return Finding(cause, observed, "use exactly part['labels'] in the loss, with -100 ignored")


def are_unequal(losses: Sequence[PartLoss]) -> bool:
    """Return whether tokens of different parts have unequal weights in the backward pass.

    Scaling gradients afterwards cannot correct that, since attention gives each rank gradients from other ranks' tokens.
    """
    weights = [loss.weight * loss.upstream for loss in losses if loss.weight]
    return bool(weights) and max(weights) - min(weights) > _precision(losses) * max(map(abs, weights))


def explain_weights(reference: ReferenceResult, losses: Sequence[PartLoss], scale: float, ranks: int) -> Finding | None:
    """Find the mistake in the weights of tokens. Return None if the weights are right.

    scale: the result of `ContextParallel.loss_scale`, which determines the right weights.
    """
    counted = [loss for loss in losses if loss.weight]
    if not counted:
        return None
    micro_batches, labels = len(reference.packs), reference.valid_labels
    if any(loss.spread > _UNEQUAL for loss in counted):
        observed = "tokens of one part have unequal weights, as after a mean over documents or rows"
        return Finding("tokens weighted unequally", observed, _REMEDY)
    if are_unequal(counted):
        return _unequal_parts(counted, micro_batches)
    # the ratio of the parts' weight to the right weight
    factor = counted[0].weight * labels / scale
    explanations = {
        "loss not divided": ((labels / scale, float(labels)), "sums are not divided by the number of tokens"),
        "loss scale forgotten": ((1 / scale,), f"the factor {scale:.4g} of cp.loss_scale() is missing"),
        "loss scale doubled": ((scale,), f"the factor {scale:.4g} of cp.loss_scale() is in it twice"),
        "micro-batches miscounted": (
            (float(micro_batches), 1 / micro_batches),
            f"the {micro_batches} micro-batches of the step are counted twice, or not at all",
        ),
        "loss divided by ranks": ((1 / ranks, float(ranks)), f"the {ranks} ranks are counted twice, or not at all"),
        "loss over all tokens": (
            (labels / len(reference.ids_N), labels / len(reference.ids_N) / scale),
            "it is divided by all tokens, including those without a label",
        ),
    }
    within = _precision(counted)
    if abs(factor - 1) <= within:
        return None
    fitting = {
        cause: sentence
        for cause, (candidates, sentence) in explanations.items()
        if any(abs(factor - candidate) <= within * candidate and candidate != 1 for candidate in candidates)
    }
    observed = f"the loss is {factor:.4g} times this rank's share of it"
    if not fitting:
        return Finding("loss factor", observed, _REMEDY)
    return Finding(next(iter(fitting)), f"{observed}: {', or '.join(fitting.values())}", _REMEDY)


def _precision(losses: Sequence[PartLoss]) -> float:
    """Return the largest relative difference at which weights, which are medians of values rounded once, count as equal."""
    return max(1e-4, 2 * max(loss.eps for loss in losses))


_REMEDY = "multiply the sum of token losses by the part's loss_scale, once"


def _unequal_parts(losses: Sequence[PartLoss], micro_batches: int) -> Finding:
    """Explain why tokens of different parts have unequal weights."""
    sums = [loss.weight * loss.upstream * loss.labels for loss in losses]
    if max(sums) - min(sums) <= _precision(losses) * max(map(abs, sums)):
        return Finding("mean of means", "each rank divides by its own tokens", _REMEDY)
    if micro_batches > 1:
        observed = "tokens of different micro-batches have unequal weights: each micro-batch divides by its own tokens"
        return Finding("micro-batches miscounted", observed, "shard all micro-batches of a step by one shard_step")
    by_rank = {loss.rank: loss.weight * loss.upstream for loss in losses}
    first = by_rank[min(by_rank)]
    shares = ", ".join(f"rank {rank} {weight / first:.4g}" for rank, weight in by_rank.items())
    return Finding("tokens weighted unequally", f"tokens of different ranks have unequal weights: {shares}", _REMEDY)


def _shifted_late(reference: ReferenceResult, tokens_T: Tensor) -> Tensor:
    return _next_here(reference.labels_N[tokens_T])


def _shifted_twice(reference: ReferenceResult, tokens_T: Tensor) -> Tensor:
    return _next_here(reference.shifted_labels_N[tokens_T])


def _rolled_twice(reference: ReferenceResult, tokens_T: Tensor) -> Tensor:
    return reference.shifted_labels_N[tokens_T].roll(-1)


def _next_here(labels_T: Tensor) -> Tensor:
    return torch.cat([labels_T[1:], labels_T.new_full((1,), IGNORE_INDEX)])


def _unshifted(reference: ReferenceResult, tokens_T: Tensor) -> Tensor:
    return reference.labels_N[tokens_T]


def _over_ends(reference: ReferenceResult, tokens_T: Tensor) -> Tensor:
    return _next_here(reference.labels_N)[tokens_T]


def _unmasked(reference: ReferenceResult, tokens_T: Tensor) -> Tensor:
    shifted = _next_here(reference.ids_N)
    shifted[torch.tensor(reference.lengths).cumsum(0) - 1] = IGNORE_INDEX
    return shifted[tokens_T]


def _unmasked_over_ends(reference: ReferenceResult, tokens_T: Tensor) -> Tensor:
    return _next_here(reference.ids_N)[tokens_T]


_LABEL_MISTAKES = (
    _LabelMistake(
        _shifted_twice,
        "labels shifted twice",
        "tokens predict the token after the next",
        "use the part's labels, which are shifted already, with a loss that does not shift them",
    ),
    _LabelMistake(
        _rolled_twice,
        "labels shifted twice",
        "tokens predict the token after the next, and the last one of a part the part's first",
        "use the part's labels, which are shifted already, with a loss that does not shift them",
    ),
    _LabelMistake(
        _shifted_late,
        "labels shifted after sharding",
        "the last token of every shard has lost its label, or has the label of an unrelated token",
        "use the part's labels, which are shifted already, with a loss that does not shift them",
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
        "pass labels to ContextParallel.shard, and ignore -100",
    ),
    _LabelMistake(
        _unmasked_over_ends,
        "label mask dropped",
        "tokens whose label is -100 have a loss, and last tokens of documents, too",
        "pass labels to ContextParallel.shard, and ignore -100",
    ),
)
