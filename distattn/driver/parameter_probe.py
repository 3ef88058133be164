"""Checks of all parameters of a trainer: ranks must hold equal values, and reduce all gradients alike.

Weights are compared by checksums of their bits. Gradients are compared by sketches: a few sums of a gradient with random signs.
A sketch is linear, so the sketch of a sum over ranks is the sum of the ranks' sketches, and no full gradient is sent.
"""

# P parameters, R ranks of the loss group, S sketches of a gradient

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distattn.ir.errors import DistattnError
from distattn.parallel.runtime.communication.communicator import all_gather_objects, sendable_device

# error relative to the norm of the local gradients: below 0.01 from bf16 rounding, 1 / sqrt(R) if one of R ranks is left out
_TOLERANCE = 0.05
_SKETCHES = 8
# a checksum views a tensor as rows of this many 8-byte words
_COLUMNS = 4096
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# maximum number of names listed in an error
_NAMED = 3


class ProbedParameter(NamedTuple):
    """A parameter for the probe.

    held: this rank's part of the parameter. part: the index of that part; ranks with the same part hold equal values. leaf:
    returns the tensor whose autograd gradient is this rank's gradient; None before it exists, and for parameters that are frozen
    or whose local gradient is not visible. reduced: returns the full reduced gradient, or None; all ranks call it in the same
    order. group: the ranks that the gradient is summed over, by default the loss group. further: groups to sum over afterwards.
    share: an additional factor by which the trainer multiplies the gradient.
    """

    name: str
    held: Tensor
    leaf: Callable[[], Tensor | None]
    reduced: Callable[[], Tensor | None]
    part: int = 0
    group: dist.ProcessGroup | None = None
    further: tuple[dist.ProcessGroup, ...] = ()
    share: float = 1.0


def held_part(parameter: Tensor) -> tuple[Tensor, int]:
    """Return this rank's part of a parameter, sharded or not, and the index of the part, which replicas share."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    parameter = parameter.detach()
    assert isinstance(parameter, DTensor)
    mesh, number = parameter.device_mesh, 0
    for coordinate, size, placement in zip(mesh.get_coordinate() or (), mesh.shape, parameter.placements, strict=False):
        if not placement.is_replicate():
            number = number * size + coordinate
    return parameter.to_local(), number


def check_same_weights(
    parameters: Sequence[ProbedParameter], group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Raise DistattnError, naming parameters and ranks, if ranks hold different values of the same part. A collective call."""
    if group is None:
        return
    names = [parameter.name for parameter in parameters]
    names_by_rank = all_gather_objects(group, names)
    for rank, rank_names in enumerate(names_by_rank):
        if rank_names != names_by_rank[0]:
            unshared = next(iter(set(rank_names) ^ set(names_by_rank[0])), None)
            difference = f"only one of them has {unshared}" if unshared else "their order differs"
            raise DistattnError(
                f"rank {rank} of the loss group has other parameters than rank 0 ({difference}): "
                "make the same model on all ranks."
            )
    if not parameters:
        return
    local_checksums = torch.stack([_checksum(parameter.held, parameter.part).to(device) for parameter in parameters])
    checksums = _gathered(local_checksums, group).tolist()
    wrong: dict[int, list[str]] = {}
    first = 0
    for index, name in enumerate(names):
        by_part: dict[int, tuple[int, list[int]]] = {}
        for rank, rank_checksums in enumerate(checksums):
            part, *sums = rank_checksums[index]
            first_rank, wanted = by_part.setdefault(part, (rank, sums))
            if sums != wanted:
                first = first_rank if not wrong else first
                wrong.setdefault(rank, []).append(name)
    if wrong:
        different = list(dict.fromkeys(name for names in wrong.values() for name in names))
        raise DistattnError(
            f"{_ranks(wrong)} of the loss group {'begin' if len(wrong) > 1 else 'begins'} with other weights than rank {first}: "
            f"seed before the model is made, or broadcast its weights from one rank. Different: {_few(different)}."
        )


class GradientSketches:
    """Sketches of the gradients of one backward pass, before and after the reduction."""

    def __init__(
        self, parameters: Sequence[ProbedParameter], group: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        self._parameters, self._group, self._device = parameters, group, device
        self._own = torch.zeros(len(parameters), _SKETCHES, dtype=torch.float64, device=device)
        self._reduced = torch.zeros_like(self._own)
        self._is_read, self._is_missing = (torch.zeros(len(parameters), dtype=torch.bool) for _ in range(2))
        self._hooks: dict[int, Any] = {}
        self._signs: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def watch(self) -> None:
        """Watch the gradients of all parameters whose leaves exist. Call this before and after the forward pass."""
        for index, parameter in enumerate(self._parameters):
            leaf = None if index in self._hooks else parameter.leaf()
            if leaf is not None and leaf.requires_grad:
                self._hooks[index] = leaf.register_hook(partial(self._add, index))

    def unwatch(self) -> None:
        """Stop watching gradients."""
        for hook in self._hooks.values():
            hook.remove()

    def read_reduced(self) -> None:
        """Read the reduced gradients of all parameters that have a gradient on any rank. A collective call."""
        reached = self._summed((self._own != 0).any(1).double()[:, None])[:, 0]
        for index, parameter in enumerate(self._parameters):
            if not reached[index] > 0:
                continue
            gradient = parameter.reduced()
            self._is_read[index], self._is_missing[index] = True, gradient is None
            self._reduced[index] = 0.0 if gradient is None else self._sketch(gradient).to(self._device)

    def check(self, factor: float | None) -> None:
        """Raise DistattnError, naming parameters and ranks, for gradients that are not reduced like the measured layer's.

        factor: the weight of each rank's gradient in the measured layer's sum; None if that layer is on another pipeline stage.
        In that case the median of all parameters' factors is used.
        """
        share_P1 = self._own.new_tensor([parameter.share for parameter in self._parameters])[:, None]
        weighted = self._own * share_P1
        wanted, size = self._summed(weighted), self._summed(weighted.square().sum(1, keepdim=True)).sqrt()[:, 0]
        if factor is None:
            read = self._is_read.to(self._device)
            factor = float(_fitted(self._reduced, wanted)[read].nanmedian()) if bool(read.any()) else 1.0
        wanted, size = wanted * factor, size * abs(factor)
        # for each gradient: error, fitted factor, error with that factor, distance to the local gradient, missing or not
        factors, own_factors = _fitted(self._reduced, wanted), _fitted(self._reduced, self._own)
        facts = [
            (self._reduced - wanted).norm(dim=1) / size,
            factors,
            (self._reduced - factors[:, None] * wanted).norm(dim=1) / size,
            (self._reduced - own_factors[:, None] * self._own).norm(dim=1) / self._reduced.norm(dim=1),
            self._is_missing.to(self._device, torch.float64),
        ]
        facts_P5 = torch.stack(facts, 1)
        facts_RP5 = _gathered(facts_P5, self._group) if self._group is not None else facts_P5[None]
        wrong: dict[str, tuple[list[str], list[int]]] = {}
        for index, parameter in enumerate(self._parameters):
            if not self._is_read[index]:
                continue
            rank_facts = facts_RP5[:, index].tolist()
            ranks = [rank for rank, (error, *_) in enumerate(rank_facts) if not error <= _TOLERANCE]
            if ranks:
                names, wrong_ranks = wrong.setdefault(_describe(rank_facts[ranks[0]]), ([], []))
                names.append(parameter.name)
                wrong_ranks += [rank for rank in ranks if rank not in wrong_ranks]
        if wrong:
            differences = "; ".join(
                f"on {_ranks(ranks)} of the loss group the gradient of {_few(names)} {difference}"
                for difference, (names, ranks) in wrong.items()
            )
            raise DistattnError(
                f"the trainer does not reduce all parameters alike: {differences}. "
                "Reduce the gradients of all trained parameters over the same ranks, and by the same factor."
            )

    def _add(self, index: int, gradient: Tensor) -> None:
        self._own[index] += self._sketch(gradient).to(self._device)

    def _sketch(self, gradient: Tensor) -> Tensor:
        """Return a gradient's sketch (S,) in fp64: sums of its elements with random signs.

        Each sign is the product of a random row sign and a random column sign.
        """
        full = gradient.detach()
        full = full.full_tensor() if isinstance(full, DTensor) else full
        full = full.to_dense() if full.is_sparse else full
        matrix = full.reshape(len(full), -1) if full.dim() > 1 else full.reshape(1, -1)
        matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
        with torch.autocast(matrix.device.type, enabled=False):
            rows, columns = (self._signs_of(size, axis, matrix) for axis, size in enumerate(matrix.shape))
            return ((matrix @ columns) * rows).sum(0).double()

    def _signs_of(self, size: int, axis: int, like: Tensor) -> Tensor:
        """Return random signs (size, S) for the rows (axis 0) or columns (axis 1) of a matrix, the same on all ranks."""
        key = size, axis, like.device, like.dtype
        if key not in self._signs:
            # with equal signs for rows and columns, the sketch of an antisymmetric matrix would be 0
            generator = torch.Generator().manual_seed(2 * size + axis)
            signs = 2.0 * torch.randint(0, 2, (size, _SKETCHES), generator=generator) - 1.0
            self._signs[key] = signs.to(like.device, like.dtype)
        return self._signs[key]

    def _summed(self, local: Tensor) -> Tensor:
        """Sum each parameter's row of `local` (P, ...) over the ranks that its gradient is summed over."""
        total = local.clone()
        by_groups: dict[tuple[Any, ...], list[int]] = {}
        for index, parameter in enumerate(self._parameters):
            by_groups.setdefault((parameter.group or self._group, *parameter.further), []).append(index)
        for groups, indices in by_groups.items():
            part = total[indices]
            for group in groups:
                if group is not None:
                    sent = part.to(sendable_device(group))
                    dist.all_reduce(sent, group=group)
                    part = sent.to(self._device)
            total[indices] = part
        return total


def _checksum(held: Tensor, part: int) -> Tensor:
    """Return (3,) int64: the part, and two position-weighted sums of a tensor's bits, exact on all devices."""
    flat = held.detach().contiguous().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    # a copy is aligned, so that it can be viewed as 8-byte words
    flat = flat.clone() if flat.storage_offset() * flat.element_size() % 8 else flat
    row_elements = flat.numel() * flat.element_size() // (8 * _COLUMNS) * (8 * _COLUMNS) // flat.element_size()
    rows = flat[:row_elements].view(torch.int64).view(-1, _COLUMNS)
    rest = flat[row_elements:].view(_BITS[flat.element_size()]).to(torch.int64)
    sums = [rows.sum(1, dtype=torch.int64), rows.sum(0, dtype=torch.int64), rest]
    by_row, by_column, last = (((2 * torch.arange(len(x), device=x.device) + 1) * x).sum() for x in sums)
    return torch.stack([by_row.new_tensor(part), by_row + 3 * last, by_column + 5 * last])


def _fitted(reduced: Tensor, wanted: Tensor) -> Tensor:
    """Return the factors (P,) of the least-squares fit of `wanted` to `reduced`, both (P, S); NaN where `wanted` is 0."""
    return (reduced * wanted).sum(1) / wanted.square().sum(1)


def _describe(facts: Sequence[float]) -> str:
    """Describe a wrong gradient, as the end of a sentence. facts: see `GradientSketches.check`."""
    _, factor, off_with_factor, off_own, is_missing = facts
    if is_missing:
        return "is not there after the reduction"
    if off_with_factor <= _TOLERANCE:
        return f"is {factor:.4g} times what the other gradients' reduction would make of it"
    if off_own <= _TOLERANCE:
        return "is the rank's own (it is left out of the reduction)"
    return "is not the sum over all ranks that other gradients are"


def _gathered(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    sent = local.to(sendable_device(group)).contiguous()
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, sent, group=group)
    return torch.stack(received)


def _ranks(ranks: Any) -> str:
    numbers = sorted(ranks)
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _few(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
