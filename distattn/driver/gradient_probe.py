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
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distattn.ir.errors import DistattnError

# of a rank's weight: bf16 gradients are sums of a few terms
_TOLERANCE = 0.02
# of a weight's norm: sums of the same numbers on unlike devices
_SAME = 1e-6
# of a gradient so many rows are read, at least
_ROWS = 16


@runtime_checkable
class GradientProbeTarget(Protocol):
    """What the probe asks of a trainer; `distattn.adapters` has one target for each.

    It may also have a number micro_batches_per_step: the trainer divides by it, and steps of others are refused.
    """

    def layer(self) -> torch.nn.Module | None:
        """The linear layer that makes logits, or another one that is trained. None on ranks without, which take part."""

    def vocab_rows(self) -> int:
        """V, of the output layer's weight on its ranks."""

    def backward(self, batch: Mapping[str, Any], loss_of: Callable[[Tensor], Tensor]) -> None:
        """Forward and backward of a sharded batch as in a step of one micro-batch, gradients reduced; no step is taken.

        loss_of: logits (..., V) to the loss that the user would give.
        """

    def inputs(self, x: Tensor) -> Tensor:
        """What the layer multiplies (..., E), if it is not just what it is given (x)."""

    def gradient(self) -> Tensor:
        """The whole reduced gradient (rows, E) of the layer's weight; all ranks that have one call it."""

    def preserve_state(self) -> AbstractContextManager[None]:
        """When it is left, parameters, gradients and optimizer are as before."""


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
                f"the trainer's gradients leave out ranks {who} of the loss group (weights {_listed(self.weights)}): it has to "
                "reduce over all data- and context-parallel ranks; give it a group or mesh of both."
            )
        if max(abs(weight - mean) for weight in self.weights) > _TOLERANCE * mean:
            raise DistattnError(
                f"the trainer weighs ranks unequally, {_listed(self.weights)}; no loss scale makes that right."
            )
        # what trainers divide and multiply by are whole numbers; measuring has rounding errors
        for exact in (round(1 / mean), 1 / max(round(mean), 1)):
            if abs(exact * mean - 1) < _TOLERANCE:
                return float(exact)
        return 1 / mean


def probe(target: GradientProbeTarget, make_batch: MakeBatch, group: dist.ProcessGroup | None) -> Reduction | None:
    """One synthetic backward pass; all ranks of the loss group call it. None where the trainer has no output layer.

    make_batch: see `MakeBatch`. See the top of the file for how weights are read off the gradient.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    layer, rows = target.layer(), target.vocab_rows()
    if rows <= ranks:
        raise DistattnError(f"the output layer has {rows} rows; to tell {ranks} ranks apart more are needed.")
    weight = getattr(layer, "weight", None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if weight is None else weight.device
    batch = make_batch(ranks, rows, device)
    observed = _observe_backward(target, layer, batch, ranks, 0 if group is None else dist.get_rank(group))
    if observed is None:
        return None
    _check_same_start(weight, group, ranks)
    weights = _solve_weights(*observed, group, ranks)
    return Reduction(_agreed_weights(weights, group, ranks))


class MakeBatch(Protocol):
    """(ranks, vocabulary rows, device) to a local batch whose token ids are none of 0 to ranks - 1.

    So where output and input share weights, the input's gradient stays off the rows that are read.
    """

    def __call__(self, ranks: int, rows: int, device: torch.device) -> Mapping[str, Any]: ...


def _observe_backward(
    target: GradientProbeTarget, layer: torch.nn.Module | None, batch: Mapping[str, Any], ranks: int, me: int
) -> tuple[Tensor, Tensor] | None:
    """Run the backward pass: this rank's own gradient of the rows that are read, and the reduced one, both (rows, E) fp64."""
    seen: dict[str, Tensor] = {}
    hook = None if layer is None else layer.register_forward_hook(lambda _, given, out: _record(seen, given, out))

    def loss_of(logits: Tensor) -> Tensor:
        loss = logits[..., me].float().sum()
        # a trainer may scale the loss before it goes backward
        loss.register_hook(lambda gradient: seen.update(scale=gradient))
        return loss

    with _same_random_numbers(), target.preserve_state():
        try:
            target.backward(batch, loss_of)
        finally:
            if hook is not None:
                hook.remove()
        if layer is None:
            return None
        if seen.keys() != {"input", "gradient", "scale"}:
            raise DistattnError(
                "no gradient reached the output layer; the trainer's loss does not come from its logits."
            )
        x_TE = target.inputs(seen["input"]).flatten(0, -2).double()
        read = max(ranks, _ROWS)
        dy_TV = seen["gradient"].flatten(0, -2)[:, :read].double()
        own = dy_TV.t() @ x_TE / seen["scale"].double()
        return own, target.gradient()[:read].double()


def _check_same_start(weight: Tensor | None, group: dist.ProcessGroup | None, ranks: int) -> None:
    """Raise DistattnError where a rank has other numbers in the layer's weight than rank 0, and so, likely, in all others."""
    if weight is None:
        return
    values = weight.detach()
    # parts of a weight differ by right: of DTensors, and of what ZeRO 3 has partitioned, whose weight is empty meanwhile
    whole = not isinstance(values, DTensor) and values.numel() > 0
    sums = [float("nan")] * 2
    if whole:
        # no copy in fp64 of what may be gigabytes
        sums = [float(values.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(values, dtype=torch.float64))]
    everyone_R2 = _gathered(torch.tensor(sums, dtype=torch.float64, device=values.device), group, ranks)
    odd = ((everyone_R2 - everyone_R2[:1]).abs() > _SAME * everyone_R2[:1, 1:]).any(1).nonzero().flatten()
    if len(odd):
        raise DistattnError(
            f"rank {int(odd[0])} of the loss group begins with other weights than rank 0: seed before the model is made, or "
            "broadcast its weights from one rank."
        )


def _solve_weights(own: Tensor, reduced: Tensor, group: dist.ProcessGroup | None, ranks: int) -> Tensor:
    """By what each rank's gradient is multiplied in this rank's reduced gradient (ranks,); NaN where it is no such sum."""
    everyone = _gathered(own, group, ranks)
    # the input may share the output layer's weight: what it adds is elsewhere
    rows_read = (everyone != 0).any(2).any(0)
    everyone, reduced = everyone[:, rows_read].flatten(1), reduced[rows_read].flatten()
    # least squares: the reduced gradient is the sum of weight x gradient
    products = (everyone @ everyone.t()).cpu()
    singular = torch.linalg.svdvals(products)
    if not singular[-1] > 1e-9 * singular[0]:
        raise DistattnError(
            "ranks' gradients of the layer that is read are too much alike; give output_layer=, unfrozen."
        )
    weights = torch.linalg.solve(products, (everyone @ reduced).cpu()).to(reduced.device)
    if not float((reduced - weights @ everyone).norm()) <= _TOLERANCE * float(reduced.norm()):
        weights[:] = torch.nan
    return weights


def _agreed_weights(weights: Tensor, group: dist.ProcessGroup | None, ranks: int) -> tuple[float, ...]:
    """The weights that all ranks have found. Raises DistattnError where a rank has none, or others."""
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
        each = "; ".join(f"rank {rank} {_listed(row)}" for rank, row in enumerate(everyone_RR.tolist()))
        raise DistattnError(
            f"ranks of the loss group end up with different gradients, of each rank's they have: {each}. The trainer has to "
            "reduce over all data- and context-parallel ranks; give it a group or mesh of both."
        )
    return tuple(everyone_RR.mean(0).tolist())


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


def _listed(weights: Any) -> str:
    return ", ".join(f"{weight:.4g}" for weight in weights)
