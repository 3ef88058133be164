"""Measure how a trainer reduces gradients with two synthetic backward passes, so that users need not know.

Trainers differ, and so do the modes of a single trainer: some sum over ranks, some average over all ranks or only over replicas,
and some divide by the number of micro-batches. The probe measures the reduction on one weight matrix, the output layer's. Rank
r's loss is column r of its logits, so row r of the gradient comes from rank r alone. The layer's input gives this row before the
reduction, and the ratio of the two is rank r's weight. If that layer is frozen (LoRA), the probe measures another linear layer,
whose gradient is a weighted sum of the ranks' gradients, and solves for the weights.

The second pass has a larger or smaller loss: gradients that do not scale by the same factor were clipped. All other parameters
are compared with the measured layer (see `parameter_probe`).
"""

# N tokens on the axis, T tokens on this rank, V rows of the output layer's weight on this rank, E its columns, R ranks

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distattn.driver.parameter_probe import GradientSketches, ProbedParameter, check_same_weights
from distattn.ir.errors import DistattnError

# tolerated relative error of a rank's weight: bf16 gradients here are sums of only a few terms
_TOLERANCE = 0.02
# factors of the second pass's loss; the smaller is for fp16 and for trainers that scale losses, where a larger loss may overflow
_LARGER, _SMALLER = 64.0, 1 / 32
# read at least this many rows of a gradient
_ROWS = 16
# the warning for steps whose loss scale was not measured
NOT_PROBED = (
    "ContextParallel.loss_scale(target) was not called, so gradients are right only if they are summed over the ranks. Most "
    "trainers average them: call cp.loss_scale(...ProbeTarget(...)) once, before the first step; it also works for sums."
)
OTHER_COUNT = (
    "this step has {} micro-batches, but the trainer accumulates {}: its gradients would be off by that factor. Give shard_step "
    "as many as the trainer accumulates; shard batches for evaluation under torch.no_grad()."
)


@runtime_checkable
class GradientProbeTarget(Protocol):
    """The trainer's side of the probe; `distattn.adapters` has a target for each trainer.

    A target may also have the attribute `micro_batches_per_step`, if the trainer divides by it; every step must then have that
    many.
    """

    def layer(self) -> torch.nn.Module | None:
        """Return the linear layer that computes logits, or another trained linear layer; None if this rank has neither."""

    def vocab_rows(self) -> int:
        """Return V, the number of rows of the output layer's weight on the ranks that have it."""

    def backward(self, batch: Mapping[str, Any], loss_of: Callable[[Tensor], Tensor]) -> None:
        """Run a sharded batch forward and backward like a step of one micro-batch; reduce gradients, but do not update.

        loss_of: computes the probe's loss from logits (..., V).
        """

    def inputs(self, x: Tensor) -> Tensor:
        """Return the tensor (..., E) that the layer multiplies by its weight, given the layer's input x."""

    def gradient(self) -> Tensor:
        """Return the full reduced gradient (rows, E) of the layer's weight. All ranks with a layer call this."""

    def preserve_state(self) -> AbstractContextManager[None]:
        """Return a context manager that restores parameters, gradients and the optimizer on exit."""

    def parameters(self) -> Sequence[ProbedParameter]:
        """Return all parameters, trained or not, in the same order on all ranks."""


class Reduction(NamedTuple):
    """A trainer's reduction of gradients over the loss group: the sum of each rank's gradient times its weight."""

    weights: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean weight."""
        return sum(self.weights) / len(self.weights)

    @property
    def is_even(self) -> bool:
        """True if all ranks have the same weight."""
        return max(abs(weight - self.mean) for weight in self.weights) <= _TOLERANCE * self.mean

    @property
    def factor(self) -> float:
        """The factor by which to multiply losses so that gradients are sums over ranks. Raises DistattnError if none exists."""
        mean = self.mean
        left_out = [rank for rank, weight in enumerate(self.weights) if abs(weight) < _TOLERANCE * abs(mean)]
        if left_out or mean <= 0:
            ranks = ", ".join(map(str, left_out)) or "all"
            raise DistattnError(
                f"the trainer's gradients leave out ranks {ranks} of the loss group (weights {_listed(self.weights)}): it has to "
                "reduce over all data- and context-parallel ranks; give it a group or mesh of both."
            )
        if not self.is_even:
            raise DistattnError(
                f"the trainer weighs ranks unequally, {_listed(self.weights)}; no loss scale makes that right."
            )
        # trainers divide or multiply by integers, but the measurement has rounding errors
        for exact in (round(1 / mean), 1 / max(round(mean), 1)):
            if abs(exact * mean - 1) < _TOLERANCE:
                return float(exact)
        return 1 / mean


def probe(target: GradientProbeTarget, make_batch: MakeBatch, group: dist.ProcessGroup | None) -> Reduction | None:
    """Measure the reduction with two synthetic backward passes. A collective call of the loss group.

    make_batch: see `MakeBatch`. Return None on ranks without an output layer. The module docstring explains the measurement.
    Raise DistattnError, naming parameters and ranks, if ranks hold different weights, if gradients are not weighted sums, or if
    the weights differ between parameters.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    layer, rows = target.layer(), target.vocab_rows()
    if rows <= ranks:
        raise DistattnError(f"the output layer has {rows} rows; more are needed to tell {ranks} ranks apart.")
    weight = getattr(layer, "weight", None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if weight is None else weight.device
    parameters = list(target.parameters())
    check_same_weights(parameters, group, device)
    batch, me = make_batch(ranks, rows, device), 0 if group is None else dist.get_rank(group)
    sketches = GradientSketches(parameters, group, device)
    observed = _observe_backward(target, layer, batch, ranks, me, 1.0, sketches)
    magnitude = _SMALLER if observed is not None and observed.may_overflow else _LARGER
    second = _observe_backward(target, layer, batch, ranks, me, magnitude)
    if observed is None or second is None:
        sketches.check(None)
        return None
    weights, weights_again = (_solve_weights(each.local, each.reduced, group, ranks) for each in (observed, second))
    agreed = _agreed_weights(weights, group, ranks)
    _check_linear(agreed, weights_again, second.magnitude, group, ranks)
    reduction = Reduction(agreed)
    # check sketches only for equal weights: `factor` refuses unequal weights
    if reduction.is_even:
        sketches.check(reduction.mean / observed.scale)
    return reduction


class MakeBatch(Protocol):
    """A function that builds a local batch whose token ids are all at least `ranks`.

    rows: the number of rows of the output layer's weight. If the embedding shares that weight, these ids keep the embedding's
    gradient out of the rows that the probe reads.
    """

    def __call__(self, ranks: int, rows: int, device: torch.device) -> Mapping[str, Any]: ...


def probe_ids(block_ranks: int, first: int, ranks: int, rows: int) -> Tensor:
    """Return token ids (1, N), two for each rank of a block, all at least `ranks`. first: the block's first rank."""
    return (ranks + (torch.arange(2 * block_ranks) + 3 * first) % (rows - ranks))[None]


class _Observed(NamedTuple):
    """What a backward pass showed: this rank's gradient of the rows read, before and after the reduction, (rows, E) in fp64.

    scale: the trainer's factor for the loss. magnitude: the probe's factor for the loss. may_overflow: True if a larger loss may
    overflow, because logits are in fp16 or the trainer scales the loss.
    """

    local: Tensor
    reduced: Tensor
    scale: float
    magnitude: float
    may_overflow: bool


def _observe_backward(
    target: GradientProbeTarget,
    layer: torch.nn.Module | None,
    batch: Mapping[str, Any],
    ranks: int,
    me: int,
    magnitude: float,
    sketches: GradientSketches | None = None,
) -> _Observed | None:
    """Run a backward pass with the loss times `magnitude`. sketches: records the gradients of all parameters."""
    seen: dict[str, Tensor] = {}
    hook = None if layer is None else layer.register_forward_hook(lambda _, inputs, out: _record(seen, inputs, out))

    def loss_of(logits: Tensor) -> Tensor:
        if sketches is not None:
            # FSDP2's gathered parameters exist only after the forward pass
            sketches.watch()
        loss = magnitude * logits[..., me].float().sum()
        # a trainer may scale the loss before the backward pass
        loss.register_hook(lambda gradient: seen.update(scale=gradient))
        return loss

    with _same_random_numbers(), target.preserve_state():
        if sketches is not None:
            sketches.watch()
        try:
            target.backward(batch, loss_of)
        finally:
            if hook is not None:
                hook.remove()
            if sketches is not None:
                sketches.unwatch()
        if sketches is not None:
            sketches.read_reduced()
        if layer is None:
            return None
        if seen.keys() != {"input", "gradient", "scale"}:
            raise DistattnError(
                "no gradient reached the output layer; the trainer's loss does not come from its logits."
            )
        x_TE = target.inputs(seen["input"]).flatten(0, -2).double()
        rows = max(ranks, _ROWS)
        dy_TV = seen["gradient"].flatten(0, -2)[:, :rows].double()
        scale = float(seen["scale"])
        may_overflow = scale != 1.0 or seen["gradient"].dtype == torch.float16
        return _Observed(dy_TV.t() @ x_TE / scale, target.gradient()[:rows].double(), scale, magnitude, may_overflow)


def _check_linear(
    agreed: tuple[float, ...], second_weights: Tensor, magnitude: float, group: dist.ProcessGroup | None, ranks: int
) -> None:
    """Raise DistattnError if gradients do not scale with the loss. second_weights: this rank's weights in the second pass."""
    all_weights_RR = _gathered(second_weights, group, ranks)
    difference = float((all_weights_RR - all_weights_RR.new_tensor(agreed)).abs().max())
    largest = max(map(abs, agreed))
    if difference <= _TOLERANCE * largest:
        return
    times = float(all_weights_RR.abs().max()) / largest * magnitude
    change = f"{times:.3g} times as large" if math.isfinite(times) else "that are not a sum of the ranks' own"
    raise DistattnError(
        f"the trainer's gradients are not linear: a loss {magnitude:g} times as large makes gradients {change}. "
        "Clipping belongs after the reduction: take it out of `reduce`, and clip before the optimizer's step (with half "
        "precision it may be an overflow: lower the loss scale)."
    )


def _solve_weights(local: Tensor, reduced: Tensor, group: dist.ProcessGroup | None, ranks: int) -> Tensor:
    """Return each rank's weight in this rank's reduced gradient, (ranks,); NaN if that gradient is not a weighted sum."""
    gradients = _gathered(local, group, ranks)
    # skip rows where every rank's own gradient is zero: in `reduced`, they may hold the gradient of an embedding tied to the
    # output layer
    rows_read = (gradients != 0).any(2).any(0)
    gradients, reduced = gradients[:, rows_read].flatten(1), reduced[rows_read].flatten()
    # least squares: the reduced gradient is the sum of weight x gradient
    products = (gradients @ gradients.t()).cpu()
    singular = torch.linalg.svdvals(products)
    if not singular[-1] > 1e-9 * singular[0]:
        raise DistattnError("ranks' gradients of the measured layer are too similar; give output_layer=, unfrozen.")
    weights = torch.linalg.solve(products, (gradients @ reduced).cpu()).to(reduced.device)
    if not float((reduced - weights @ gradients).norm()) <= _TOLERANCE * float(reduced.norm()):
        weights[:] = torch.nan
    return weights


def _agreed_weights(weights: Tensor, group: dist.ProcessGroup | None, ranks: int) -> tuple[float, ...]:
    """Return the weights that all ranks have measured.

    Raise DistattnError if a rank could not measure weights, or measured different weights.
    """
    all_weights_RR = _gathered(weights, group, ranks)
    for rank, row in enumerate(all_weights_RR.tolist()):
        if any(weight != weight for weight in row):
            raise DistattnError(
                f"gradients on rank {rank} of the loss group are not a weighted sum of the ranks' own: ranks outside of it add "
                "theirs (give ContextParallel loss_group= all ranks with data), or something changes them (clipping, which "
                "belongs after the reduction, an overflow, gradients of an earlier micro-batch)."
            )
    uneven = (all_weights_RR - all_weights_RR[:1]).abs().max() > _TOLERANCE * all_weights_RR.abs().max()
    if uneven:
        rows = "; ".join(f"rank {rank} {_listed(row)}" for rank, row in enumerate(all_weights_RR.tolist()))
        raise DistattnError(
            f"ranks of the loss group end up with different gradients; the weights of all ranks in them are: {rows}. The trainer "
            "has to reduce over all data- and context-parallel ranks; give it a group or mesh of both."
        )
    return tuple(all_weights_RR.mean(0).tolist())


def _record(seen: dict[str, Tensor], inputs: tuple[Any, ...], out: Any) -> None:
    y = out[0] if isinstance(out, tuple) else out
    # record only the first micro-batch
    if y.requires_grad and "input" not in seen:
        seen["input"] = inputs[0].detach()
        y.register_hook(lambda gradient: seen.update(gradient=gradient.detach()))


def _gathered(local: Tensor, group: dist.ProcessGroup | None, ranks: int) -> Tensor:
    if group is None:
        return local[None]
    from_ranks = [torch.empty_like(local) for _ in range(ranks)]
    dist.all_gather(from_ranks, local.contiguous(), group=group)
    return torch.stack(from_ranks)


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
