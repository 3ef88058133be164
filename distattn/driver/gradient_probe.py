"""How a trainer reduces gradients: measured by one synthetic backward pass, so that nobody has to know.

Trainers differ in it, and one trainer in its stages: some sum over ranks, some take the mean over all or only over replicas,
some divide by the number of micro-batches. What it does to each rank's gradient is read off one weight matrix, that of the
output layer: rank r's loss is column r of its logits, so row r of the gradient is rank r's alone, times what the trainer
did to it; what it was is known from the layer's input. Where that layer is frozen (LoRA) another linear layer is read, whose
gradient is a sum over ranks that is solved for the weights.
"""

# N tokens on the axis, T tokens on this rank, V rows of the output layer's weight on this rank, E its columns, R ranks

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distattn.ir.errors import DistattnError

if TYPE_CHECKING:
    from distattn.driver.context_parallel import ContextParallel

# of a rank's weight: bf16 gradients are sums of a few terms
_TOLERANCE = 0.02
# of a gradient so many rows are read, at least
_ROWS = 16


class Trainer(Protocol):
    """What the probe asks of a trainer; `distattn.adapters` has one for each."""

    def layer(self) -> torch.nn.Module | None:
        """The linear layer that makes logits, or another one that is trained. None on ranks without, which take part."""

    def rows(self) -> int:
        """V, of the output layer's weight on its ranks."""

    def backward(self, batch: Mapping[str, Any], loss_of: Callable[[Tensor], Tensor]) -> None:
        """Forward and backward of a sharded batch as in a step of one micro-batch, gradients reduced; no step is taken.

        loss_of: logits (..., V) to the loss that the user would give.
        """

    def inputs(self, x: Tensor) -> Tensor:
        """What the layer multiplies (..., E), if it is not just what it is given (x)."""

    def gradient(self) -> Tensor:
        """The whole reduced gradient (rows, E) of the layer's weight; all ranks that have one call it."""

    def untouched(self) -> AbstractContextManager[None]:
        """Afterwards parameters, gradients and optimizer are as before."""


class Reduction(NamedTuple):
    """What a trainer does to the gradient of each rank of the loss group before it is used: multiplies by this, and sums."""

    weights: tuple[float, ...]

    @property
    def factor(self) -> float:
        """By what losses are to be multiplied so that gradients are sums. Raises DistattnError where no number does."""
        mean = sum(self.weights) / len(self.weights)
        left_out = [rank for rank, weight in enumerate(self.weights) if abs(weight) < _TOLERANCE * abs(mean)]
        if left_out or mean <= 0:
            who = ", ".join(map(str, left_out)) or "all"
            raise DistattnError(
                f"the trainer's gradients leave out ranks {who} of the loss group (weights {_said(self.weights)}): it has to "
                "reduce over all data- and context-parallel ranks; give it a group or mesh of both."
            )
        if max(abs(weight - mean) for weight in self.weights) > _TOLERANCE * mean:
            raise DistattnError(
                f"the trainer weighs ranks unequally, {_said(self.weights)}; no loss scale makes that right."
            )
        # what trainers divide and multiply by are whole numbers; measuring has rounding errors
        for exact in (round(1 / mean), 1 / max(round(mean), 1)):
            if abs(exact * mean - 1) < _TOLERANCE:
                return float(exact)
        return 1 / mean


def probe(cp: ContextParallel, trainer: Trainer) -> Reduction | None:
    """One synthetic backward pass; all ranks of the loss group call it. None where the trainer has no output layer.

    See the top of the file.
    """
    group = cp.loss_group
    ranks = 1 if group is None else dist.get_world_size(group)
    me = 0 if group is None else dist.get_rank(group)
    layer, rows = trainer.layer(), trainer.rows()
    if rows <= ranks:
        raise DistattnError(f"the output layer has {rows} rows; to tell {ranks} ranks apart more are needed.")
    batch = _batch(cp, ranks, rows, layer)
    seen: dict[str, Tensor] = {}
    hook = None if layer is None else layer.register_forward_hook(lambda _, given, out: _record(seen, given, out))

    def loss_of(logits: Tensor) -> Tensor:
        loss = logits[..., me].float().sum()
        # a trainer may scale the loss before it goes backward
        loss.register_hook(lambda gradient: seen.update(scale=gradient))
        return loss

    with _same_random_numbers(), trainer.untouched():
        try:
            trainer.backward(batch, loss_of)
        finally:
            if hook is not None:
                hook.remove()
        if layer is None:
            return None
        if seen.keys() != {"input", "gradient", "scale"}:
            raise DistattnError(
                "no gradient reached the output layer; the trainer's loss does not come from its logits."
            )
        x_TE = trainer.inputs(seen["input"]).flatten(0, -2).double()
        read = max(ranks, _ROWS)
        dy_TV = seen["gradient"].flatten(0, -2)[:, :read].double()
        own = dy_TV.t() @ x_TE / seen["scale"].double()
        got = trainer.gradient()[:read].double()
    everyone = _gathered(own, group, ranks)
    # the input may share the output layer's weight: what it adds is elsewhere
    rows_read = (everyone != 0).any(2).any(0)
    everyone, got = everyone[:, rows_read].flatten(1), got[rows_read].flatten()
    # what this rank has got of every rank's gradient: got is the sum of weight x gradient
    products = (everyone @ everyone.t()).cpu()
    singular = torch.linalg.svdvals(products)
    if not singular[-1] > 1e-9 * singular[0]:
        raise DistattnError(
            "ranks' gradients of the layer that is read are too much alike; give output_layer=, unfrozen."
        )
    weights = torch.linalg.solve(products, (everyone @ got).cpu()).to(got.device)
    if not float((got - weights @ everyone).norm()) <= _TOLERANCE * float(got.norm()):
        weights[:] = torch.nan
    everyone_RR = _gathered(weights, group, ranks)
    for rank, row in enumerate(everyone_RR.tolist()):
        if any(weight != weight for weight in row):
            raise DistattnError(
                f"gradients on rank {rank} of the loss group are no weighted sum of the ranks' own: ranks outside of it add "
                "theirs (give ContextParallel loss_group= all ranks with data), or something changes them (clipping, an "
                "overflow, gradients of an earlier micro-batch)."
            )
    uneven = (everyone_RR - everyone_RR[:1]).abs().max() > _TOLERANCE * everyone_RR.abs().max()
    if uneven:
        told = "; ".join(f"rank {rank} {_said(row)}" for rank, row in enumerate(everyone_RR.tolist()))
        raise DistattnError(
            f"ranks of the loss group end up with different gradients, of each rank's they have: {told}. The trainer has to "
            "reduce over all data- and context-parallel ranks; give it a group or mesh of both."
        )
    return Reduction(tuple(everyone_RR.mean(0).tolist()))


def _batch(cp: ContextParallel, ranks: int, rows: int, layer: torch.nn.Module | None) -> dict[str, Any]:
    """Two tokens a rank. Where output and input share weights, the input's gradient stays off the rows that are read."""
    weight = getattr(layer, "weight", None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if weight is None else weight.device
    # another loss group's tokens differ: what it adds is not taken for ours
    first = 0 if cp.loss_group is None else dist.get_process_group_ranks(cp.loss_group)[0]
    ids_N = ranks + (torch.arange(2 * cp.ranks) + 3 * first) % (rows - ranks)
    batch = cp.shard({"input_ids": ids_N[None].to(device)})
    # nor does the padding token of a rank without tokens
    return {**batch, "input_ids": batch["input_ids"].clamp(min=ranks)}


def _record(seen: dict[str, Tensor], given: tuple[Any, ...], out: Any) -> None:
    y = out[0] if isinstance(out, tuple) else out
    # the first micro-batch is the one that counts
    if y.requires_grad and "input" not in seen:
        seen["input"] = given[0].detach()
        y.register_hook(lambda gradient: seen.update(gradient=gradient.detach()))


def _gathered(mine: Tensor, group: dist.ProcessGroup | None, ranks: int) -> Tensor:
    if group is None:
        return mine[None]
    everyone = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(everyone, mine.contiguous(), group=group)
    return torch.stack(everyone)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    python, host = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(host)


def _said(weights: Any) -> str:
    return ", ".join(f"{weight:.4g}" for weight in weights)
