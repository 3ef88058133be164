"""Mistakes of router losses: which tokens of which ranks they are of, and how much they count beside the token losses.

One process has the gradients of the token losses alone, and what each mistake would add to them. A mistake is named where the
ranks' gradients are the sum of both, with any factor before what it adds: scripts weigh such losses by factors of their own.
"""

# N tokens of a micro-batch on all ranks, P tokens of padding behind them, E experts

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
# by how much a factor may be off that is 1
_ROUNDED = 1e-2


class RoutedBatch(NamedTuple):
    """A micro-batch's router logits (N + P, E) of each layer, with gradients; the rows of each rank's tokens, and of its padding;
    how many labels each rank has."""

    layers: list[Tensor]
    tokens: list[Tensor]
    padding: list[Tensor]
    labels: list[int]


def explain_router_loss(
    reference: ReferenceResult,
    found: GradientComparison,
    model: torch.nn.Module,
    loss: Callable[[Sequence[Tensor]], Tensor],
    routed: Callable[[], list[RoutedBatch] | None],
) -> Finding | None:
    """Find what is wrong with the router loss, None where gradients differ for another reason, or there is none.

    loss: of router logits by layer. routed: runs the micro-batches in one process; None where that is impossible.
    """
    if reference.token_gradients is None:
        return None
    tokens = {name: _wide(reference.token_gradients, name, one) for name, one in found.expected.items()}
    if not _differs(found, tokens, 1.0):
        return Finding("router loss missing", "gradients are those of the token losses alone", _REMEDY)
    right = {name: one - tokens[name] for name, one in found.expected.items()}
    if (factor := _factor(found, tokens, right)) is not None and abs(factor - 1) > _ROUNDED:
        observed = f"the router loss counts {factor:.4g} times as much as it should beside the token losses"
        return Finding("router loss factor", observed, _REMEDY)
    batches = routed()
    for finding, terms in _mistakes(batches, loss) if batches else ():
        named = dict(model.named_parameters())
        parameters = [named[name] for name in tokens]
        gradients = torch.autograd.grad(sum(terms), parameters, retain_graph=True, materialize_grads=True)  # type: ignore[arg-type]
        added = {name: one.cpu().double() for name, one in zip(tokens, gradients, strict=True)}
        if _factor(found, tokens, added) is not None:
            return finding
    return None


def _mistakes(
    batches: Sequence[RoutedBatch], loss: Callable[[Sequence[Tensor]], Tensor]
) -> Iterator[tuple[Finding, list[Tensor]]]:
    """Mistakes, and the terms of which the router loss is the sum with them."""

    def of(batch: RoutedBatch, rows: Tensor) -> Tensor:
        return loss([layer[rows.to(layer.device)] for layer in batch.layers])

    padded = any(len(rows) for batch in batches for rows in batch.padding)
    if padded:
        observed = "the router loss counts padding"
        terms = [of(batch, torch.cat([*batch.tokens, *batch.padding])) * sum(batch.labels) for batch in batches]
        yield Finding("padding in router loss", observed, _REMEDY), terms
    for more in ("", " and padding") if padded else ("",):
        observed = f"each rank's router loss is of its own tokens{more}: a product of two means, which does not add up over ranks"
        parts = [
            (of(batch, rows), labels)
            for batch in batches
            for own, rest, labels in zip(batch.tokens, batch.padding, batch.labels, strict=True)
            if len(rows := torch.cat([own, rest]) if more else own)
        ]
        finding = Finding("router loss of own tokens", observed, _REMEDY)
        yield finding, [term for term, _ in parts]
        yield finding, [term * labels for term, labels in parts]


def _factor(found: GradientComparison, tokens: dict[str, Tensor], added: dict[str, Tensor]) -> float | None:
    """How often the ranks' gradients have `added` beside those of tokens; None where they are no such sum."""
    along = sum(float(((found.ranks[0][name] - tokens[name]) * one).sum()) for name, one in added.items())
    factor = along / max(sum(float(one.square().sum()) for one in added.values()), 1e-30)
    expected = {name: tokens[name] + factor * one for name, one in added.items()}
    return None if _differs(found, expected, factor) else factor


def _differs(found: GradientComparison, expected: dict[str, Tensor], factor: float) -> bool:
    """Whether the ranks have other gradients than these. factor: what is multiplied is rounded at its own scale."""
    slack = max(abs(factor), 1.0)
    tolerances = {name: slack * one for name, one in found.tolerances.items()}
    return bool(found._replace(expected=expected, tolerances=tolerances).different(found.ranks[0]))


def _wide(gradients: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    return gradients[name].double() if name in gradients else torch.zeros_like(like)
