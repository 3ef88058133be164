"""Which part of a whole tensor this rank holds, of plain tensors and of DTensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from distattn.ir.errors import DistattnError


def local_slices(name: str, tensor: Tensor) -> tuple[slice, ...]:
    """The part of a whole tensor that this rank holds, one slice a dim; of plain tensors all of it.

    Mesh dims shard one after the other, each as `torch.chunk` does: that is how `fully_shard` and `distribute_tensor` place
    rows. Raises DistattnError, naming the tensor, for placements other than Shard and Replicate.
    """
    bounds = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for mesh_dim, placement in enumerate(tensor.placements):
            # subclasses of Shard divide in another order
            if type(placement) is Shard:
                bounds[placement.dim] = _chunk(
                    *bounds[placement.dim], mesh.get_local_rank(mesh_dim), mesh.size(mesh_dim)
                )
            elif not isinstance(placement, Replicate):
                raise DistattnError(f"{name} is placed as {placement}; only Shard and Replicate can be filled.")
    slices = tuple(slice(begin, end) for begin, end in bounds)
    if shape_of(slices) != tuple(local_tensor(tensor).shape):
        raise DistattnError(
            f"{name} is held in a shape {tuple(local_tensor(tensor).shape)}, not {shape_of(slices)} as its placement says."
        )
    return slices


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; writing to it changes the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shape_of(slices: Sequence[slice]) -> tuple[int, ...]:
    """The shape that slices cut out."""
    return tuple(part.stop - part.start for part in slices)


def copy_part(name: str, tensor: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of a whole tensor into a tensor of the same (global) shape."""
    if tuple(whole.shape) != tuple(tensor.shape):
        raise DistattnError(f"{name} is {tuple(tensor.shape)} in the model, but {tuple(whole.shape)} was given.")
    with torch.no_grad():
        local_tensor(tensor).copy_(whole[local_slices(name, tensor)])


def _chunk(begin: int, end: int, index: int, count: int) -> tuple[int, int]:
    """The bounds of one of `torch.chunk`'s parts of a range; the last ones may be short or empty."""
    size = -(-(end - begin) // count)
    return min(begin + index * size, end), min(begin + (index + 1) * size, end)
