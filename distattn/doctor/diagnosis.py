"""What `distattn doctor` makes of its evidence: what differs from one process, where first, and which mistake explains it.

A mistake is named when making it in one process reproduces what the ranks computed, not because it is usual. What counts as
a difference is measured: see `measure_tolerances`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.doctor.comparison import Diagnosis, Finding, RankResult, distance, in_global_order, parts_of
from distattn.doctor.emulation import Seen, emulate
from distattn.doctor.gradient_mistakes import GradientComparison, explain_gradients
from distattn.doctor.logit_mistakes import (
    RIGHT,
    Hypothesis,
    MicroBatch,
    explain_logits,
    first_different_module,
    micro_batches_of,
)
from distattn.doctor.loss_mistakes import (
    PartLoss,
    are_unequal,
    explain_labels,
    explain_weights,
    read_losses,
)
from distattn.doctor.module_differences import explain_by_module
from distattn.doctor.recording import lookups, recorded_returns, same_buffers
from distattn.doctor.recurrence_mistakes import explain_convolution, recurrence_hypotheses
from distattn.doctor.reference import ReferenceResult, digests_of, measure_tolerances, reference_result
from distattn.doctor.router_mistakes import RoutedBatch, explain_router_loss
from distattn.doctor.run_checks import check_finite, check_inputs, check_run, check_state
from distattn.doctor.target import Target
from distattn.ir.errors import DistattnError

Result = TypeVar("Result")


def diagnose(target: Target, ranks: Sequence[RankResult]) -> Diagnosis:
    """Compare what ranks found with the same in this process: logits first, then labels and gradients; the first to differ
    is explained. Raises DistattnError where the target cannot be run in one process."""
    if finding := check_inputs(ranks):
        return Diagnosis({}, None, [finding])
    model = _model_of_one_process(target, ranks)
    batches = _in_one_process(target, lambda: target.batches(model))
    if digests_of(batches) != ranks[0]["batch"]:
        return Diagnosis({}, None, [_OTHER_BATCH])
    reference = _in_one_process(target, lambda: reference_result(target, model, batches))
    if found := check_run(reference, ranks) or check_finite(reference, ranks):
        return Diagnosis({}, *found)
    tolerances = _in_one_process(target, lambda: measure_tolerances(target, model, batches, reference, ranks))
    parts = [part for _, part in parts_of(ranks)]
    logits_NV = in_global_order([part["logits"] for part in parts], [part["tokens"] for part in parts])
    difference = distance(logits_NV, reference.logits_NV)
    norm = max(float(reference.logits_NV.double().norm()), 1e-30)
    measured = {"logits": difference / norm, "rounding": tolerances.coarsest(reference)}
    first = first_different_module(reference, ranks, tolerances)
    if difference > tolerances.logits:
        emulation = _Emulation(target, model, reference, ranks)
        of_recurrences = partial(recurrence_hypotheses, emulation.asked)
        finding = explain_logits(reference, ranks, logits_NV, tolerances.logits, emulation, of_recurrences)
        # of a model without attention positions say nothing
        if finding.cause in ("tokens mixed", "positions not sharded"):
            finding = explain_convolution(model, first) or finding
        if finding.cause == "unknown":
            finding = explain_by_module(model, ranks, lambda: emulation.gives(logits_NV, tolerances.logits)) or finding
        return Diagnosis(measured, first, [emulation.with_failures(finding) if finding.cause == "unknown" else finding])
    if first in lookups(model):
        observed = f"{first} does not put out what it does for the documents' positions"
        return Diagnosis(measured, first, [Finding("positions not sharded", observed, _PASS_POSITIONS)])
    losses = read_losses(reference, ranks)
    if finding := explain_labels(reference, losses):
        return Diagnosis(measured, None, [finding])
    compared = GradientComparison.of(reference, ranks, tolerances.gradients)
    measured |= {"loss": _loss_ratio(reference, ranks), "gradient": compared.norm_ratio}
    routing: list[_Emulation] = []

    def routed() -> list[RoutedBatch] | None:
        routing.append(_Emulation(target, model, reference, ranks))
        return routing[0].routed_batches()

    of_router = partial(
        explain_router_loss,
        reference,
        compared,
        model,
        partial(target.router_loss, model),
        routed,
    )
    finding = _explain_gradients_and_weights(reference, ranks, losses, compared, of_router)
    if finding is not None and routing:
        finding = routing[0].with_failures(finding)
    finding = finding or check_state(ranks)
    return Diagnosis(measured, None, [finding] if finding else [])


_PASS_POSITIONS = "pass the part's position_ids on to the model: they are sharded with the tokens"
_OTHER_BATCH = Finding(
    "batches differ",
    "one process has another batch than the ranks",
    "have batch() return the same whenever it is called",
)


class _Emulation:
    """Runs a hypothesis over all micro-batches, with the model of one process."""

    def __init__(self, target: Target, model: torch.nn.Module, reference: ReferenceResult, ranks: Sequence[RankResult]):
        self._target, self._model, self._batches = target, model, micro_batches_of(reference, ranks)
        self._device = next(model.parameters()).device
        # what the model raised with which mistake
        self.failures: list[str] = []
        # what its layers ask of a batch
        self.asked: set[str] = set()
        # a model that takes other arguments is called as the script does
        self._forward = next((one for one in (self._plainly, self._by_script) if self._runs(one)), self._plainly)

    def __call__(self, hypothesis: Hypothesis, on_one_rank: bool) -> Tensor | None:
        try:
            return self._logits(self._forward, hypothesis, on_one_rank)
        except Exception as error:
            # such as positions beyond a table of them
            self.failures.append(self._target.describe_error(error))
            return None

    def gives(self, logits_NV: Tensor, tolerance: float) -> bool:
        """Whether ranks that do all right compute these logits."""
        found = self(RIGHT, False)
        return found is not None and distance(found, logits_NV) <= tolerance

    def with_failures(self, finding: Finding) -> Finding:
        """The finding, and what could not be tried."""
        if not self.failures:
            return finding
        tried = f"; {len(self.failures)} mistakes could not be tried in one process: {self.failures[0]}"
        return finding._replace(observed=finding.observed + tried)

    def routed_batches(self) -> list[RoutedBatch] | None:
        """What routers make of each micro-batch and of all ranks' padding; None where there is none, or `failures` say why."""
        routed = []
        for batch in self._batches:
            with recorded_returns(self._model) as returned:
                try:
                    self._emulate(self._forward, RIGHT, _whole(batch), torch.cat(batch.padding))
                except Exception as error:
                    self.failures.append(self._target.describe_error(error))
                    return None
            layers = self._target.router_logits(returned)
            if layers is None:
                return None
            behind = torch.arange(sum(map(len, batch.padding))) + len(batch.pack.ids_N)
            labels = [int((batch.pack.labels_N[own] != IGNORE_INDEX).sum()) for own in batch.tokens]
            padding = list(behind.split([len(one) for one in batch.padding]))
            routed.append(RoutedBatch(layers, batch.tokens, padding, labels))
        return routed

    def _runs(self, forward: Callable[[Mapping[str, Any]], Tensor]) -> bool:
        try:
            self._logits(forward, RIGHT, False)
        except Exception:
            # where neither way works, `failures` says why
            return False
        return True

    def _logits(
        self, forward: Callable[[Mapping[str, Any]], Tensor], hypothesis: Hypothesis, on_one_rank: bool
    ) -> Tensor:
        batches = map(_whole, self._batches) if on_one_rank else self._batches
        return torch.cat([self._emulate(forward, hypothesis, batch) for batch in batches])

    def _emulate(
        self,
        forward: Callable[[Mapping[str, Any]], Tensor],
        hypothesis: Hypothesis,
        batch: MicroBatch,
        padding: Tensor | None = None,
    ) -> Tensor:
        read, convolved = (
            [one for one in reading(batch) if len(one)]
            for reading in (hypothesis.readings, hypothesis.convolved or hypothesis.readings)
        )
        seen = Seen(hypothesis.allowed(batch), read, convolved)
        given = hypothesis.positions(batch), batch.tokens, seen, hypothesis.mistake
        with same_buffers(self._model):
            return emulate(forward, batch.pack.ids_N, *given, self._device, self.asked, padding)

    def _plainly(self, part: Mapping[str, Any]) -> Tensor:
        return self._target.plain_forward(self._model, part)

    def _by_script(self, part: Mapping[str, Any]) -> Tensor:
        return self._target.forward(self._model, part)


def _whole(batch: MicroBatch) -> MicroBatch:
    """The micro-batch of one rank that has all its tokens."""
    return batch._replace(tokens=[torch.arange(len(batch.pack.ids_N))])


def _model_of_one_process(target: Target, ranks: Sequence[RankResult]) -> torch.nn.Module:
    model = target.model_here()
    try:
        model.load_state_dict(ranks[0]["state"])
    except RuntimeError as error:
        raise DistattnError(
            f"doctor: the ranks' weights do not fit model() in one process ({str(error).splitlines()[0]}); there it has to "
            "return the plain module, and parameters that are partitioned (ZeRO stage 3) cannot be compared."
        ) from None
    for name, module in model.named_modules():
        # the script may have said so in its setup
        module.training = bool(ranks[0]["settings"].get(f"{name}.training".lstrip("."), module.training))
    return model


def _in_one_process(target: Target, work: Callable[[], Result]) -> Result:
    """What `work` returns; what it raises is said to have been raised in one process."""
    try:
        return work()
    except DistattnError:
        raise
    except (Exception, SystemExit) as error:
        raise DistattnError(
            f"doctor: the model cannot be run in one process: {target.describe_error(error)}."
        ) from None


def _explain_gradients_and_weights(
    reference: ReferenceResult,
    ranks: Sequence[RankResult],
    losses: Sequence[PartLoss],
    compared: GradientComparison,
    of_router: Callable[[], Finding | None],
) -> Finding | None:
    """Find what is wrong with gradients, and name the weights of tokens, or the router loss, where these are why."""
    finding = explain_gradients(reference, ranks, compared)
    # what is not reduced is not reduced with right weights either
    if finding is not None and finding.cause in ("gradient missing", "gradients not reduced"):
        return finding
    # an equal factor of all weights may be made up for later
    if finding is None and not are_unequal(losses):
        return None
    return explain_weights(reference, losses, ranks[0]["loss_scale"], len(ranks)) or of_router() or finding


def _loss_ratio(reference: ReferenceResult, ranks: Sequence[RankResult]) -> float:
    """The ranks' loss over that of one process: shares that add up, or the whole on every rank."""
    losses = torch.stack([torch.stack([part["loss"] for part in found["parts"]]).sum() for found in ranks])
    ratios = [float(losses.sum() / reference.loss), float(losses.mean() / reference.loss)]
    return min(ratios, key=lambda ratio: abs(ratio - 1))
