"""What `distattn doctor` makes of its evidence: what differs from one process, where first, and which mistake explains it.

A mistake is named when making it in one process reproduces what the ranks computed, not because it is usual.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distattn.doctor.comparison import Diagnosis, RankResult, in_global_order, relative_difference, tolerance_of
from distattn.doctor.gradient_mistakes import explain_gradients
from distattn.doctor.logit_mistakes import RunHypothesis, explain_logits, first_different_module
from distattn.doctor.loss_mistakes import explain_loss
from distattn.doctor.rank_run import ReferenceResult
from distattn.doctor.run_checks import check_finite, check_run


def diagnose(
    reference: ReferenceResult, ranks: Sequence[RankResult], run_hypothesis: RunHypothesis | None
) -> Diagnosis:
    """Compare what ranks found with one process: logits first, then the loss, then gradients; the first to differ is explained.

    run_hypothesis runs the model in one process with a mistake in it; None where the model cannot be run so.
    """
    if finding := check_run(reference, ranks):
        return Diagnosis({}, None, [finding])
    if found := check_finite(reference, ranks):
        return Diagnosis({}, found[0], [found[1]])
    logits_NV = in_global_order([one["logits"] for one in ranks], [one["tokens"] for one in ranks])
    tolerance = tolerance_of(logits_NV.dtype)
    measured = {"logits": relative_difference(logits_NV, reference.logits_NV)}
    if measured["logits"] > tolerance:
        finding = explain_logits(reference, ranks, logits_NV, tolerance, run_hypothesis)
        return Diagnosis(measured, first_different_module(reference, ranks, tolerance), [finding])
    losses = torch.stack([one["loss"] for one in ranks])
    measured["loss"], right = _compare_loss(losses, reference.loss, tolerance)
    if not right:
        return Diagnosis(measured, None, [explain_loss(reference, ranks, losses, tolerance)])
    finding = explain_gradients(reference, ranks, tolerance, measured)
    return Diagnosis(measured, None, [finding] if finding else [])


def _compare_loss(losses: Tensor, expected: Tensor, tolerance: float) -> tuple[float, bool]:
    """The ranks' loss over that of one process, and whether it is right: shares that add up, or the whole on every rank."""
    limit = tolerance * abs(expected)
    shares = bool(abs(losses.sum() - expected) <= limit)
    whole = bool(((losses - expected).abs() <= limit).all())
    return float((losses.mean() if whole else losses.sum()) / expected), shares or whole
