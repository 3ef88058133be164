"""The numerics watch: skips and explains steps whose loss or gradient is not finite or far too large.

Between backward and the optimizer step, the training loop calls `judge` with the loss and gradient norm, which all ranks
already have. For a refused step, `find` runs the micro-batches again, observes every module's tensors, and names the
first tensor that is not finite, and its rank. `keep_evidence` stores the data for further investigation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.driver.message_monitor import MessageMonitor
from distattn.ir.errors import named_ranks
from distattn.ir.limits import Number, check_limits
from distattn.training.config.sections import WatchKeys
from distattn.training.engines.engine import PipelineStage
from distattn.training.watch import evidence
from distattn.training.watch.module_observer import (
    OUTPUT,
    Observations,
    gather_values,
    local_part,
    observed_modules,
    plain_name,
)
from distattn.training.watch.spike_detector import SpikeDetector
from distattn.training.watch.weight_growth import WeightGrowth

APPLY, SKIP, STOP, ROLLBACK = "apply", "skip", "stop", "rollback"
NOT_FINITE, LARGE, CLEAN = "not finite", "large", "clean"
_WATCHED = ("loss", "grad_norm")
_SHOWN = {"loss": "loss", "grad_norm": "gradient norm"}
# `early` of `SpikeDetector`: in a run's first steps, a gradient norm may grow tenfold, but a mean loss does not
_EARLY = {"loss": 0.5, "grad_norm": 5.0}
# order within a step: weights come before micro-batch 0, reduced gradients after all of a micro-batch's modules
_BEFORE, _AFTER = -1, 1 << 40


@dataclass(frozen=True)
class WatchSettings(WatchKeys):
    """Settings of the watch: which steps it refuses, and its reaction. Raises DistattnError if a setting is out of range.

    action, spike_window and spike_threshold are keys of run files. most_in_a_row: number of consecutive non-finite steps after
    which the run stops, regardless of the action. evidence: number of latest refused steps whose evidence is kept.
    """

    most_in_a_row: Annotated[int, Number(ge=1)] = 10
    evidence: Annotated[int, Number(ge=1)] = 8

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class Streak:
    """Consecutive refused steps. first, last: step numbers; count: number of steps; reason: why the first was refused.

    limits: the limits of "loss" and "grad_norm" when the streak began.
    """

    first: int
    last: int
    count: int
    reason: str
    limits: Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """The decision on a step. action: apply, skip, stop or rollback; reason: a sentence, empty if the step is applied.

    streak: consecutive refused steps, including this step; for an applied step, the streak that it ends, or None.
    recovered: for an applied step that ends a streak, False if its values exceed the limits from before the streak,
    which means that the refused level has become usual.
    """

    step: int
    action: str
    reason: str = ""
    streak: Streak | None = field(default=None, compare=False)
    recovered: bool = field(default=True, compare=False)

    @property
    def applies(self) -> bool:
        """True if the optimizer may take the step."""
        return self.action == APPLY

    @property
    def begins_streak(self) -> bool:
        """True for the first refused step of a streak. Only such a step is examined and reported."""
        return not self.applies and (self.streak is None or self.streak.count == 1)


@dataclass(frozen=True)
class StepFinding:
    """The result of running a refused step again. text: a sentence for the user.

    kind: "not finite", "large" (all values are finite, and this tensor stands out) or "clean" (the fault did not repeat). tensor:
    the tensor's description. computed_in: the module whose code computes it. ranks: the ranks on which it occurred first.
    micro_batch: its index, or -1 for weights. bad, elements: numbers of non-finite values and of all values, on the first of
    these ranks. largest: largest absolute value.
    """

    step: int
    kind: str
    text: str
    tensor: str = ""
    computed_in: str = ""
    ranks: tuple[int, ...] = ()
    micro_batch: int = _BEFORE
    bad: int = 0
    elements: int = 0
    largest: float = 0.0


class NumericsWatch:
    """Judges steps and explains refused steps. All ranks of `group` must make the same calls.

    model: the modules of this rank's pipeline stage. group: None for a single process. folder: evidence is written to its
    subfolder `evidence`. messages: the driver's monitor (`ContextParallel.messages`), needed to name the rank that sends
    non-finite values instead of the ranks that receive them. weights: an object with `named_parameters`, by default the
    model. stage: the pipeline stage. growth: weight norms after the last updates, needed to name an update that destroyed
    the weights.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: WatchSettings,
        group: dist.ProcessGroup | None,
        folder: Path | str,
        messages: MessageMonitor | None = None,
        weights: Any = None,
        stage: PipelineStage = PipelineStage(),  # noqa: B008
        growth: WeightGrowth | None = None,
    ):
        self._stage, self._growth = stage, growth
        self._weights = model if weights is None else weights
        self.settings, self.folder, self._messages = settings, Path(folder), messages
        self._model, self._group = model, group
        self._rank = 0 if group is None else dist.get_rank()
        self._curves = {
            name: SpikeDetector(settings.spike_window, settings.spike_threshold, _EARLY[name]) for name in _WATCHED
        }
        self._in_a_row = 0
        # the streak of refused steps up to the last judged step; None if that step was applied
        self.streak: Streak | None = None
        # whether the last judged step was finite
        self._was_finite = True
        # whether the second run of the streak's first step found bad weights
        self._found_bad_weights = False
        # steps that caused a rollback: if they are bad again, they are skipped
        self._rolled_back: set[int] = set()

    @property
    def doubts_weights(self) -> bool:
        """True if the weights may be bad: several steps in a row were refused, or a second run found bad weights.

        A single refused step is not enough: its cause may be its data or a fault that does not repeat.
        """
        return self.streak is not None and (self.streak.count > 1 or self._found_bad_weights)

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """Decide whether a step may be applied. All ranks pass the same reduced values and get the same verdict.

        loss: mean over all ranks. grad_norm: norm of the full gradient before clipping. Does not communicate.
        """
        values = {"loss": float(loss), "grad_norm": float(grad_norm)}
        self._was_finite = all(map(math.isfinite, values.values()))
        reason = next(filter(None, (self._reason(name, value) for name, value in values.items())), "")
        streak_before, limits = self.streak, {name: curve.limit() for name, curve in self._curves.items()}
        for name, value in values.items():
            self._curves[name].add(value)
        # count non-finite steps, since the detectors never adopt them as a new level
        self._in_a_row = 0 if self._was_finite else self._in_a_row + 1
        if not reason:
            self.streak = None
            recovered = streak_before is None or all(
                value <= streak_before.limits[name] for name, value in values.items()
            )
            return Verdict(step, APPLY, "", streak_before, recovered)
        self.streak = Streak(step, step, 1, reason, limits)
        if streak_before is None:
            self._found_bad_weights = False
        else:
            self.streak = replace(streak_before, last=step, count=streak_before.count + 1)
        action = self.settings.action
        if self._in_a_row >= self.settings.most_in_a_row:
            action, reason = STOP, f"{reason[:-1]}; {self._in_a_row} steps in a row were not finite."
        elif action == ROLLBACK:
            action = SKIP if step in self._rolled_back else ROLLBACK
            self._rolled_back.add(step)
        return Verdict(step, action, reason, self.streak)

    def find(self, step: int, run: Callable[[int], Tensor | None], micro_batches: int) -> StepFinding:
        """Run a refused step again and find the first non-finite tensor, or else the largest output. A collective call.

        run: a function of i that runs the forward and backward passes of micro-batch i as in the step; it may return
        the loss. The caller drops the step's gradients before this call, and the new gradients afterwards. Compiled
        modules run uncompiled.
        """
        first, outputs, largest = self._first_bad_weight(), [], []
        with torch.compiler.set_stance("force_eager"):
            for index in range(micro_batches):
                with observed_modules(self._model, _counted, self._messages, self._stage) as observations:
                    loss = run(index)
                values_and_counts = observations.read().tolist()
                first = first or self._first_bad(index, observations, values_and_counts, loss)
                module_outputs = [
                    (tensor.module, look[1])
                    for tensor, look in zip(observations.seen, values_and_counts, strict=True)
                    if tensor.kind == OUTPUT and not tensor.gradient
                ]
                outputs = [module for module, _ in module_outputs]
                largest.append([value for _, value in module_outputs])
        growth = self._growth and self._growth.largest()
        first_by_rank, outputs_by_rank, growth_by_rank = zip(
            *gather_values(self._group, (first, (outputs, largest), growth)), strict=True
        )
        bad = [tensor for tensor in first_by_rank if tensor is not None]
        if bad:
            finding = _not_finite(step, bad)
        elif not self._was_finite:
            finding = StepFinding(step, CLEAN, "all values are finite in a second run: the fault did not repeat.")
        else:
            finding = _largest_output(step, outputs_by_rank)
        causes = [
            (grown.step, -grown.factor, rank, grown) for rank, grown in enumerate(growth_by_rank) if grown is not None
        ]
        if causes:
            *_, rank, cause = min(causes, key=lambda growth: growth[:3])
            finding = replace(finding, text=f"{cause.text(rank)}; {finding.text}")
        self._found_bad_weights = bool(causes) or finding.kind == NOT_FINITE and finding.micro_batch == _BEFORE
        return finding

    def keep_evidence(
        self,
        verdict: Verdict,
        finding: StepFinding | None,
        documents: Sequence[Mapping[str, Any]],
        batches: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write a refused step's evidence to `evidence/step-N`. Every rank calls it. A full disk only causes a warning.

        documents: a JSON object for each piece of the step's documents. batches: this rank's micro-batches, whose tokens
        are kept.
        """
        evidence.save_evidence(
            evidence.StepEvidence(verdict, finding, documents, batches, self._weights),
            self.folder / "evidence",
            self._rank,
            self.settings.evidence,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run: last values, number of consecutive non-finite steps, and rolled-back steps."""
        return {
            **{name: curve.values() for name, curve in self._curves.items()},
            "in_a_row": self._in_a_row,
            "rolled_back": sorted(self._rolled_back),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Steps that this process has rolled back since the state was saved stay recorded."""
        for name, curve in self._curves.items():
            curve.load(state[name])
        self._in_a_row = max(int(state["in_a_row"]), self._in_a_row)
        # the weights have been replaced, so the streak has ended
        self.streak = None
        self._rolled_back |= set(state["rolled_back"])

    def _reason(self, name: str, value: float) -> str:
        if not math.isfinite(value):
            return f"the {_SHOWN[name]} is {value}."
        limit = self._curves[name].limit()
        if value <= limit:
            return ""
        return (
            f"the {_SHOWN[name]} is {value:.4g}, above {limit:.4g}, which is {self.settings.spike_threshold:g} median absolute "
            f"deviations above the median of {self.settings.spike_window} steps."
        )

    def _first_bad_weight(self) -> _Bad | None:
        for name, parameter in self._weights.named_parameters():
            bad = int((~local_part(parameter).isfinite()).sum())
            if bad:
                return _Bad(
                    (_BEFORE, 0, 0, 0), f"weight {plain_name(name)}", "", self._rank, bad, local_part(parameter).numel()
                )
        return None

    def _first_bad(
        self, index: int, observations: Observations, looks: list[list[float]], loss: Tensor | None
    ) -> _Bad | None:
        observed = zip(observations.places, observations.seen, looks, strict=True)
        place, seen, bad = next(
            ((place, tensor, int(look[0])) for place, tensor, look in observed if look[0]), ((_AFTER, 0, 0), None, 0)
        )
        loss_place = (self._stage.turn_of_loss, 0, 0)
        if self._stage.is_last and place > loss_place and isinstance(loss, Tensor) and not bool(loss.isfinite().all()):
            return _Bad((index, *loss_place), "loss", "", self._rank, 1, 1)
        if seen is not None:
            return _Bad((index, *place), str(seen), seen.computed_in, self._rank, bad, seen.elements)
        for name, parameter in self._weights.named_parameters():
            if parameter.grad is not None and (bad := int((~local_part(parameter.grad).isfinite()).sum())):
                elements = local_part(parameter.grad).numel()
                return _Bad(
                    (index, _AFTER, 0, 0), f"gradient of weight {plain_name(name)}", "", self._rank, bad, elements
                )
        return None


class _Bad(NamedTuple):
    """The first bad tensor of a rank. order: micro-batch and place within it, comparable across ranks."""

    order: tuple[int, int, int, int]
    tensor: str
    computed_in: str
    rank: int
    bad: int
    elements: int


def _counted(tensor: Tensor) -> Tensor:
    """Return the number of non-finite values, and the largest absolute value of the finite values; float64 (2,)."""
    finite = tensor.isfinite()
    largest = torch.where(finite, tensor, 0).abs().amax()
    return torch.stack([(~finite).sum().double(), largest.double()])


def _not_finite(step: int, bad_tensors: Sequence[_Bad]) -> StepFinding:
    """Return the finding for the earliest of all ranks' first bad tensors."""
    earliest = min(bad_tensor.order for bad_tensor in bad_tensors)
    first = [bad_tensor for bad_tensor in bad_tensors if bad_tensor.order == earliest]
    ranks = tuple(sorted(bad_tensor.rank for bad_tensor in first))
    example = min(first, key=lambda bad_tensor: bad_tensor.rank)
    micro_batch = "" if earliest[0] == _BEFORE else f", micro-batch {earliest[0]}"
    # do not repeat a module that the tensor's name already contains
    around = f", computed in {example.computed_in}" if example.computed_in not in ("", *example.tensor.split()) else ""
    values = "value" if example.elements == 1 else "values"
    count = f"{example.bad:,} of {example.elements:,} {values} {'is' if example.bad == 1 else 'are'}"
    text = f"{example.tensor}, {named_ranks(ranks)}{micro_batch}{around}: {count} not finite."
    facts = example.tensor, example.computed_in, ranks, earliest[0], example.bad, example.elements
    return StepFinding(step, NOT_FINITE, text, *facts)


def _largest_output(
    step: int, outputs_by_rank: Sequence[tuple[Sequence[str], Sequence[Sequence[float]]]]
) -> StepFinding:
    """Return the finding for the output that exceeds its module's median by the largest factor.

    If modules have fewer than 3 values, it is the largest output. outputs_by_rank: for each rank, the names of its modules
    and, for each micro-batch, the modules' largest values.
    """
    cells = [
        (value, rank, micro_batch, (at, module))
        for rank, (modules, by_micro_batch) in enumerate(outputs_by_rank)
        for micro_batch, values in enumerate(by_micro_batch)
        # a module may be observed a different number of times in each micro-batch
        for (at, module), value in zip(enumerate(modules), values, strict=False)
    ]
    if not cells:
        return StepFinding(step, CLEAN, "no module has a floating-point output: this step cannot be explained.")
    by_module: dict[tuple[int, str], list[float]] = {}
    for value, _, _, at in cells:
        by_module.setdefault(at, []).append(value)
    medians = {at: statistics.median(values) for at, values in by_module.items()}
    alone = len(by_module[cells[0][3]]) < 3
    value, rank, micro_batch, at = max(
        cells, key=lambda cell: (0.0 if alone else cell[0] / max(medians[cell[3]], 1e-30), cell[0])
    )
    comparison = (
        "" if alone else f", {value / max(medians[at], 1e-30):.3g} times the median of all ranks and micro-batches"
    )
    text = (
        f"all values are finite in a second run; the largest output {'' if alone else 'compared with others '}is that of "
        f"{at[1]}, rank {rank}, micro-batch {micro_batch}: {value:.4g}{comparison}."
    )
    facts = f"{at[1]} {OUTPUT}", at[1], (rank,), micro_batch
    return StepFinding(step, LARGE, text, *facts, largest=value)
