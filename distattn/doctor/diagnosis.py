"""What `distattn doctor` makes of its evidence: what differs from one process, where first, and which mistake explains it.

A mistake is named when making it in one process reproduces what the ranks computed, not because it is usual. What counts as
a difference is measured: see `measure_tolerances`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distattn.doctor.comparison import Diagnosis, Finding, RankResult, distance, in_global_order, parts_of
from distattn.doctor.emulation import emulate
from distattn.doctor.gradient_mistakes import GradientComparison, explain_gradients
from distattn.doctor.logit_mistakes import Hypothesis, explain_logits, first_different_module, micro_batches_of
from distattn.doctor.loss_mistakes import PartLoss, explain_labels, explain_weights, read_losses
from distattn.doctor.module_differences import explain_by_module
from distattn.doctor.reference import ReferenceResult, cross_entropy, measure_tolerances, reference_result
from distattn.doctor.run_checks import check_finite, check_inputs, check_run, check_state
from distattn.doctor.target import Target
from distattn.ir.errors import DistattnError

# of the loss, in roundings of what the script returns
_ROUNDINGS_OF_LOSS = 32


def diagnose(target: Target, ranks: Sequence[RankResult]) -> Diagnosis:
    """Compare what ranks found with the same in this process: logits first, then labels, the loss and gradients; the first
    to differ is explained. Raises DistattnError where the target cannot be run in one process."""
    if finding := check_inputs(ranks):
        return Diagnosis({}, None, [finding])
    model = _model_of_one_process(target, ranks)
    reference = _attempt(target, lambda: reference_result(target, model))
    if found := check_run(reference, ranks) or check_finite(reference, ranks):
        return Diagnosis({}, *found)
    tolerances = _attempt(target, lambda: measure_tolerances(target, model, reference, ranks))
    parts = [part for _, part in parts_of(ranks)]
    logits_NV = in_global_order([part["logits"] for part in parts], [part["tokens"] for part in parts])
    difference = distance(logits_NV, reference.logits_NV)
    measured = {"logits": difference / max(float(reference.logits_NV.double().norm()), 1e-30)}
    if difference > tolerances.logits:
        first = first_different_module(reference, ranks, tolerances)
        finding = explain_logits(
            reference, ranks, logits_NV, tolerances.logits, _Emulation(target, model, reference, ranks)
        )
        if finding.cause == "unknown":
            finding = explain_by_module(model, ranks) or finding
        return Diagnosis(measured, first, [finding])
    losses = read_losses(reference, ranks)
    if finding := explain_labels(reference, losses):
        return Diagnosis(measured, None, [finding])
    finding = _compare_losses_and_gradients(reference, ranks, losses, tolerances.gradients, measured) or check_state(
        ranks
    )
    return Diagnosis(measured, None, [finding] if finding else [])


class _Emulation:
    """Runs a hypothesis over all micro-batches, with the model of one process."""

    def __init__(self, target: Target, model: torch.nn.Module, reference: ReferenceResult, ranks: Sequence[RankResult]):
        self._target, self._model, self._batches = target, model, micro_batches_of(reference, ranks)
        # those that cannot be run at all are not tried again
        self._runs = True

    def __call__(self, hypothesis: Hypothesis, on_one_rank: bool) -> Tensor | None:
        logits = []
        for batch in self._batches if self._runs else ():
            if on_one_rank:
                batch = batch._replace(tokens=[torch.arange(len(batch.pack.ids_N))])
            given = hypothesis.positions(batch), batch.tokens, hypothesis.allowed(batch), hypothesis.mistake
            try:
                logits.append(emulate(self._forward, batch.pack.ids_N, *given))
            except Exception:
                # whatever the model raises where it is given other than the script gives it
                self._runs = False
        return torch.cat(logits) if self._runs else None

    def _forward(self, part: Mapping[str, Any]) -> Tensor:
        return self._target.plain_forward(self._model, part)


def _model_of_one_process(target: Target, ranks: Sequence[RankResult]) -> torch.nn.Module:
    try:
        model = target.model()
    except DistattnError:
        raise
    except (Exception, SystemExit) as error:
        raise DistattnError(
            f"doctor: model() fails in one process, without torch.distributed: {target.describe_error(error)}. There it "
            "returns a plain module."
        ) from None
    try:
        model.load_state_dict(ranks[0]["state"])
    except RuntimeError as error:
        raise DistattnError(
            f"doctor: the ranks' weights do not fit model() in one process ({str(error).splitlines()[0]}); there it has to "
            "return the plain module, and parameters that are partitioned (ZeRO stage 3) cannot be compared."
        ) from None
    return model


def _attempt(target: Target, work: Any) -> Any:
    try:
        return work()
    except DistattnError:
        raise
    except (Exception, SystemExit) as error:
        raise DistattnError(
            f"doctor: the model cannot be run in one process: {target.describe_error(error)}."
        ) from None


def _compare_losses_and_gradients(
    reference: ReferenceResult,
    ranks: Sequence[RankResult],
    losses: Sequence[PartLoss],
    tolerances: dict[str, float],
    measured: dict[str, float],
) -> Finding | None:
    measured["loss"], right = _compare_loss(reference, ranks)
    found = GradientComparison.of(reference, ranks, tolerances)
    finding = explain_gradients(reference, ranks, found)
    if finding is None or finding.cause != "gradient missing":
        measured["gradient"] = found.norm_ratio
    if right and finding is None:
        return None
    if finding is not None and finding.cause in ("gradient missing", "gradients not reduced") and right:
        return finding
    micro_batches = len(reference.packs)
    weights = explain_weights(losses, reference.valid_labels, ranks[0]["loss_scale"], micro_batches, len(ranks))
    if weights is not None or right:
        return weights or finding
    observed = "the loss is not that of the labels, though its gradient is" if finding is None else finding.observed
    remedy = "return the sum of the token losses of part['labels'], times part['loss_scale'], from loss"
    return Finding("loss differs", observed, remedy)


def _compare_loss(reference: ReferenceResult, ranks: Sequence[RankResult]) -> tuple[float, bool]:
    """The ranks' loss over that of one process, and whether it is what their logits give: shares that add up, or the whole on
    every rank."""
    losses = torch.stack([torch.stack([part["loss"] for part in found["parts"]]).sum() for found in ranks])
    own = [
        cross_entropy(part["logits"][: len(part["tokens"])], reference.shifted_labels_N[part["tokens"]]).sum()
        for _, part in parts_of(ranks)
    ]
    expected = torch.stack(own).sum() / reference.valid_labels
    limit = _ROUNDINGS_OF_LOSS * max(part["loss_eps"] for _, part in parts_of(ranks)) * abs(expected)
    shares = bool(abs(losses.sum() - expected) <= limit)
    whole = bool(((losses - expected).abs() <= limit).all())
    return float((losses.mean() if whole else losses.sum()) / reference.loss), shares or whole
