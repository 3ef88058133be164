"""Find why gradients differ: they are missing, not summed over ranks, scaled, or wrong in one parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.doctor.comparison import Finding, RankResult, name_ranks
from distattn.doctor.reference import ReferenceResult


class GradientComparison(NamedTuple):
    """The gradients of all parameters in fp64, on each rank and in one process (expected).

    tolerances: the largest permitted norm of each gradient's difference from `expected`. roundings: the largest permitted
    relative difference of each gradient between ranks, since reduced gradients may differ by a rounding or two.
    """

    ranks: list[dict[str, Tensor]]
    expected: dict[str, Tensor]
    tolerances: dict[str, float]
    roundings: dict[str, float]

    @staticmethod
    def of(reference: ReferenceResult, ranks: Sequence[RankResult], tolerances: dict[str, float]) -> GradientComparison:
        """Collect the gradients of the parameters that have a gradient on every rank."""
        names = [name for name in reference.gradients if all(name in result["gradients"] for result in ranks)]
        wide = [{name: result["gradients"][name].double() for name in names} for result in ranks]
        expected = {name: reference.gradients[name].double() for name in names}
        coarsest = {name: max(torch.finfo(result["gradients"][name].dtype).eps for result in ranks) for name in names}
        return GradientComparison(wide, expected, tolerances, {name: 4 * eps for name, eps in coarsest.items()})

    @property
    def norm_ratio(self) -> float:
        """The norm of rank 0's gradient divided by that of the expected gradient."""
        return _norm(self.ranks[0]) / max(_norm(self.expected), 1e-30)

    def factor_of(self, gradients: dict[str, Tensor]) -> float:
        """Return the factor by which the expected gradients best fit `gradients`."""
        along = sum(float((gradients[name] * right).sum()) for name, right in self.expected.items())
        return along / max(_norm(self.expected) ** 2, 1e-30)

    def different(self, gradients: dict[str, Tensor], factor: float = 1.0) -> list[str]:
        """Return the parameters whose gradient in `gradients` differs from `factor` times the expected gradient."""
        # scaling a gradient also scales its rounding error
        slack = max(abs(factor), 1.0)
        return [
            name
            for name, right in self.expected.items()
            if float((gradients[name] - factor * right).norm()) > slack * self.tolerances[name]
        ]

    def unequal(self) -> list[str]:
        """Return the parameters whose gradients differ between ranks."""
        first = self.ranks[0]
        least = 1e-9 * _norm(first)
        return [
            name
            for name, gradient in first.items()
            if any(
                float((other[name] - gradient).norm()) > least + self.roundings[name] * float(gradient.norm())
                for other in self.ranks[1:]
            )
        ]


def explain_gradients(
    reference: ReferenceResult, ranks: Sequence[RankResult], compared: GradientComparison
) -> Finding | None:
    """Find the mistake in the ranks' gradients. Return None if they match the expected gradients."""
    if finding := explain_missing(reference, ranks, compared):
        return finding
    if unequal := compared.unequal():
        return _not_reduced(compared, unequal)
    different = compared.different(compared.ranks[0])
    if not different:
        return None
    factor = compared.factor_of(compared.ranks[0])
    if not compared.different(compared.ranks[0], factor):
        return _wrong_factor(factor, len(ranks))
    return _different(compared, different)


def explain_missing(
    reference: ReferenceResult, ranks: Sequence[RankResult], compared: GradientComparison
) -> Finding | None:
    """Find parameters that have a gradient in one process, but no gradient or only zeros on some rank."""
    lacking = {
        name: [
            rank
            for rank, result in enumerate(ranks)
            if name not in result["gradients"] or _is_lost(name, result, compared)
        ]
        for name in reference.gradients
    }
    lost = [name for name, of_ranks in lacking.items() if of_ranks]
    if not lost:
        return None
    on = [rank for rank in range(len(ranks)) if any(rank in lacking[name] for name in lost)]
    who = "any rank" if len(on) == len(ranks) else name_ranks(on)
    kinds = sorted({_kind(name) for name in lost})
    layers = len(lost) // max(len(kinds), 1)
    parameters = (
        lost[0]
        if len(lost) == 1
        else f"{' and '.join(kinds[:4])} ({len(lost)} parameters, {lost[0]} the first of them)"
    )
    observed = f"{parameters} {'has' if len(lost) == 1 else 'have'} no gradient on {who}"
    if layers and all(any(mark in kind for mark in KEY_VALUE) for kind in kinds):
        observed += ": keys and values are detached, and everything before them has a wrong gradient, too"
        return Finding("keys and values detached", observed, "keep detach() and no_grad() away from keys and values")
    return Finding(
        "gradient missing", observed, "let its loss reach it: look for detach(), no_grad() and requires_grad"
    )


# substrings that mark the names of key and value projections
KEY_VALUE = ("k_proj", "v_proj", "kv_", "key", "value", "k_norm", "wk", "wv", "to_k", "to_v")


def _is_lost(name: str, rank: RankResult, compared: GradientComparison) -> bool:
    return not rank["gradients"][name].any() and float(compared.expected[name].norm()) > compared.tolerances[name]


def _kind(name: str) -> str:
    """Return the part of a parameter's name after its layer number."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def _norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm()) if gradients else 0.0


def _not_reduced(compared: GradientComparison, unequal: list[str]) -> Finding:
    remedy = "sum gradients over all data- and context-parallel ranks"
    if len(unequal) < len(compared.expected) / 2:
        others = f" and of {len(unequal) - 1} others" if len(unequal) > 1 else ""
        observed = f"ranks have different gradients of {unequal[0]}{others}, and the same ones of other parameters"
        return Finding("gradients not reduced", observed, remedy)
    observed = "ranks have different gradients"
    total = {name: torch.stack([rank[name] for rank in compared.ranks]).sum(0) for name in compared.expected}
    factor = compared.factor_of(total)
    if not compared.different(total, factor):
        observed += f"; their sum is {factor:.4g} times the right one"
    return Finding("gradients not reduced", observed, remedy)


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


def _different(compared: GradientComparison, different: list[str]) -> Finding:
    name = different[0]
    expected, got = compared.expected[name], compared.ranks[0][name]
    share = float((got * expected).sum() / expected.norm().square().clamp(min=1e-30))
    others = f", of {len(different)} of {len(compared.expected)}" if len(different) > 1 else ""
    observed = (
        f"{name} is the first parameter{others} whose gradient differs ({share:.4g} times the right one along it)"
    )
    return Finding("gradient differs", observed, "see that its gradient is reduced like the others'")
