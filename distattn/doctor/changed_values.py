"""Recognize how values were changed: scaled, rounded, left out, taken from other tokens, or dropped at random."""

# T tokens on a rank, C values per token

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_NEIGHBOURS = (1, -1, 2, -2)


class Change(NamedTuple):
    """A recognized change of values. kind: a short name. description: what the values now are, as the end of a sentence."""

    kind: str
    description: str


def common_change(changes: Sequence[Change | None]) -> Change | None:
    """Return the first rank's change if all ranks' changes were recognized and are of the same kind, otherwise None."""
    recognized = [change for change in changes if change is not None]
    kinds = {change.kind for change in recognized}
    return recognized[0] if len(recognized) == len(changes) and len(kinds) == 1 else None


def describe_change(expected_T: Tensor, got_T: Tensor, bound: float) -> Change | None:
    """Describe how a rank's values (T, ...) differ from the expected values. Return None if no simple change fits.

    bound: the norm of the largest difference that rounding explains.
    """
    expected_TC, got_TC = (values.double().reshape(len(values), -1) for values in (expected_T, got_T))
    if not got_TC.any():
        return Change("zero", "zero")
    if (dtype := coarser_dtype(expected_T, got_T)) is not None:
        return Change("rounded", f"rounded to {str(dtype)[6:]}")
    for change, candidate in _candidates(expected_TC, got_TC):
        if float((candidate - got_TC).norm()) <= bound:
            return change
    return _dropped(expected_TC, got_TC) or _moved(expected_TC, got_TC, bound)


def coarser_dtype(expected_T: Tensor, got_T: Tensor) -> torch.dtype | None:
    """Return the low-precision dtype to which values were rounded before being stored in fp32 or fp64, or None."""
    if got_T.dtype not in (torch.float32, torch.float64) or not got_T.any():
        return None
    for dtype in (torch.bfloat16, torch.float16):
        rounded = got_T.to(dtype).to(got_T.dtype)
        right = expected_T.to(dtype).to(expected_T.dtype)
        near = float((got_T - expected_T).double().norm()) <= 0.05 * float(expected_T.double().norm())
        if near and torch.equal(rounded, got_T) and not torch.equal(right, expected_T):
            return dtype
    return None


def best_factor(expected: Tensor, got: Tensor) -> float:
    """Compute the factor by which the expected values best fit the rank's values."""
    return float((expected.double() * got.double()).sum() / expected.double().square().sum().clamp(min=1e-30))


def search_factor(difference: Callable[[float], float]) -> float:
    """Find the factor between 1/64 and 64 that minimizes `difference`."""
    grid = torch.logspace(-6, 6, 73, base=2.0, dtype=torch.float64).tolist()
    best = min(range(len(grid)), key=lambda index: difference(grid[index]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    # golden-section search
    ratio = (5**0.5 - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = difference(left), difference(right)
    for _ in range(40):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = difference(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = difference(right)
    return (low + high) / 2


def _candidates(expected_TC: Tensor, got_TC: Tensor) -> Iterator[tuple[Change, Tensor]]:
    factor = best_factor(expected_TC, got_TC)
    yield Change("scaled", f"{factor:.6g} times the right ones"), factor * expected_TC
    if len(expected_TC) > 2:
        offset_C = (got_TC - expected_TC).mean(0)
        yield (
            Change("offset", "the right ones plus the same vector for every token, as of a bias"),
            expected_TC + offset_C,
        )


def _dropped(expected_TC: Tensor, got_TC: Tensor) -> Change | None:
    """Describe the effect of dropout: random values are zero, and the others are scaled up. Return None if it does not fit."""
    there = expected_TC != 0
    zero = (got_TC == 0) & there
    share = float(zero.sum() / there.sum().clamp(min=1))
    if not 0.002 < share < 0.95:
        return None
    kept = there & ~zero
    ratio = got_TC[kept] / expected_TC[kept]
    usual = float(ratio.median())
    if float(((ratio / usual - 1).abs() < 0.02).double().mean()) < 0.95:
        return None
    text = f"dropped at random: {100 * share:.0f} % of them are zero, the others {usual:.3g} times the right ones"
    return Change("dropped", text)


def _moved(expected_TC: Tensor, got_TC: Tensor, bound: float) -> Change | None:
    """Describe values that are a neighbouring token's on the same rank, or whose tokens or features are in a different order."""
    tokens, features = expected_TC.shape
    for step in _NEIGHBOURS:
        if tokens > abs(step) + 1:
            candidate_TC = expected_TC.roll(step, 0)
            inner = slice(max(step, 0), tokens + min(step, 0))
            if float((candidate_TC[inner] - got_TC[inner]).norm()) <= bound:
                place = "before" if step > 0 else "after"
                return Change("moved", f"those of the token {abs(step)} {place} on the same rank")
    for reordered, dim, size in (("tokens of the rank", 0, tokens), ("features", 1, features)):
        if not 1 < size <= 4096:
            continue
        expected, got = (expected_TC, got_TC) if dim == 0 else (expected_TC.t(), got_TC.t())
        order = torch.cdist(got, expected).argmin(1)
        if len(order.unique()) == size and float((expected[order] - got).norm()) <= bound:
            return Change("moved", f"the right ones in another order of {reordered}")
    return None
