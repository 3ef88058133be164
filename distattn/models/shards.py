"""Which part of a whole tensor this rank holds, of plain tensors and of DTensors; and models that are made whole by parts.

An engine that lays parameters out in its own way is given them one module at a time:

    shard_rows(model, mesh)             # of the meta device
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


def shard_rows(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Replace each parameter by a DTensor whose rows are divided over a mesh; nothing wraps the modules.

    model: of the meta device. Tied parameters stay tied, and scalars are replicated.
    """
    for parameter, places in _places(model).items():
        placement = Shard(0) if parameter.dim() else Replicate()
        sharded = distribute_tensor(parameter.detach(), mesh, [placement])
        for module, name in places:
            setattr(module, name, torch.nn.Parameter(sharded, parameter.requires_grad))


def whole_modules(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[torch.nn.Module]:
    """Gather the parameters of a model that `shard_rows` has sharded, one module at a time, and yield each such module.

    dtype: what parameters are converted to. A rank's rows are freed as they are gathered, so that beside its share, and what the
    caller makes of the modules, a rank holds one parameter whole. A tied parameter is gathered with the first module that has
    it. A collective call of all ranks of the mesh.
    """
    places = {id(parameter): found for parameter, found in _places(model).items()}
    # children before what has them: whoever takes a module may take its children's parameters with it
    for module in reversed(list(model.modules())):
        sharded = [name for name, one in module.named_parameters(recurse=False) if isinstance(one, DTensor)]
        for name in sharded:
            parameter = getattr(module, name)
            whole = torch.nn.Parameter(parameter.detach().full_tensor().to(dtype), parameter.requires_grad)
            for owner, leaf in places[id(parameter)]:
                setattr(owner, leaf, whole)
            del parameter, whole
        if sharded:
            yield module


def _places(model: torch.nn.Module) -> dict[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]]:
    """Of each parameter the modules that have it, and what they call it; several where it is tied."""
    found: dict[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            found[parameter].append((module, name))
    return found


def _chunk(begin: int, end: int, index: int, count: int) -> tuple[int, int]:
    """The bounds of one of `torch.chunk`'s parts of a range; the last ones may be short or empty."""
    size = -(-(end - begin) // count)
    return min(begin + index * size, end), min(begin + (index + 1) * size, end)
