"""What the doctor's comparisons share: findings, and how results of ranks are put beside those of one process."""

# N tokens of the batch

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# what `rank_run.run_on_this_rank` returns on one rank
RankResult = dict[str, Any]

# largest relative differences by dtype; transformers computes norms in fp32
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_COARSE_TOLERANCE = 0.05


class Finding(NamedTuple):
    """A mistake: its short name, what was observed, and what to do."""

    cause: str
    observed: str
    remedy: str


class Diagnosis(NamedTuple):
    """What was measured, by name, the first module whose output differs, and the findings, the likely cause first."""

    measured: dict[str, float]
    first_difference: str | None
    findings: list[Finding]


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest relative difference at which two results of this dtype count as the same."""
    return _TOLERANCE.get(dtype, _COARSE_TOLERANCE)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Compute max|a - b| / max|b|."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))


def in_global_order(parts: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
    """Put what ranks have for their tokens, (T, ...) each, into the order of the batch, (N, ...); padding is left out.

    tokens: the global coordinates of each rank's tokens.
    """
    whole = parts[0].new_zeros((sum(map(len, tokens)), *parts[0].shape[1:]))
    for part, own in zip(parts, tokens, strict=True):
        whole[own] = part[: len(own)]
    return whole
