"""The replay check: a micro-batch run twice must give the same bits. If it does not, a rank computes wrongly.

Silent data corruption is rare and does not repeat on demand, so a third run could not locate it: every module's tensors
are hashed in both runs. The rank with the earliest differing tensor is at fault: attention's messages spread a wrong
number to other ranks only later.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.driver.message_monitor import MessageMonitor
from distattn.ir.errors import named_ranks
from distattn.training.engines.engine import PipelineStage
from distattn.training.watch.module_observer import Observations, gather_values, observed_modules

# integer dtype by element size. 64-bit values are summed in halves: two flipped sign bits would add up to 2^64, i.e. 0
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


@dataclass(frozen=True)
class Difference:
    """The difference between two runs of one micro-batch. text: a sentence for the user.

    tensor: the first tensor that differs. computed_in: the module that computes it. ranks: the ranks on which it differs.
    """

    step: int
    text: str
    tensor: str
    computed_in: str
    ranks: tuple[int, ...]


class ReplayCheck:
    """Runs a micro-batch twice at regular intervals. All ranks of `group` must make the same calls.

    model: the modules of this rank's pipeline stage, or all modules. interval: steps between checks; 0 for never. group: None for
    a single process. messages: the driver's monitor (`ContextParallel.messages`), needed to name the rank that computes attention
    wrongly rather than the ranks that receive the result. Kernels must be deterministic; if the runs differ on all ranks, the
    text says that they are not.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        interval: int,
        group: dist.ProcessGroup | None = None,
        messages: MessageMonitor | None = None,
        stage: PipelineStage = PipelineStage(),  # noqa: B008
    ):
        self.interval, self._messages, self._stage = interval, messages, stage
        self._model, self._group = model, group
        self._rank = 0 if group is None else dist.get_rank()

    def due(self, step: int) -> bool:
        """Return whether to check this step, counted from 0: every interval-th step except step 0."""
        return bool(self.interval) and step > 0 and step % self.interval == 0

    def check(self, step: int, run: Callable[[], Any], drop: Callable[[], Any]) -> Difference | None:
        """Run a micro-batch twice, and return the difference, or None if all bits are equal. A collective call.

        run: runs the forward and backward passes of the step's first micro-batch. drop: discards the gradients of the
        first run. The step uses the gradients of the second run, so a check costs one extra micro-batch. Both runs
        begin with the same random state. Synchronizes with the device.
        """
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices), self._observed() as first:
            run()
        drop()
        with self._observed() as second:
            run()
        differences = [
            difference
            for difference in gather_values(self._group, _first_difference(first, second, self._rank))
            if difference is not None
        ]
        if not differences:
            return None
        earliest = min(place for place, _, _, _ in differences)
        first_differences = [difference for difference in differences if difference[0] == earliest]
        ranks = tuple(sorted(rank for *_, rank in first_differences))
        _, tensor, computed_in, _ = first_differences[0]
        text = f"{named_ranks(ranks)} computed another result for the same inputs in {computed_in} ({tensor})."
        if self._group is not None and len(ranks) == dist.get_world_size(self._group) > 1:
            text = f"{text[:-1]}; all ranks do, so the program is not deterministic; no single device is at fault."
        return Difference(step, text, tensor, computed_in, ranks)

    def _observed(self) -> AbstractContextManager[Observations]:
        return observed_modules(self._model, bits_digest, self._messages, self._stage)


def bits_digest(tensor: Tensor) -> Tensor:
    """Return a digest of a tensor's bits: an int64 on its device, independent of the order of summation.

    The bits of each row (along the last dim) are added as integers, and the row sums are weighted with odd numbers,
    modulo 2^64. This detects any single changed value, and swapped rows.
    """
    sums = row_sums(tensor)
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum()


def row_sums(tensor: Tensor) -> Tensor:
    """Sum the bits of each row of a tensor (along the last dim) as integers modulo 2^64: int64 (rows,) on its device."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)
    return rows.contiguous().view(_BITS[tensor.element_size()]).sum(-1, dtype=torch.int64)


def _first_difference(
    first: Observations, second: Observations, rank: int
) -> tuple[tuple[int, int, int], str, str, int] | None:
    """Return the place, tensor, module and rank of the first tensor that differs, or None if all are equal."""
    if [str(tensor) for tensor in first.seen] != [str(tensor) for tensor in second.seen]:
        return (0, 0, 0), "another order of modules", "the model", rank
    differs = (first.read() != second.read()).nonzero()
    if not len(differs):
        return None
    at = int(differs[0])
    return first.places[at], str(first.seen[at]), first.seen[at].computed_in, rank
