"""Forecast the memory that a rank needs: for a whole step if meta tensors can count it, otherwise for the model's state only."""

from __future__ import annotations

from typing import NamedTuple

import torch

from distattn.ir.errors import DistattnError
from distattn.ir.plan import Plan
from distattn.training.config.plan_settings import PlanSettings
from distattn.training.config.run_file import Config
from distattn.training.run_data import RunData, first_packs
from distattn.training.run_memory import memory_of_config
from distattn.training.state_bytes import state_bytes


class MemoryForecast(NamedTuple):
    """The bytes that a rank needs on its device and host. whole_step: True if activations are counted, not only the state."""

    device: int
    host: int
    whole_step: bool


def forecast_memory(
    config: Config, data: RunData, device: torch.device, plan: Plan | None, rank: int
) -> MemoryForecast:
    """Return the forecast for one rank. plan: the attention plan of the run's first step, if there is one.

    On GPUs, an entire step is counted, as by `distattn plan --memory`. On CPUs everything is in the host's memory, and only the
    model's state is counted, which is a lower bound.
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
        (memory,) = memory_of_config(config, packs, plan=plan, ranks=[rank % plan.call.ranks])
    except DistattnError:
        # other engines, recurrent layers and router losses cannot be counted
        return alone
    return MemoryForecast(memory.total, memory.host, True)


def _is_planned(config: Config, plan: Plan) -> bool:
    """Return True if the run's first plan has the configured settings. They differ if, say, the run resumes on fewer ranks."""
    wanted, call = PlanSettings.of_config(config), plan.call
    shapes = (wanted.ranks, wanted.heads, wanted.kv_heads, wanted.head_dim, wanted.dtype)
    return (
        shapes == (call.ranks, call.heads, call.kv_heads, call.head_dim, call.dtype)
        and plan.strategy == wanted.config.strategy
    )
