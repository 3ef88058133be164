"""Find local gradients that a trainer left out of its sum, counted twice, or clipped.

Each rank's local gradients of each micro-batch are recorded before the trainer changes them. The trainer's gradients are a
weighted sum of the local gradients. Least squares finds the weights, which should be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.doctor.comparison import Finding, RankResult, name_ranks
from distattn.doctor.reference import ReferenceResult

# the largest relative difference between factors that count as equal, in fp32 and in lower precision
_FINE, _COARSE = 1e-3, 2e-2
_NORMS = (0.1, 0.25, 0.3, 0.5, 1.0, 1.5, 2.0, 5.0, 10.0)
_REDUCE = "sum gradients over all data- and context-parallel ranks, once, after the last micro-batch"


class _Fit(NamedTuple):
    """The factors (ranks, micro-batches) with which local gradients sum to one rank's gradient. fits: True if the sum fits."""

    factors: Tensor
    fits: bool


class LocalGradients:
    """The ranks' gradients before reduction, for parameters that are not sharded."""

    def __init__(self, reference: ReferenceResult, ranks: Sequence[RankResult]):
        self._ranks, self._micro_batches = ranks, len(reference.packs)
        self._expected = {name: gradient.double() for name, gradient in reference.gradients.items()}
        self._local = [part["parameter_gradients"] for result in ranks for part in result["parts"]]
        everywhere = all(self._local)
        self._names = [
            name
            for name, expected in self._expected.items()
            if everywhere
            and any(name in local for local in self._local)
            and all(name in result["gradients"] for result in ranks)
            and all(local[name].shape == expected.shape for local in self._local if name in local)
        ]
        # fp32 gradients may have been reduced in the local gradients' dtype, as DeepSpeed does
        dtypes = [result["gradients"][name].dtype for result in ranks for name in self._names]
        dtypes += [gradient.dtype for local in self._local for gradient in local.values()]
        self._eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
        self._precision = _FINE if self._eps < 1e-5 else _COARSE

    def explain(self) -> Finding | None:
        """Find the mistake in the trainer's sum. Return None if all factors are equal or no known mistake fits."""
        names = [name for name in self._names if bool(self._expected[name].any())]
        if not names:
            return None
        fits = [self._fit(rank, names) for rank in range(len(self._ranks))]
        if not all(fit.fits for fit in fits):
            return self._explain_rest(names, fits[0]) or self._explain_single(names)
        first = fits[0].factors
        largest = float(first.abs().max())
        if any(float((fit.factors - first).abs().max()) > self._precision * largest for fit in fits):
            return self._explain_unequal([fit.factors for fit in fits])
        if largest == 0 or float((first - first.flatten()[0]).abs().max()) <= self._precision * largest:
            return self._explain_clipping(names, first)
        return self._explain_micro_batches(first) or self._explain_ranks(names, first)

    def _fit(self, rank: int, names: Sequence[str]) -> _Fit:
        terms = [[self._term(local, name) for local in self._local] for name in names]
        gradients = [self._ranks[rank]["gradients"][name].double().flatten() for name in names]
        gram = torch.stack([torch.stack([torch.stack([a @ b for b in parts]) for a in parts]) for parts in terms]).sum(
            0
        )
        along = torch.stack(
            [torch.stack([a @ b for a in parts]) for parts, b in zip(terms, gradients, strict=True)]
        ).sum(0)
        scale = gram.diagonal().clamp(min=0.0).sqrt()
        # ranks without tokens have no gradients, so their factors are unknown
        counts = scale > 1e-12 * float(scale.max())
        factors = torch.zeros_like(scale)
        if counts.any():
            normal, right = (gram / scale / scale[:, None])[counts][:, counts], (along / scale)[counts]
            factors[counts] = (
                torch.linalg.lstsq(normal, right[:, None], driver="gelsd").solution.flatten() / scale[counts]
            )
            factors[~counts] = factors[counts].median()
        rest = sum(
            float((b - sum(f * a for f, a in zip(factors, parts, strict=True))).square().sum())
            for parts, b in zip(terms, gradients, strict=True)
        )
        size = float((factors.abs() * scale).sum())
        fits = rest**0.5 <= 4 * self._eps * max(size, 1e-30)
        return _Fit(factors.reshape(len(self._ranks), self._micro_batches), fits)

    def _term(self, local: dict[str, Tensor], name: str) -> Tensor:
        gradient = local.get(name)
        return (
            torch.zeros(self._expected[name].numel(), dtype=torch.float64)
            if gradient is None
            else gradient.double().flatten()
        )

    def _explain_unequal(self, factors: Sequence[Tensor]) -> Finding | None:
        """Explain reduced gradients that differ between ranks."""
        for rank, rank_factors in enumerate(factors):
            others = torch.cat([rank_factors[:rank], rank_factors[rank + 1 :]])
            if float(others.abs().max()) > self._precision * float(rank_factors.abs().max()):
                missing = [
                    other for other in range(len(factors)) if float(rank_factors[other].abs().max()) <= self._precision
                ]
                absent = f": on rank {rank} those of {name_ranks(missing)} are not in the sum" if missing else ""
                observed = f"ranks have different gradients, which are different sums over ranks{absent}"
                return Finding("gradients not reduced", observed, _REDUCE)
        return Finding("gradients not reduced", "each rank has its own gradients only", _REDUCE)

    def _explain_clipping(self, names: Sequence[str], factors: Tensor) -> Finding | None:
        """Explain a factor common to all gradients by clipping. Return None if their norm is not a common clipping limit."""
        factor = self._factor(names)
        norm = float(torch.stack([self._ranks[0]["gradients"][name].double().norm() for name in names]).norm())
        ranks = len(self._ranks)
        usual = any(abs(factor * count - 1) < 5e-2 for count in (1.0, ranks, 1 / ranks, self._micro_batches))
        nearest = min(_NORMS, key=lambda limit: abs(norm - limit))
        if usual or factor > 1 or abs(norm / nearest - 1) > 2e-2:
            return None
        observed = (
            f"all gradients are {factor:.4g} times the right ones, and their norm is {norm:.4g}: they were clipped"
        )
        return Finding("gradients clipped", observed, "clip after the doctor has asked for gradients(model)")

    def _factor(self, names: Sequence[str]) -> float:
        """Return the factor by which the expected gradients best fit those of rank 0."""
        along = sum(float((self._ranks[0]["gradients"][name].double() * self._expected[name]).sum()) for name in names)
        return along / max(sum(float(self._expected[name].square().sum()) for name in names), 1e-30)

    def _explain_micro_batches(self, factors: Tensor) -> Finding | None:
        """Explain factors that differ between micro-batches but not between ranks."""
        by_micro_batch = factors.mean(0)
        largest = float(factors.abs().max())
        if float((factors - by_micro_batch).abs().max()) > self._precision * largest or self._micro_batches == 1:
            return None
        factor_of = enumerate(by_micro_batch.tolist())
        lost = [number for number, factor in factor_of if abs(factor) <= self._precision * largest]
        count = self._micro_batches
        if lost == list(range(count - 1)):
            observed = (
                f"only the last of {count} micro-batches is in the gradients: the others' were zeroed or overwritten"
            )
            return Finding("micro-batches lost", observed, "call zero_grad once a step, after optimizer.step()")
        if lost:
            numbers = ", ".join(str(number + 1) for number in lost)
            observed = f"micro-batch {numbers} of {count} is not in the gradients"
            return Finding("micro-batches lost", observed, "add up the gradients of all micro-batches of a step")
        shares = ", ".join(f"{factor / largest:.4g}" for factor in by_micro_batch.tolist())
        observed = f"micro-batches count unequally in the gradients, as {shares}: each is scaled, reduced or clipped on its own"
        return Finding(
            "micro-batches weighted unequally", observed, "clip and scale gradients once, after the last micro-batch"
        )

    def _explain_ranks(self, names: Sequence[str], factors: Tensor) -> Finding | None:
        """Explain factors that differ between ranks."""
        by_rank = factors.mean(1)
        largest = float(by_rank.abs().max())
        lost = [rank for rank, factor in enumerate(by_rank.tolist()) if abs(factor) <= self._precision * largest]
        if lost:
            observed = f"the gradients of {name_ranks(lost)} are not in the sum"
            return Finding("gradients not reduced", observed, _REDUCE)
        norms = []
        for rank in range(len(self._ranks)):
            parts = self._local[rank * self._micro_batches : (rank + 1) * self._micro_batches]
            total = [sum((self._term(local, name) for local in parts), torch.zeros(1)) for name in names]
            norms.append(float(by_rank[rank].abs()) * float(torch.stack([term.norm() for term in total]).norm()))
        shares = ", ".join(f"{factor / largest:.4g}" for factor in by_rank.tolist())
        clipped = [
            rank for rank, factor in enumerate(by_rank.tolist()) if abs(factor) < (1 - self._precision) * largest
        ]
        held = [norms[rank] for rank in clipped]
        if held and max(norms) <= 1.02 * min(held) and max(held) <= 1.02 * min(held):
            observed = (
                f"ranks' gradients count unequally in their sum, as {shares}, so that their norms are equal: each rank has "
                f"clipped its own, to a norm of {norms[clipped[0]]:.4g}"
            )
            return Finding(
                "clipped before the reduction",
                observed,
                "clip once, after gradients are summed over ranks, by their whole norm",
            )
        observed = f"ranks' gradients count unequally in their sum, as {shares}"
        return Finding(
            "ranks weighted unequally", observed, "scale and clip gradients after they are summed over ranks"
        )

    def _explain_rest(self, names: Sequence[str], fit: _Fit) -> Finding | None:
        """Explain gradients that differ from a sum of local gradients by an added term or by rounding."""
        old = [name for result in self._ranks for name in result["old_gradients"]]
        if old:
            observed = f"{old[0]} had a gradient before the first backward pass, which is in the sum"
            return Finding("gradients left over", observed, "call zero_grad before the first micro-batch of a step")
        gradients = self._ranks[0]["gradients"]
        for dtype in (torch.bfloat16, torch.float16) if self._eps < 1e-5 else ():
            if all(gradients[name].dtype == torch.float32 for name in names) and all(
                torch.equal(gradients[name], gradients[name].to(dtype).float()) for name in names
            ):
                observed = f"all gradients are rounded to {str(dtype)[6:]}"
                return Finding("gradients rounded", observed, "reduce gradients in fp32, and keep them in fp32")
        total = {name: sum(self._term(local, name) for local in self._local) for name in names}
        factor = float(fit.factors.median())
        rest = {name: gradients[name].double().flatten() - factor * total[name] for name in names}
        weights = {
            name: self._ranks[0]["state"][name].double().flatten() for name in names if name in self._ranks[0]["state"]
        }
        if len(weights) < len(names):
            return None
        square = sum(float(weight.square().sum()) for weight in weights.values())
        decay = sum(float(rest[name] @ weight) for name, weight in weights.items()) / max(square, 1e-30)
        left = sum(float((rest[name] - decay * weight).square().sum()) for name, weight in weights.items()) ** 0.5
        if left > 0.02 * sum(float(term.square().sum()) for term in rest.values()) ** 0.5:
            return None
        observed = (
            f"the gradients contain {decay:.4g} times the weights: weight decay, or a penalty that one process lacks"
        )
        return Finding("weights in gradients", observed, "leave weight decay to the optimizer")

    def _explain_single(self, names: Sequence[str]) -> Finding | None:
        """Explain a parameter whose gradient is summed over ranks and micro-batches with unusual factors."""
        fits = {name: self._fit(0, [name]) for name in names}
        usual = (
            float(torch.stack([fit.factors.median() for fit in fits.values() if fit.fits]).median())
            if any(fit.fits for fit in fits.values())
            else 0.0
        )
        if not usual:
            return None
        for name, (factors, fit) in fits.items():
            off = float((factors / usual - 1).abs().max())
            if not fit or off <= 2 * self._precision:
                continue
            others = [
                other
                for other, other_fit in fits.items()
                if other != name
                and other_fit.fits
                and float((other_fit.factors / usual - 1).abs().max()) > 2 * self._precision
            ]
            if len(others) + 1 > len(fits) / 2:
                return None
            more = f" (and of {len(others)} others)" if others else ""
            if float((factors - factors.mean()).abs().max()) <= self._precision * float(factors.abs().max()):
                observed = f"the gradient of {name}{more} counts {float(factors.mean()) / usual:.4g} times as much as the others'"
                return Finding(
                    "gradient differs", observed, "see that its gradient is reduced, and added up, like the others'"
                )
            lost = [
                rank
                for rank, factor in enumerate(factors.mean(1).tolist())
                if abs(factor) <= self._precision * abs(usual)
            ]
            if lost:
                observed = f"the gradient of {name}{more} lacks the share of {name_ranks(lost)} on rank 0"
                return Finding("gradients not reduced", observed, _REDUCE)
        return None
