"""Losses of held-out documents during a run, by position and corpus; training goes on as if nothing had happened."""

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
from distattn.training.loss_by_position import LossByPosition, LossTable, token_losses


class Evaluator:
    """Evaluates a model on the same batches every time. All ranks of the driver's loss group have one, and call alike.

    make_loader: a new loader at its first step for each evaluation, such as a `PackLoader` of another plan, or of the last steps
    of the run's, with corpus_ids=True for losses by corpus. corpora: their names, in the plan's order. context: tokens of the
    longest pack. losses: model and local batch to each token's loss (T,), 0 or anything where it has no label.
    """

    def __init__(
        self,
        cp: ContextParallel,
        make_loader: Callable[[], Iterable[Any]],
        *,
        context: int,
        corpora: Sequence[str] = (),
        device: torch.device | str = "cpu",
        losses: Callable[[torch.nn.Module, Mapping[str, Any]], Tensor] = token_losses,
    ):
        self._cp, self._make_loader, self._losses = cp, make_loader, losses
        self._sums = LossByPosition(context, corpora, device)

    def evaluate(self, model: torch.nn.Module) -> LossTable:
        """The mean losses of all batches of a new loader, over all ranks; a collective call.

        Called between two steps of training: inside a loop over `cp.steps`, after the optimizer's step or before backward. Raises
        DistattnError where the loader has no token with a label.
        """
        self._sums.reset()
        with evaluation_mode(model):
            for micro_batches in self._cp.steps(self._make_loader()):
                for local in micro_batches:
                    self._sums.add_batch(self._losses(model, local), local)
        table = self._sums.reduce(self._cp.loss_group)
        if not table.tokens and not table.not_finite:
            raise DistattnError(
                "the evaluation's loader has no token with a label; give it documents of at least two tokens."
            )
        return table


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Meanwhile no module is in training mode and nothing is differentiated; random numbers go on afterwards as before.

    Each module's own mode comes back. Parameters that FSDP2 gathered for a forward pass without a backward are let go: a
    checkpoint that is loaded next must not leave them behind.
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
