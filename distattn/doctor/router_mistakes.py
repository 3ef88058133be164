"""Find mistakes in router losses: a loss of the wrong tokens, or a wrong weight relative to the token losses.

One process computes the gradients of the token losses alone, and the gradients that a router loss with each mistake would add. A
mistake is named if the ranks' gradients are the former plus any multiple of the latter, since scripts choose the loss's weight.
"""

# N tokens of a micro-batch on all ranks, P padding tokens after them, E experts

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.doctor.comparison import Finding
from distattn.doctor.gradient_mistakes import GradientComparison
from distattn.doctor.reference import ReferenceResult

_REMEDY = (
    "call pytorch.local_loss, or add router_loss.router_loss(model, output, part) to this rank's share; the model's own aux_loss "
    "is of one rank's tokens and padding"
)
# a factor this close to 1 counts as 1
_ROUNDED = 1e-2


class RoutedBatch(NamedTuple):
    """The data of a micro-batch from which router losses are computed.

    layers: each layer's router logits (N + P, E), with gradients. tokens, padding: the rows of each rank's tokens and padding.
    labels: each rank's number of labels.
    """

    layers: list[Tensor]
    tokens: list[Tensor]
    padding: list[Tensor]
    labels: list[int]


def explain_router_loss(
    reference: ReferenceResult,
    compared: GradientComparison,
    model: torch.nn.Module,
    loss: Callable[[Sequence[Tensor]], Tensor],
    routed: Callable[[], list[RoutedBatch] | None],
) -> Finding | None:
    """Find the mistake in the router loss. Return None if there is no router loss or gradients differ for another reason.

    loss: computes the router loss from each layer's router logits. routed: runs the micro-batches in one process and returns
    their router logits, or None if the model fails there.
    """
    if reference.token_gradients is None:
        return None
    expected = compared.expected
    tokens = {name: _wide(reference.token_gradients, name, gradient) for name, gradient in expected.items()}
    if not _differs(compared, tokens, 1.0):
        return Finding("router loss missing", "gradients are those of the token losses alone", _REMEDY)
    right = {name: gradient - tokens[name] for name, gradient in expected.items()}
    if (factor := _factor(compared, tokens, right)) is not None and abs(factor - 1) > _ROUNDED:
        observed = f"the router loss counts {factor:.4g} times as much as it should, compared with the token losses"
        return Finding("router loss factor", observed, _REMEDY)
    batches = routed()
    for finding, terms in _mistakes(batches, loss) if batches else ():
        named = dict(model.named_parameters())
        parameters = [named[name] for name in tokens]
        gradients = torch.autograd.grad(sum(terms), parameters, retain_graph=True, materialize_grads=True)  # type: ignore[arg-type]
        added = {name: gradient.cpu().double() for name, gradient in zip(tokens, gradients, strict=True)}
        if _factor(compared, tokens, added) is not None:
            return finding
    return None


def _mistakes(
    batches: Sequence[RoutedBatch], loss: Callable[[Sequence[Tensor]], Tensor]
) -> Iterator[tuple[Finding, list[Tensor]]]:
    """Yield each mistake with the terms whose sum is the router loss under that mistake."""

    def of(batch: RoutedBatch, rows: Tensor) -> Tensor:
        return loss([layer[rows.to(layer.device)] for layer in batch.layers])

    padded = any(len(rows) for batch in batches for rows in batch.padding)
    if padded:
        observed = "the router loss counts padding"
        terms = [of(batch, torch.cat([*batch.tokens, *batch.padding])) * sum(batch.labels) for batch in batches]
        yield Finding("padding in router loss", observed, _REMEDY), terms
    for more in ("", " and padding") if padded else ("",):
        observed = f"each rank computes the router loss of its own tokens{more}: products of two means do not add up over ranks"
        parts = [
            (of(batch, rows), labels)
            for batch in batches
            for tokens, padding, labels in zip(batch.tokens, batch.padding, batch.labels, strict=True)
            if len(rows := torch.cat([tokens, padding]) if more else tokens)
        ]
        finding = Finding("router loss of own tokens", observed, _REMEDY)
        yield finding, [term for term, _ in parts]
        yield finding, [term * labels for term, labels in parts]


def _factor(compared: GradientComparison, tokens: dict[str, Tensor], added: dict[str, Tensor]) -> float | None:
    """Return the factor f with which the ranks' gradients equal `tokens` + f * `added`; None if no factor fits."""
    along = sum(float(((compared.ranks[0][name] - tokens[name]) * term).sum()) for name, term in added.items())
    factor = along / max(sum(float(term.square().sum()) for term in added.values()), 1e-30)
    expected = {name: tokens[name] + factor * term for name, term in added.items()}
    return None if _differs(compared, expected, factor) else factor


def _differs(compared: GradientComparison, expected: dict[str, Tensor], factor: float) -> bool:
    """Return whether the ranks' gradients differ from `expected`.

    factor: the factor of the router loss's term in `expected`, which also scales the term's rounding error.
    """
    slack = max(abs(factor), 1.0)
    tolerances = {name: slack * tolerance for name, tolerance in compared.tolerances.items()}
    return bool(compared._replace(expected=expected, tolerances=tolerances).different(compared.ranks[0]))


def _wide(gradients: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    return gradients[name].double() if name in gradients else torch.zeros_like(like)
