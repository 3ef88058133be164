"""Which mistake explains gradients that differ: missing, not summed over ranks, scaled, or wrong in one parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.doctor.comparison import Finding, RankResult
from distattn.doctor.rank_run import ReferenceResult


class _Flat(NamedTuple):
    """All gradients as one fp64 vector: of each rank, and of one process; norm is the latter's."""

    ranks: list[Tensor]
    expected: Tensor
    norm: float

    def factor_of(self, vector: Tensor) -> float:
        """How many times the right gradient a vector is, along it."""
        return float(vector @ self.expected / (self.expected @ self.expected))

    def is_multiple(self, vector: Tensor, tolerance: float) -> bool:
        """Whether a vector is the right gradient but for a factor."""
        factor = self.factor_of(vector)
        return float((vector - factor * self.expected).norm()) <= tolerance * abs(factor) * self.norm


def explain_gradients(
    reference: ReferenceResult, ranks: Sequence[RankResult], tolerance: float, measured: dict[str, float]
) -> Finding | None:
    """Find what is wrong with the ranks' gradients, None where they are those of one process.

    measured: takes the gradient norm of rank 0 over that of one process, as "gradient".
    """
    if finding := _missing(reference, ranks):
        return finding
    flat = _flatten(reference, ranks)
    measured["gradient"] = float(flat.ranks[0].norm()) / flat.norm
    apart = max(float((one - flat.ranks[0]).norm()) for one in flat.ranks) / max(float(flat.ranks[0].norm()), 1e-30)
    if apart > tolerance:
        return _not_reduced(flat, tolerance)
    if flat.is_multiple(flat.ranks[0], tolerance):
        factor = flat.factor_of(flat.ranks[0])
        return _wrong_factor(factor, len(ranks)) if abs(factor - 1) > tolerance else None
    return _first_different(reference, ranks[0], tolerance, flat.norm)


def _missing(reference: ReferenceResult, ranks: Sequence[RankResult]) -> Finding | None:
    for name in reference.gradients:
        lacking = [rank for rank, found in enumerate(ranks) if name not in found["gradients"]]
        if lacking:
            return Finding("gradient missing", f"{name} has no gradient on rank {lacking[0]}", "let its loss reach it")
    return None


def _flatten(reference: ReferenceResult, ranks: Sequence[RankResult]) -> _Flat:
    names = list(reference.gradients)
    flat = [torch.cat([found["gradients"][name].double().flatten() for name in names]) for found in ranks]
    expected = torch.cat([reference.gradients[name].double().flatten() for name in names])
    return _Flat(flat, expected, float(expected.norm()))


def _not_reduced(flat: _Flat, tolerance: float) -> Finding:
    total = torch.stack(flat.ranks).sum(0)
    observed = "ranks have different gradients"
    if flat.is_multiple(total, tolerance):
        observed += f"; their sum is {flat.factor_of(total):.4g} times the right one"
    return Finding("gradients not reduced", observed, "sum gradients over all data- and context-parallel ranks")


def _wrong_factor(factor: float, ranks: int) -> Finding:
    observed = f"all gradients are {factor:.4g} times the right ones on {ranks} ranks"
    if factor < 1:
        remedy = "multiply the loss by cp.loss_scale(trainer), which measures how gradients are reduced"
    else:
        remedy = (
            "a sum over ranks is differentiated twice: let each rank's loss be its share, without a differentiable "
            "all_reduce or all_gather"
        )
    return Finding("gradient factor", observed, remedy)


def _first_different(reference: ReferenceResult, found: RankResult, tolerance: float, norm: float) -> Finding | None:
    for name, gradient in reference.gradients.items():
        expected, got = gradient.double(), found["gradients"][name].double()
        # a gradient that is all but zero beside the others is not judged by its own norm
        if float((got - expected).norm()) > tolerance * float(expected.norm()) + 1e-9 * norm:
            share = float((got.flatten() @ expected.flatten()) / expected.norm() ** 2)
            observed = (
                f"{name} is the first parameter whose gradient differs ({share:.4g} times the right one along it)"
            )
            return Finding("gradient differs", observed, "see that its gradient is reduced like the others'")
    return None
