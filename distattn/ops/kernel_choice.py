"""`kernel="auto"`: the choice of a plan's kernel by trial (see `kernels.trials`), the same on all ranks.

Kernels of recurrences and convolutions are tried on tokens of the call's shape (see `kernels.recurrence.trial` and
`kernels.convolution.trial`).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist

from distattn.ir.errors import DistattnError
from distattn.ir.op import ATTENTION, Op
from distattn.ir.plan import Plan
from distattn.kernels.convolution.trial import try_convolution
from distattn.kernels.flash.attention import implementation
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.recurrence.trial import try_recurrence
from distattn.kernels.registry import candidate_kernels, load_kernel
from distattn.kernels.spec import KernelRequirements
from distattn.kernels.trial_cache import read_trials, trial_key, trial_key_of_op, write_trials
from distattn.kernels.trials import Trial, rank_kernels, try_kernels
from distattn.parallel.runtime.lowering.lower import lower

# trials of attention kernels, keyed by plan, for plans that are prepared repeatedly
_TRIALS: weakref.WeakKeyDictionary[Plan, dict[Any, dict[str, Trial]]] = weakref.WeakKeyDictionary()
# trials of recurrences and convolutions, keyed by kernels, requirements and head counts, because they do not depend on the plan
_TRIALS_OF_SHAPE: dict[Any, dict[str, Trial]] = {}
# trials that ran out of memory, keyed by trial key and kernel; these are repeated when more memory is free
_OUT_OF_MEMORY: dict[tuple[str, str], Trial] = {}
# functions that try kernels on calls of a plan's shape, keyed by the op's kind; attention is not among them
_TRIALS_OF_KIND = {"recurrence": try_recurrence, "convolution": try_convolution}
_LOG = logging.getLogger("distattn")


def may_choose_kernel(op: Op) -> bool:
    """Return whether "auto" can choose among several kernels of an op by trial."""
    return op == ATTENTION or op.kind in _TRIALS_OF_KIND


def in_larger_job() -> bool:
    """Return whether this process is one of several ranks of a job, even if its plan is for a single rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def common_kernel_ranking(
    trials: dict[str, Trial], device: torch.device, gather: Callable[[Any], list[Any]], op: Op = ATTENTION
) -> list[str]:
    """Return the kernels that all ranks' trials found correct, fastest first. A collective call, even for ranks without trials.

    trials: this rank's trials. gather: gathers a value from every rank, and returns the values in rank order. Return [] if no
    rank has tried a kernel. Raise DistattnError on all ranks if no kernel is correct, or if the ranks' devices are of different
    types.
    """
    trials_by_rank = gather((device.type, trials))
    odd = next((rank for rank, (kind, _) in enumerate(trials_by_rank) if kind != trials_by_rank[0][0]), None)
    if odd is not None:
        raise DistattnError(
            f"rank {odd} of the group has its tensors on {trials_by_rank[odd][0]}, rank 0 on {trials_by_rank[0][0]}: all "
            "ranks that share attention compute on one kind of device (serve(device=...) sets that of a server)."
        )
    return rank_kernels([trials for _, trials in trials_by_rank], candidate_kernels(device, op))


def local_kernel_trials(plan: Plan, rank: int, requirements: KernelRequirements) -> dict[str, Trial]:
    """Return a rank's trials of kernels on its launches of a plan, from the cache if possible; {} if only one kernel is possible.

    A trial that ran out of memory is repeated when more memory is free, a few times per process.
    """
    names = candidate_kernels(requirements.device, requirements.op)
    if len(names) < 2:
        return {}
    trials: dict[Any, dict[str, Trial]]
    call: Any
    if requirements.op.kind in _TRIALS_OF_KIND:
        heads = plan.call.heads, plan.call.kv_heads
        trials, call = _TRIALS_OF_SHAPE, (names, requirements, heads)
        attempt = partial(_trials_of_shape, names, requirements, *heads)
    else:
        # include the implementation behind "flash" in the key, because it may change later
        trials, call = _TRIALS.setdefault(plan, {}), (rank, requirements, names, implementation())
        attempt = partial(_trials_of_launches, plan, rank, requirements, names)
    if call not in trials or any(old.may_succeed_now(requirements.device) for old in trials[call].values()):
        trials[call] = attempt()
    return trials[call]


def _trials_of_launches(
    plan: Plan, rank: int, requirements: KernelRequirements, names: tuple[str, ...]
) -> dict[str, Trial]:
    """Return the trials of kernels on a rank's launches of an attention plan."""
    masks: list[LaunchMask] = []
    # ignore a refused plan here: the comparison of plans reports the reason
    with suppress(DistattnError):
        program = lower(plan, rank, lambda mask: mask, in_larger_job=in_larger_job())
        # count a launch as often as it occurs
        masks = [launch.schedule for step in (*program.forward, *program.backward) for launch in step.launches]
    key = trial_key(masks, requirements)
    trials = _with_retries(key, names, requirements, lambda rest: try_kernels(rest, masks, requirements, _LOG.info))
    for name, trial in trials.items():
        if trial.passing or trial.is_wrong:
            _warn(name, key, trial.fault)
    return trials


def _trials_of_shape(
    names: tuple[str, ...], requirements: KernelRequirements, heads: int, key_heads: int
) -> dict[str, Trial]:
    """Return the trials of kernels on calls of a shape, whatever the documents are."""
    key, try_op = trial_key_of_op(requirements, heads, key_heads), _TRIALS_OF_KIND[requirements.op.kind]
    trials = _with_retries(
        key, names, requirements, lambda rest: try_op(rest, requirements, heads, key_heads, _LOG.info)
    )
    for name, trial in trials.items():
        if trial.fault:
            _warn(name, f"{requirements.op.name} on {requirements.device}", trial.fault)
    return trials


def _with_retries(
    key: str,
    names: tuple[str, ...],
    requirements: KernelRequirements,
    attempt: Callable[[tuple[str, ...]], dict[str, Trial]],
) -> dict[str, Trial]:
    """Return the trials of a key, repeating those that ran out of memory only if more memory is free now."""
    out_of_memory = {name: _OUT_OF_MEMORY[key, name] for name in names if (key, name) in _OUT_OF_MEMORY}
    too_large = {name: old for name, old in out_of_memory.items() if not old.may_succeed_now(requirements.device)}
    rest = tuple(name for name in names if name not in too_large)
    trials = _kept_or_tried(key, rest, lambda: attempt(rest)) if rest else {}
    for name, trial in trials.items():
        if trial.attempts:
            attempts = 1 + (out_of_memory[name].attempts if name in out_of_memory else 0)
            trials[name] = _OUT_OF_MEMORY[key, name] = trial._replace(attempts=attempts)
        else:
            _OUT_OF_MEMORY.pop((key, name), None)
    return trials | too_large


def _kept_or_tried(key: str, names: tuple[str, ...], attempt: Callable[[], dict[str, Trial]]) -> dict[str, Trial]:
    """Return the cached trials of a key; if a kernel has no cached trial, try the kernels and cache their trials."""
    trials = read_trials(key, names)
    if trials is None:
        trials = attempt()
        write_trials(key, {name: trial for name, trial in trials.items() if not trial.passing})
    return trials


@cache
def _warn(name: str, key: str, fault: str) -> None:
    """Warn once that a kernel is not used."""
    _LOG.warning("kernel %s is not used on %s: %s", name, key, fault)


def first_supported(ranked: list[str], requirements: KernelRequirements) -> str:
    """Return the first kernel in a ranking that supports a call. If no kernel does, return the first, whose error says why."""
    return next((name for name in ranked if not load_kernel(name).unsupported_reason(requirements)), ranked[0])
