"""Evaluates held-out documents during a run: losses by position and by corpus. The training state does not change."""

# T tokens on this rank

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from distattn.driver.context_parallel import ContextParallel
from distattn.ir.errors import DistattnError
from distattn.training.reporting.loss_by_position import LossByPosition, LossTable, token_losses

# called with the per-token losses (T,) and the local batch that they belong to
AddLosses = Callable[[Tensor, Mapping[str, Any]], None]


def evaluate(
    cp: ContextParallel,
    model: torch.nn.Module,
    loader: Iterable[Any],
    sums: LossByPosition,
    run: Callable[[Sequence[Mapping[str, Any]], AddLosses], Any] | None = None,
) -> LossTable:
    """Return the mean losses over all batches of a loader and all ranks of the driver's loss group. A collective call.

    Call it between two training steps: inside a loop over `cp.steps`, after the optimizer step or before backward.
    loader: a loader positioned at its first step, such as a `PackLoader` of a different plan or of the last steps of the
    run's plan; losses by corpus need corpus_ids=True. sums: where losses are accumulated; it is reset first. run: called
    with a step's local batches and a function that it must call with their per-token losses; by default `token_losses`
    computes them. Raises DistattnError if no token has a label.
    """
    sums.reset()
    with evaluation_mode(model):
        for micro_batches in cp.steps(loader):
            if run is not None:
                run(micro_batches, sums.add_batch)
                continue
            for local in micro_batches:
                sums.add_batch(token_losses(model, local), local)
    table = sums.reduce(cp.loss_group)
    if not table.tokens and not table.not_finite:
        raise DistattnError(
            "the evaluation's loader has no token with a label; give it documents of at least two tokens."
        )
    return table


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode and disable gradients; afterwards restore the modes and the random state.

    Also frees parameters that FSDP2 gathered for a forward pass without backward: they would be stale after a checkpoint
    is loaded.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
            if isinstance(module, FSDPModule):
                module.reshard()
