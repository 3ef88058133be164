"""Learning-rate schedules, as a pure function of the step, and the parameter groups with and without weight decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from distattn.ir.errors import DistattnError, SettingError
from distattn.ir.limits import Number, OneOf, check_limits
from distattn.training.config.sections import SCHEDULES

# suffix of bias names; the number of dims does not identify biases, since those of stacked experts have several
_BIAS = "bias"


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning-rate schedule of a run. Raises DistattnError naming a setting that is out of range.

    name: constant, cosine, linear, or wsd (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395), which decays
    linearly in the last `decay_share` of all steps. learning_rate: the peak, reached linearly in `warmup_steps` steps.
    min_learning_rate: the rate of the last step, unused by constant. steps: number of steps in the run; later steps keep
    the last rate.
    """

    learning_rate: Annotated[float, Number(ge=0)]
    steps: Annotated[int, Number(ge=1)]
    name: Annotated[str, OneOf(SCHEDULES)] = "constant"
    warmup_steps: Annotated[int, Number(ge=0)] = 0
    min_learning_rate: Annotated[float, Number(ge=0)] = 0.0
    decay_share: Annotated[float, Number(gt=0, le=1)] = 0.1

    def __post_init__(self) -> None:
        check_limits(self)
        if self.warmup_steps > self.steps:
            raise SettingError("warmup_steps", f"must be at most steps = {self.steps:,}, not {self.warmup_steps:,}.")
        if self.min_learning_rate > self.learning_rate:
            at_most = f"must be at most learning_rate = {self.learning_rate}"
            raise SettingError("min_learning_rate", f"{at_most}, not {self.min_learning_rate}.")
        if self.name == "wsd" and self.warmup_steps > self.decay_begins:
            raise DistattnError(
                f"warmup_steps = {self.warmup_steps:,} reach into the decay of wsd, which begins at step {self.decay_begins:,}; "
                "use fewer, or a smaller decay_share."
            )

    @property
    def decay_begins(self) -> int:
        """The step, counted from 0, at which the decay begins; for the constant schedule, the number of steps."""
        if self.name == "wsd":
            return self.steps - max(round(self.decay_share * self.steps), 1)
        return self.steps if self.name == "constant" else self.warmup_steps


def learning_rate(settings: ScheduleSettings, step: int) -> float:
    """Return the learning rate of a step, counted from 0. It depends only on the step, so a resumed run needs no state."""
    peak, lowest = settings.learning_rate, settings.min_learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    begin, last = settings.decay_begins, settings.steps - 1
    if step < begin or settings.name == "constant":
        return peak
    # the first decay step of cosine and linear is still at the peak; that of wsd is already below it, so that even a decay of one
    # step reaches the lowest rate
    before = begin - 1 if settings.name == "wsd" else begin
    progress = min((step - before) / max(last - before, 1), 1.0)
    share = (1 + math.cos(math.pi * progress)) / 2 if settings.name == "cosine" else 1 - progress
    return lowest + (peak - lowest) * share


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups. A rate held in a tensor (for CUDA graphs) is updated in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trained parameters in two optimizer groups: matrices and embeddings with weight decay, others without.

    Vectors, such as norm scales, and parameters named bias do not decay. For sharded parameters (FSDP2's DTensors,
    DeepSpeed's ZeRO 3 partitions) the global shape decides. The model's order is kept, a shared parameter occurs once,
    and an empty group is left out. Raises DistattnError if the model has no trained parameter.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise DistattnError(f"{type(model).__name__} has no parameter that is trained.")
    # a parameter partitioned by ZeRO 3 has an empty shape
    dims = [len(getattr(parameter, "ds_shape", parameter.shape)) for _, parameter in trained]
    decays = [
        count > 1 and not name.rpartition(".")[2].endswith(_BIAS)
        for count, (name, _) in zip(dims, trained, strict=True)
    ]
    groups = [
        {
            "params": [parameter for (_, parameter), decayed in zip(trained, decays, strict=True) if decayed == decay],
            "weight_decay": weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    return [group for group in groups if group["params"]]
