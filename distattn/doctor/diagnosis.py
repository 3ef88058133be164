"""The diagnosis of `distattn doctor`: the first difference from a single-process run, and the mistake that explains it.

A mistake is named only if making it in one process reproduces the ranks' results. The permitted differences are measured: see
`measure_tolerances`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from distattn.doctor.buffer_differences import explain_by_module
from distattn.doctor.comparison import Diagnosis, Finding, RankResult, distance, in_global_order, name_tokens, parts_of
from distattn.doctor.emulated_model import EmulatedModel
from distattn.doctor.gradient_mistakes import GradientComparison, explain_gradients
from distattn.doctor.gradient_sums import LocalGradients
from distattn.doctor.logit_mistakes import RIGHT, TOKENS_MIXED, Hypothesis, explain_logits, first_different_module
from distattn.doctor.loss_mistakes import (
    PartLoss,
    are_unequal,
    explain_form,
    explain_labels,
    explain_weights,
    read_losses,
)
from distattn.doctor.rank_mistakes import (
    describe_errors,
    explain_errors,
    explain_gradient_errors,
    explain_weights_in_use,
)
from distattn.doctor.recording import lookups
from distattn.doctor.recurrence_mistakes import explain_convolution, recurrence_hypotheses
from distattn.doctor.reference import ReferenceResult, Tolerances, digests_of, measure_tolerances, reference_result
from distattn.doctor.replay import BACKWARD, FORWARD, LocalError, Replay, on_one_rank
from distattn.doctor.router_mistakes import RoutedBatch, explain_router_loss
from distattn.doctor.run_checks import check_finite, check_inputs, check_run, check_state
from distattn.doctor.target import Target
from distattn.ir.errors import DistattnError

Result = TypeVar("Result")
# a dtype with a larger eps counts as low precision
_LOW_PRECISION = 1e-5


def diagnose(target: Target, ranks: Sequence[RankResult]) -> Diagnosis:
    """Compare the ranks' results with those of this process and explain the first difference.

    Logits are compared first, then labels, then gradients. Raises DistattnError if the target cannot be run in one process.
    """
    if finding := check_inputs(ranks):
        return Diagnosis({}, None, [finding])
    model = _model_of_one_process(target, ranks)
    batches = _in_one_process(target, lambda: target.batches(model))
    if digests_of(batches) != ranks[0]["batch"]:
        return Diagnosis({}, None, [_OTHER_BATCH])
    reference = _in_one_process(target, lambda: reference_result(target, model, batches))
    if problem := check_run(reference, ranks) or check_finite(reference, ranks):
        return Diagnosis({}, *problem)
    emulation = EmulatedModel(target, model, reference, ranks)
    if finding := _check_repeatable(emulation):
        return Diagnosis({}, None, [finding])
    tolerances = _in_one_process(target, lambda: measure_tolerances(target, model, batches, reference, ranks))
    parts = [part for _, part in parts_of(ranks)]
    logits_NV = in_global_order([part["logits"] for part in parts], [part["tokens"] for part in parts])
    difference = distance(logits_NV, reference.logits_NV)
    norm = max(float(reference.logits_NV.double().norm()), 1e-30)
    measured = {"logits": difference / norm, "rounding": tolerances.coarsest(reference)}
    first = first_different_module(reference, ranks, tolerances)
    replay = _replay(emulation, model, reference, ranks, tolerances)
    errors = replay.first_errors(FORWARD) if replay is not None else []
    if difference > tolerances.logits or errors:
        finding = _explain_forward(model, emulation, replay, errors, reference, ranks, logits_NV, tolerances, first)
        where = describe_errors(errors) if errors else None
        return Diagnosis(measured, errors[0].place.module if errors else first, [finding], where)
    if replay is not None and (errors := _errors_unsplit(target, model, reference, ranks, tolerances)):
        return Diagnosis(measured, errors[0].place.module, [TOKENS_MIXED], describe_errors(errors, of_ranks=False))
    if first in lookups(model):
        observed = f"the output of {first} is not that for the documents' positions"
        return Diagnosis(measured, first, [Finding("positions not sharded", observed, _PASS_POSITIONS)])
    losses = read_losses(reference, ranks)
    if finding := explain_labels(reference, losses) or explain_form(losses):
        return Diagnosis(measured, None, [finding])
    compared = GradientComparison.of(reference, ranks, tolerances.gradients)
    measured |= {"loss": _loss_ratio(reference, ranks), "gradient": compared.norm_ratio}
    routing: list[EmulatedModel] = []

    def routed() -> list[RoutedBatch] | None:
        routing.append(emulation)
        return routing[0].routed_batches()

    explain_router = partial(
        explain_router_loss, reference, compared, model, partial(target.router_loss, model), routed
    )
    backward = _Backward(replay, reference)
    finding = _explain_gradients_and_weights(reference, ranks, losses, compared, explain_router, backward.explain)
    if finding is not None and routing:
        finding = routing[0].with_failures(finding)
    finding = _with_refusal(finding or check_state(ranks), ranks)
    if finding is not None:
        return Diagnosis(measured, None, [finding], backward.where)
    # without a replay, only the model's logits were compared, not each module's output
    hidden = tolerances.logits / norm if replay is None else replay.hidden(FORWARD)
    measured |= {"hidden": hidden, "hidden in gradients": backward.hidden(compared)}
    not_repeated = (emulation.failures or ["for an unknown reason"])[-1] if replay is None else backward.failure
    return Diagnosis(measured, None, [], backward.where, not_repeated)


class _Backward:
    """The backward pass, repeated in one process if the parameters' gradients alone do not show the mistake."""

    def __init__(self, replay: Replay | None, reference: ReferenceResult):
        # not with a router loss, whose gradient does not pass through the logits, from which the replay starts
        self._replay = replay if reference.token_gradients is None else None
        self._done = False
        self.where: str | None = None
        # the error that kept the backward pass from being repeated; empty if there was no error
        self.failure = ""

    def explain(self) -> Finding | None:
        """Repeat the backward pass from the ranks' own gradients and explain the first gradient that differs.

        Return None if all gradients agree or the pass cannot be repeated.
        """
        if self._replay is None:
            return None
        try:
            self._replay.add_backward()
        except Exception as error:
            # recomputed layers call attention in the backward pass, where emulated ranks cannot wait for one another
            self.failure = f"{type(error).__name__}: {error}"
            return None
        self._done = True
        errors = self._replay.first_errors(BACKWARD)
        if errors:
            self.where = describe_errors(errors)
            return explain_gradient_errors(self._replay, errors)
        for name, ratio in self._replay.parameter_errors():
            observed = (
                f"the gradient of {name}, summed over ranks, does not follow from their activations and gradients (its error is "
                f"{ratio:.2g} times what rounding explains)"
            )
            return Finding("gradient differs", observed, "look for code outside its module that uses this parameter")
        return None

    def hidden(self, compared: GradientComparison) -> float:
        """Return the largest relative error of a gradient that could pass as rounding."""
        if self._done and self._replay is not None:
            return self._replay.hidden(BACKWARD)
        return max(
            compared.tolerances[name] / max(float(expected.norm()), 1e-30)
            for name, expected in compared.expected.items()
        )


def _with_refusal(finding: Finding | None, ranks: Sequence[RankResult]) -> Finding | None:
    """Add the setup's refusal to the finding, since both may have one cause. Without a finding, return the refusal alone."""
    for rank, result in enumerate(ranks):
        if refusal := result.get("setup_refusal", "").rstrip("."):
            if finding is None:
                return Finding("refused", f"rank {rank}: {refusal}", "do what this error says")
            return finding._replace(observed=f"{finding.observed}; setup refused, too: {refusal}")
    return finding


def _check_repeatable(emulation: EmulatedModel) -> Finding | None:
    """Return a finding if two runs in one process differ: results then cannot be compared, even if the ranks are seeded."""
    first_NV, second_NV = emulation(RIGHT, False), emulation(RIGHT, False)
    if first_NV is None or second_NV is None or torch.equal(first_NV, second_NV):
        return None
    observed = (
        "one process computes other logits the second time, and the ranks do not: their random numbers are seeded"
    )
    return Finding("dropout on", observed, "set dropout to 0, or call model.eval(), in the script for the doctor")


def _replay(
    emulation: EmulatedModel,
    model: torch.nn.Module,
    reference: ReferenceResult,
    ranks: Sequence[RankResult],
    tolerances: Tolerances,
) -> Replay | None:
    """Repeat the ranks' steps in one process. If that fails, return None and add the reason to `emulation.failures`."""
    try:
        return Replay(emulation, model, reference, ranks, tolerances)
    except Exception as error:
        emulation.note_failure(error)
        return None


def _is_coarse(ranks: Sequence[RankResult]) -> bool:
    """Return whether the ranks compute in lower precision than fp32."""
    outputs = (out for _, part in parts_of(ranks) for out in part["outputs"].values() if out.is_floating_point())
    tensors = chain(outputs, (ranks[0]["parts"][0]["logits"],))
    return any(torch.finfo(tensor.dtype).eps > _LOW_PRECISION for tensor in tensors)


def _errors_unsplit(
    target: Target,
    model: torch.nn.Module,
    reference: ReferenceResult,
    ranks: Sequence[RankResult],
    tolerances: Tolerances,
) -> list[LocalError]:
    """Replay the model with all tokens on a single rank, and return the first errors.

    In fp32, return an empty list without a replay, since the logits would already show an error.
    """
    if not _is_coarse(ranks):
        return []
    whole = on_one_rank(reference, ranks)
    replay = _replay(EmulatedModel(target, model, reference, whole), model, reference, whole, tolerances)
    return [] if replay is None else replay.first_errors(FORWARD)


def _explain_forward(
    model: torch.nn.Module,
    emulation: EmulatedModel,
    replay: Replay | None,
    errors: Sequence[LocalError],
    reference: ReferenceResult,
    ranks: Sequence[RankResult],
    logits_NV: Tensor,
    tolerances: Tolerances,
    first: str | None,
) -> Finding:
    """Find why the logits, or values computed before them, differ. errors: see `Replay.first_errors`."""
    if finding := explain_weights_in_use(ranks):
        return finding

    def score(hypothesis: Hypothesis) -> float | None:
        if replay is None:
            emulated_NV = emulation(hypothesis, False)
            return None if emulated_NV is None else distance(logits_NV, emulated_NV) / tolerances.logits
        try:
            return replay.worst_ratio(hypothesis)
        except Exception as error:
            # for example, an index error for positions beyond the model's table
            emulation.note_failure(error)
            return None

    hypotheses = partial(recurrence_hypotheses, emulation.asked)
    finding = explain_logits(reference, ranks, tolerances.logits, emulation, score, hypotheses)
    # a plain convolution mixes tokens, and a model without attention may ignore positions
    if finding is not None and finding.cause in ("tokens mixed", "positions not sharded"):
        finding = explain_convolution(model, first) or finding
    if finding is None and errors and replay is not None:
        finding = explain_errors(replay, errors, emulation, model, ranks)
    if finding is None:
        finding = explain_by_module(model, ranks, lambda: emulation.gives(logits_NV, tolerances.logits))
    if finding is not None:
        return finding
    observed = "no mistake that the doctor knows explains the difference"
    observed += f"; first to differ is {describe_errors(errors) if errors else _odd_logits(reference, ranks)}"
    remedy = (
        "look at the script's code there, on these ranks and with these tokens; leave it out, and run the doctor again"
    )
    return emulation.with_failures(Finding("unknown", observed, remedy))


_PASS_POSITIONS = "pass the part's position_ids on to the model: they are sharded with the tokens"
_OTHER_BATCH = Finding(
    "batches differ", "one process has another batch than the ranks", "make batch() return the same batch at every call"
)


def _odd_logits(reference: ReferenceResult, ranks: Sequence[RankResult]) -> str:
    """Name the rank whose logits differ most, and its tokens that differ by more than a tenth of the largest difference."""
    worst, description = -1.0, ""
    for rank, part in parts_of(ranks):
        tokens = part["tokens"]
        difference_T = (part["logits"][: len(tokens)].double() - reference.logits_NV[tokens].double()).norm(dim=1)
        if len(tokens) and float(difference_T.max()) > worst:
            worst = float(difference_T.max())
            odd = tokens[difference_T > worst / 10]
            description = f"the model's output, most of all on rank {rank} in {name_tokens(odd.tolist())}"
    return description


def _model_of_one_process(target: Target, ranks: Sequence[RankResult]) -> torch.nn.Module:
    model = target.model_here()
    try:
        model.load_state_dict(ranks[0]["state"])
    except RuntimeError as error:
        raise DistattnError(
            f"doctor: the ranks' weights do not fit model() in one process ({str(error).splitlines()[0]}); there it has to "
            "return the plain module, and parameters that are partitioned (ZeRO stage 3) cannot be compared."
        ) from None
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        # recomputed layers call attention in the backward pass, where emulated ranks cannot wait for one another
        names = ("activation_checkpointing_disable", "gradient_checkpointing_disable")
        methods = (getattr(model, name, None) for name in names)
        if disable := next((method for method in methods if method is not None), None):
            disable()
    for name, module in model.named_modules():
        # the script's setup may have called train() or eval()
        module.training = bool(ranks[0]["settings"].get(f"{name}.training".lstrip("."), module.training))
    return model


def _in_one_process(target: Target, work: Callable[[], Result]) -> Result:
    """Return the result of `work`. Convert its errors to a DistattnError saying that the model cannot be run in one process."""
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
    explain_router: Callable[[], Finding | None],
    explain_backward: Callable[[], Finding | None],
) -> Finding | None:
    """Find the mistake behind wrong gradients.

    Gradients may be missing, not reduced, summed wrongly, or wrong before they are summed (explain_backward), or tokens or the
    router loss (explain_router) may have wrong weights.
    """
    finding = explain_gradients(reference, ranks, compared)
    # missing or unreduced gradients say nothing about the weights of tokens
    if finding is not None and finding.cause in (
        "gradient missing",
        "keys and values detached",
        "gradients not reduced",
    ):
        return finding
    sums = LocalGradients(reference, ranks).explain()
    # a factor common to all weights is no mistake if the gradients are right, since the trainer may correct it later
    if finding is None and sums is None and not are_unequal(losses):
        # in fp32, the parameters' gradients would already show a mistake in the backward pass
        return explain_backward() if _is_coarse(ranks) else None
    weights = explain_weights(reference, losses, ranks[0]["loss_scale"], len(ranks))
    explained = weights or explain_router() or sums
    if explained is None and finding is not None and finding.cause == "gradient differs":
        explained = explain_backward()
    return explained or finding


def _loss_ratio(reference: ReferenceResult, ranks: Sequence[RankResult]) -> float:
    """Return the ranks' loss divided by the single-process loss. Ranks hold shares or the full loss: use what fits better."""
    losses = torch.stack([torch.stack([part["loss"] for part in result["parts"]]).sum() for result in ranks])
    ratios = [float(losses.sum() / reference.loss), float(losses.mean() / reference.loss)]
    return min(ratios, key=lambda ratio: abs(ratio - 1))
