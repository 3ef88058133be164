"""The memory a rank will need: a whole step where it can be counted on meta tensors, else what the engine keeps of the model."""

from __future__ import annotations

from typing import NamedTuple

import torch

from distattn.ir.errors import DistattnError
from distattn.ir.plan import Plan
from distattn.planning.memory_of_run import memory_of_config
from distattn.training.config import Config
from distattn.training.plan_settings import PlanSettings
from distattn.training.run_data import RunData, first_packs
from distattn.training.state_bytes import state_bytes


class MemoryForecast(NamedTuple):
    """Bytes that a rank needs on its device and host. whole_step: whether activations are counted, or the model's state alone."""

    device: int
    host: int
    whole_step: bool


def forecast_memory(
    config: Config, data: RunData, device: torch.device, plan: Plan | None, rank: int
) -> MemoryForecast:
    """The forecast of one rank. plan: of the run's first step, if there is one.

    A step is counted for GPUs, as `distattn plan --memory` counts it; a processor's ranks have their state and much else in the
    host's memory, where the model's state is the least they need.
    """
    state = state_bytes(config)
    if device.type == "cpu" or config.memory.state_on_host:
        alone = MemoryForecast(0, state, False)
    else:
        alone = MemoryForecast(state, 0, False)
    if device.type == "cpu" or plan is None or not _is_planned(config, plan):
        return alone
    packs = first_packs(data.plan, config)
    try:
        (found,) = memory_of_config(config, packs, plan=plan, ranks=[rank % plan.call.ranks])
    except DistattnError:
        # what it does not count: other engines, recurrent layers, router losses
        return alone
    return MemoryForecast(found.total, found.host, True)


def _is_planned(config: Config, plan: Plan) -> bool:
    """Whether a run's first plan is of these settings: a run may be resumed on other ranks."""
    wanted, call = PlanSettings.of_config(config), plan.call
    shapes = (wanted.ranks, wanted.heads, wanted.kv_heads, wanted.head_dim, wanted.dtype)
    return (
        shapes == (call.ranks, call.heads, call.kv_heads, call.head_dim, call.dtype)
        and plan.strategy == wanted.strategy
    )
