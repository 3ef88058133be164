"""The optimizer's arithmetic: the learning rate of a step, a pure function, and which parameters decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from distattn.ir.errors import DistattnError

SCHEDULES = ("constant", "cosine", "linear", "wsd")
# parameters of more dims that are added, not multiplied: biases of stacked experts, for one
_BIAS = "bias"


@dataclass(frozen=True)
class ScheduleSettings:
    """How the learning rate goes over the steps of a run. Raises DistattnError naming a setting that cannot be.

    name: constant, cosine, linear, or wsd (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395), whose last part, a
    straight line down, has `decay_share` of all steps. learning_rate: the highest, reached after `warmup_steps` steps in equal
    rises. min_learning_rate: that of the last step; constant has none. steps: of the whole run; later ones have its last rate.
    """

    learning_rate: float
    steps: int
    name: str = "constant"
    warmup_steps: int = 0
    min_learning_rate: float = 0.0
    decay_share: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise DistattnError(f"schedule {self.name!r} does not exist; there are {', '.join(SCHEDULES)}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise DistattnError(f"learning_rate is a number of at least 0, not {self.learning_rate}.")
        if self.steps < 1:
            raise DistattnError(f"steps is at least 1, not {self.steps}.")
        if not 0 <= self.warmup_steps <= self.steps:
            raise DistattnError(f"warmup_steps is 0 to steps = {self.steps:,}, not {self.warmup_steps:,}.")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise DistattnError(
                f"min_learning_rate is 0 to learning_rate = {self.learning_rate}, not {self.min_learning_rate}."
            )
        if not 0 < self.decay_share <= 1:
            raise DistattnError(
                f"decay_share is the share of steps in which wsd decays, above 0 to 1, not {self.decay_share}."
            )
        if self.name == "wsd" and self.warmup_steps > self.decay_begins:
            raise DistattnError(
                f"warmup_steps = {self.warmup_steps:,} reach into the decay of wsd, which begins at step {self.decay_begins:,}; "
                "take fewer, or a smaller decay_share."
            )

    @property
    def decay_begins(self) -> int:
        """The first step, counted from 0, that cosine, linear or wsd sets lower."""
        if self.name == "wsd":
            return self.steps - max(round(self.decay_share * self.steps), 1)
        return self.steps if self.name == "constant" else self.warmup_steps


def learning_rate(settings: ScheduleSettings, step: int) -> float:
    """The learning rate of a step, counted from 0. A function of nothing else, so a run that goes on needs no state of it."""
    peak, least = settings.learning_rate, settings.min_learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    begin, last = settings.decay_begins, settings.steps - 1
    if step < begin or settings.name == "constant":
        return peak
    # wsd's first step of decay is below the stable rate, so that a decay of one step has the lowest; cosine and linear begin at
    # the peak
    before = begin - 1 if settings.name == "wsd" else begin
    progress = min((step - before) / max(last - before, 1), 1.0)
    share = (1 + math.cos(math.pi * progress)) / 2 if settings.name == "cosine" else 1 - progress
    return least + (peak - least) * share


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameter groups of an optimizer this rate. A rate kept in a tensor (for CUDA graphs) is filled, not replaced."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters in two groups for an optimizer: matrices and embeddings decay, biases and vectors do not.

    Norms' scales are vectors. Whatever is called bias does not decay, of however many dims. Sharded parameters (FSDP2's
    DTensors, and the partitions of DeepSpeed's ZeRO 3) are judged by their global shapes. Order is that of the model, a shared
    parameter counts once, and an empty group is left out. Raises DistattnError for nothing trained.
    """
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    if not trained:
        raise DistattnError(f"{type(model).__name__} has no parameter that is trained.")
    # where ZeRO 3 has partitioned a parameter, it has no shape of its own
    dims = [len(getattr(one, "ds_shape", one.shape)) for _, one in trained]
    decays = [
        count > 1 and not name.rpartition(".")[2].endswith(_BIAS)
        for count, (name, _) in zip(dims, trained, strict=True)
    ]
    groups = [
        {
            "params": [one for (_, one), decayed in zip(trained, decays, strict=True) if decayed == kind],
            "weight_decay": weight_decay if kind else 0.0,
        }
        for kind in (True, False)
    ]
    return [group for group in groups if group["params"]]
