"""Find and fill this rank's parts of tensors and DTensors, and gather a model module by module.

An engine with its own parameter layout gets the parameters one module at a time:

    shard_rows(model, mesh)             # on the meta device
    materialise(model, seed=1)          # or load_pretrained(model, folder)
    for module in whole_modules(model):
        ...                             # its parameters are whole until the engine partitions them
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from distattn.ir.errors import DistattnError


def local_slices(name: str, tensor: Tensor) -> tuple[slice, ...]:
    """Return the part of a tensor that this rank holds, as one slice per dimension. A rank holds all of a plain tensor.

    Mesh dimensions shard one after another, each like `torch.chunk`, as `fully_shard` and `distribute_tensor` place rows. Raises
    DistattnError naming the tensor for placements other than Shard and Replicate.
    """
    bounds = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for mesh_dim, placement in enumerate(tensor.placements):
            # subclasses of Shard divide in a different order
            if type(placement) is Shard:
                bounds[placement.dim] = _chunk(
                    *bounds[placement.dim], mesh.get_local_rank(mesh_dim), mesh.size(mesh_dim)
                )
            elif not isinstance(placement, Replicate):
                raise DistattnError(f"{name} is placed as {placement}; only Shard and Replicate can be filled.")
    slices = tuple(slice(begin, end) for begin, end in bounds)
    if shape_of(slices) != tuple(local_tensor(tensor).shape):
        raise DistattnError(
            f"{name} has a local shape {tuple(local_tensor(tensor).shape)}, but its placement says {shape_of(slices)}."
        )
    return slices


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor. Writing to it changes the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shape_of(slices: Sequence[slice]) -> tuple[int, ...]:
    """Return the shape of the part that `slices` select."""
    return tuple(part.stop - part.start for part in slices)


def copy_part(name: str, tensor: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of a full tensor into a tensor of the same global shape."""
    if tuple(whole.shape) != tuple(tensor.shape):
        raise DistattnError(
            f"{name} is {tuple(tensor.shape)} in the model, but the tensor to copy is {tuple(whole.shape)}."
        )
    with torch.no_grad():
        local_tensor(tensor).copy_(whole[local_slices(name, tensor)])


def shard_rows(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Replace each parameter with a DTensor whose rows are split over a mesh. The modules are not wrapped.

    model: a model on the meta device. Tied parameters stay tied, and scalars are replicated.
    """
    for parameter, places in _places(model).items():
        placement = Shard(0) if parameter.dim() else Replicate()
        sharded = distribute_tensor(parameter.detach(), mesh, [placement])
        for module, name in places:
            setattr(module, name, torch.nn.Parameter(sharded, parameter.requires_grad))


def whole_modules(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[torch.nn.Module]:
    """Gather a model sharded by `shard_rows`, one module at a time, and yield each module once its parameters are gathered.

    dtype: the dtype of the gathered parameters. A rank's rows are freed once they are gathered, so a rank holds only its share,
    the caller's copies of modules, and one full parameter. A tied parameter is gathered with the first module that has it. All
    ranks of the mesh must iterate together.
    """
    places = {id(parameter): owners for parameter, owners in _places(model).items()}
    # yield children before parents, since the caller may process a module together with its children
    for module in reversed(list(model.modules())):
        sharded = [name for name, tensor in module.named_parameters(recurse=False) if isinstance(tensor, DTensor)]
        for name in sharded:
            parameter = getattr(module, name)
            whole = torch.nn.Parameter(parameter.detach().full_tensor().to(dtype), parameter.requires_grad)
            for owner, leaf in places[id(parameter)]:
                setattr(owner, leaf, whole)
            del parameter, whole
        if sharded:
            yield module


def _places(model: torch.nn.Module) -> dict[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]]:
    """Return the modules that hold each parameter, and its name in each. A tied parameter is in several modules."""
    places: dict[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places[parameter].append((module, name))
    return places


def _chunk(begin: int, end: int, index: int, count: int) -> tuple[int, int]:
    """Return the bounds of chunk `index` of a range split like `torch.chunk`. The last chunks may be short or empty."""
    size = -(-(end - begin) // count)
    return min(begin + index * size, end), min(begin + (index + 1) * size, end)
