"""The numerics watch: a step with a loss or gradient that is not finite, or far too large, is not applied, and is explained.

After backward and before the optimizer's step a loop asks `judge`, which looks at the two numbers that all ranks have anyway. For
a step that is refused `find` runs its micro-batches again and looks at what every module computes: the first tensor that is not
finite is named, with its rank. `keep_evidence` puts aside what is needed to look further.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.driver.message_monitor import MessageMonitor
from distattn.ir.errors import DistattnError, named_ranks
from distattn.training import evidence
from distattn.training.engines.engine import PipelineStage
from distattn.training.module_observer import OUTPUT, Observations, gathered, local_part, observed_modules, plain_name
from distattn.training.spike_detector import SpikeDetector
from distattn.training.weight_growth import WeightGrowth

APPLY, SKIP, STOP, ROLLBACK = "apply", "skip", "stop", "rollback"
ACTIONS = (SKIP, STOP, ROLLBACK)
NOT_FINITE, LARGE, CLEAN = "not finite", "large", "clean"
_WATCHED = ("loss", "grad_norm")
_SHOWN = {"loss": "loss", "grad_norm": "gradient norm"}
# a gradient norm may well grow tenfold in the first steps of a run, a mean loss does not
_EARLY = {"loss": 0.5, "grad_norm": 5.0}
# in the order of a step: weights before micro-batch 0, reduced gradients after all that a micro-batch's modules computed
_BEFORE, _AFTER = -1, 1 << 40


@dataclass(frozen=True)
class WatchSettings:
    """What the watch refuses, and what becomes of the run. Raises DistattnError naming a setting that cannot be.

    action: of a refused step; skip: go on without it, stop: end the run, rollback: go back to the last checkpoint, and leave the
    step out when it is bad again. spike_window: steps whose losses and gradient norms say what is usual; 0 for non-finite values
    only. spike_threshold: by how many median absolute deviations a value may be above the median. most_in_a_row: after so many
    steps that are not finite the run stops, whatever the action. evidence: of so many steps evidence is kept, the newest.
    """

    action: str = SKIP
    spike_window: int = 128
    spike_threshold: float = 20.0
    most_in_a_row: int = 10
    evidence: int = 8

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise DistattnError(f"action is one of {', '.join(ACTIONS)}, not {self.action!r}.")
        if self.spike_window < 0 or 0 < self.spike_window < 8:
            raise DistattnError(f"spike_window is 0, or at least 8 steps, not {self.spike_window}.")
        if not (math.isfinite(self.spike_threshold) and self.spike_threshold > 0):
            raise DistattnError(f"spike_threshold is a number above 0, not {self.spike_threshold}.")
        for name in ("most_in_a_row", "evidence"):
            if getattr(self, name) < 1:
                raise DistattnError(f"{name} is at least 1, not {getattr(self, name)}.")


@dataclass(frozen=True)
class Streak:
    """Refused steps in a row. first, last: their numbers; count: how many; reason: of the first.

    limits: by "loss" and "grad_norm", what a value must not have exceeded when the streak began.
    """

    first: int
    last: int
    count: int
    reason: str
    limits: Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """The decision on a step. action: apply, skip, stop or rollback; reason: a sentence, empty where the step is applied.

    streak: the refused steps in a row that this one belongs to; of a step that is applied those that it ends, else None.
    recovered: of a step that is applied after a streak whether it would have been applied before the streak, too; where it would
    not, what was refused first is usual by now.
    """

    step: int
    action: str
    reason: str = ""
    streak: Streak | None = field(default=None, compare=False)
    recovered: bool = field(default=True, compare=False)

    @property
    def applies(self) -> bool:
        """Whether the optimizer may take the step."""
        return self.action == APPLY

    @property
    def begins_streak(self) -> bool:
        """Return whether the step is refused and the one before was not: this step is examined and reported."""
        return not self.applies and (self.streak is None or self.streak.count == 1)


@dataclass(frozen=True)
class Finding:
    """What a second run of a step has shown. text: a sentence for people.

    kind: "not finite", "large" (all is finite, and this stands out) or "clean" (the fault did not repeat). tensor, computed_in:
    which tensor, and the module whose code makes it. ranks: those that had it first; micro_batch: in which, -1 before all.
    bad, elements: numbers that are not finite, and how many there are, on the first of the ranks. largest: absolute value.
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
    """Judges steps, and finds what was wrong with one. All ranks of `group` call alike; they have the modules of their stage.

    group: None for one process. folder: evidence goes into its subfolder `evidence`. messages: the driver's
    (`ContextParallel.messages`), so that a rank which sends what is not finite is named, not those that receive it. weights: what
    has `named_parameters`, if not the model. stage: the pipeline's that `model` is. growth: what the last updates did to weights,
    so that an update that has destroyed them is named.
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
        # the refused steps up to the one that was judged last
        self.streak: Streak | None = None
        # of the step that was judged last
        self._was_finite = True
        # in the second run of the streak's first step
        self._found_bad_weights = False
        # steps for which the run has gone back: when they are bad again, they are left out
        self._rolled_back: set[int] = set()

    @property
    def doubts_weights(self) -> bool:
        """Return whether refused steps cast doubt on the weights: several in a row, or one whose second run found bad weights.

        One refused step changed nothing, and its cause may be its data or a fault that does not repeat.
        """
        return self.streak is not None and (self.streak.count > 1 or self._found_bad_weights)

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """Judge whether a step may be applied. All ranks give the same reduced numbers and get the same verdict.

        step: its number; loss: the mean over all ranks, grad_norm: of the whole gradient, before clipping. Nothing is sent.
        """
        values = {"loss": float(loss), "grad_norm": float(grad_norm)}
        self._was_finite = all(map(math.isfinite, values.values()))
        reason = next(filter(None, (self._reason(name, value) for name, value in values.items())), "")
        before, limits = self.streak, {name: curve.limit() for name, curve in self._curves.items()}
        for name, value in values.items():
            self._curves[name].add(value)
        # a new level becomes usual by itself; what is not finite does not
        self._in_a_row = 0 if self._was_finite else self._in_a_row + 1
        if not reason:
            self.streak = None
            recovered = before is None or all(value <= before.limits[name] for name, value in values.items())
            return Verdict(step, APPLY, "", before, recovered)
        self.streak = Streak(step, step, 1, reason, limits)
        if before is None:
            self._found_bad_weights = False
        else:
            self.streak = replace(before, last=step, count=before.count + 1)
        action = self.settings.action
        if self._in_a_row >= self.settings.most_in_a_row:
            action, reason = STOP, f"{reason[:-1]}; {self._in_a_row} steps in a row were not finite."
        elif action == ROLLBACK:
            action = SKIP if step in self._rolled_back else ROLLBACK
            self._rolled_back.add(step)
        return Verdict(step, action, reason, self.streak)

    def find(self, step: int, run: Callable[[int], Tensor | None], micro_batches: int) -> Finding:
        """Run a refused step again, and name the first tensor that is not finite, or what stands out. A collective call.

        run(i): forward and backward of micro-batch i, as in the step; it may return the loss. Gradients are in the caller's
        hands: drop the step's before, and these afterwards. What is compiled is run uncompiled.
        """
        first, outputs, largest = self._first_bad_weight(), [], []
        with torch.compiler.set_stance("force_eager"):
            for index in range(micro_batches):
                with observed_modules(self._model, _counted, self._messages, self._stage) as observations:
                    loss = run(index)
                looks = observations.read().tolist()
                first = first or self._first_bad(index, observations, looks, loss)
                shown = [
                    (seen.module, look[1])
                    for seen, look in zip(observations.seen, looks, strict=True)
                    if seen.kind == OUTPUT and not seen.gradient
                ]
                outputs = [module for module, _ in shown]
                largest.append([value for _, value in shown])
        growth = self._growth and self._growth.largest()
        first_by_rank, outputs_by_rank, growth_by_rank = zip(
            *gathered(self._group, (first, (outputs, largest), growth)), strict=True
        )
        bad = [one for one in first_by_rank if one is not None]
        if bad:
            finding = _not_finite(step, bad)
        elif not self._was_finite:
            finding = Finding(step, CLEAN, "all values are finite in a second run: the fault did not repeat.")
        else:
            finding = _largest(step, outputs_by_rank)
        causes = [(one.step, -one.factor, rank, one) for rank, one in enumerate(growth_by_rank) if one is not None]
        if causes:
            *_, rank, cause = min(causes, key=lambda growth: growth[:3])
            finding = replace(finding, text=f"{cause.text(rank)}; {finding.text}")
        self._found_bad_weights = bool(causes) or finding.kind == NOT_FINITE and finding.micro_batch == _BEFORE
        return finding

    def keep_evidence(
        self,
        verdict: Verdict,
        finding: Finding | None,
        documents: Sequence[Mapping[str, Any]],
        batches: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write what is known of a refused step to `evidence/step-N`; every rank calls it. A full disk is warned of, no more.

        documents: pieces of the step's documents, a JSON object each. batches: this rank's micro-batches, whose tokens are kept.
        """
        evidence.keep(
            evidence.Evidence(verdict, finding, documents, batches, self._weights),
            self.folder / "evidence",
            self._rank,
            self.settings.evidence,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: last values, steps in a row that were not finite, and steps for which it has gone back."""
        return {
            **{name: curve.values() for name, curve in self._curves.items()},
            "in_a_row": self._in_a_row,
            "rolled_back": sorted(self._rolled_back),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Steps for which this process has gone back since the state was taken are not forgotten."""
        for name, curve in self._curves.items():
            curve.load(state[name])
        self._in_a_row = max(int(state["in_a_row"]), self._in_a_row)
        # other weights
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
        looked = zip(observations.places, observations.seen, looks, strict=True)
        place, seen, bad = next(
            ((place, seen, int(look[0])) for place, seen, look in looked if look[0]), ((_AFTER, 0, 0), None, 0)
        )
        of_loss = (self._stage.turn_of_loss, 0, 0)
        if self._stage.is_last and place > of_loss and isinstance(loss, Tensor) and not bool(loss.isfinite().all()):
            return _Bad((index, *of_loss), "loss", "", self._rank, 1, 1)
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
    """The first bad tensor of a rank. order: micro-batch and place in it, the same on all ranks."""

    order: tuple[int, int, int, int]
    tensor: str
    computed_in: str
    rank: int
    bad: int
    elements: int


def _counted(tensor: Tensor) -> Tensor:
    """How many numbers are not finite, and the largest absolute value of the others; float64 (2,)."""
    finite = tensor.isfinite()
    largest = torch.where(finite, tensor, 0).abs().amax()
    return torch.stack([(~finite).sum().double(), largest.double()])


def _not_finite(step: int, found: Sequence[_Bad]) -> Finding:
    """The earliest of the ranks' first bad tensors."""
    earliest = min(one.order for one in found)
    first = [one for one in found if one.order == earliest]
    ranks = tuple(sorted(one.rank for one in first))
    example = min(first, key=lambda one: one.rank)
    micro_batch = "" if earliest[0] == _BEFORE else f", micro-batch {earliest[0]}"
    # an output has its module's name already
    around = f", computed in {example.computed_in}" if example.computed_in not in ("", *example.tensor.split()) else ""
    values = "value" if example.elements == 1 else "values"
    count = f"{example.bad:,} of {example.elements:,} {values} {'is' if example.bad == 1 else 'are'}"
    text = f"{example.tensor}, {named_ranks(ranks)}{micro_batch}{around}: {count} not finite."
    facts = example.tensor, example.computed_in, ranks, earliest[0], example.bad, example.elements
    return Finding(step, NOT_FINITE, text, *facts)


def _largest(step: int, everyone: Sequence[tuple[Sequence[str], Sequence[Sequence[float]]]]) -> Finding:
    """Whose largest output is most above the usual one of the same module.

    everyone: by rank the names of its modules, and by micro-batch their values.
    """
    cells = [
        (value, rank, micro_batch, (at, module))
        for rank, (modules, of_rank) in enumerate(everyone)
        for micro_batch, values in enumerate(of_rank)
        # ranks may have seen one module more often than others
        for (at, module), value in zip(enumerate(modules), values, strict=False)
    ]
    if not cells:
        return Finding(step, CLEAN, "no module puts out numbers: nothing can be said of this step.")
    by_module: dict[tuple[int, str], list[float]] = {}
    for value, _, _, at in cells:
        by_module.setdefault(at, []).append(value)
    usual = {at: statistics.median(values) for at, values in by_module.items()}
    alone = len(by_module[cells[0][3]]) < 3
    value, rank, micro_batch, at = max(
        cells, key=lambda cell: (0.0 if alone else cell[0] / max(usual[cell[3]], 1e-30), cell[0])
    )
    beside = "" if alone else f", {value / max(usual[at], 1e-30):.3g} times the median of all ranks and micro-batches"
    text = (
        f"all values are finite in a second run; the largest output {'' if alone else 'beside others '}is that of {at[1]}, "
        f"rank {rank}, micro-batch {micro_batch}: {value:.4g}{beside}."
    )
    facts = f"{at[1]} {OUTPUT}", at[1], (rank,), micro_batch
    return Finding(step, LARGE, text, *facts, largest=value)
