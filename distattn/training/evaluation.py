"""Losses of held-out documents during a run, by position and corpus; the training state is unchanged afterwards."""

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

# called with each token's loss (T,) and the local batch of these tokens
AddLosses = Callable[[Tensor, Mapping[str, Any]], None]


def evaluate(
    cp: ContextParallel,
    model: torch.nn.Module,
    loader: Iterable[Any],
    sums: LossByPosition,
    run: Callable[[Sequence[Mapping[str, Any]], AddLosses], Any] | None = None,
) -> LossTable:
    """Return the mean losses of all batches of a loader, over all ranks of the driver's loss group. A collective call.

    Call it between two training steps: inside a loop over `cp.steps`, after the optimizer's step or before backward.
    loader: at its first step, such as a `PackLoader` of another plan, or of the last steps of the run's plan; with
    corpus_ids=True for losses by corpus. sums: reset first. run: receives a step's local batches and a function, which
    it calls with their tokens' losses; by default the model's `token_losses`. Raises DistattnError where no token of
    the loader has a label.
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
    """Put all modules into evaluation mode without gradients; restore their modes and random numbers afterwards.

    Parameters that FSDP2 gathered for a forward pass without a backward are freed: they must not stay when a checkpoint
    is loaded next.
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
