"""Plain PyTorch: a training loop of your own, with `fully_shard` (FSDP2), DDP, or gradients that you sum yourself.

mesh = init_device_mesh("cuda", (replicas, degree), mesh_dim_names=("dp", "cp"))
cp = context_parallel(mesh, strategy="ring")
fully_shard(model, mesh=gradient_mesh(mesh))
cp.loss_scale(Loop(model))
batch = cp.shard(batch)
loss = token_losses(forward(model, batch), batch).sum() * batch["loss_scale"]
"""

# T tokens on this rank, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.batch.planner import ShardedBatch
from distattn.driver.context_parallel import ContextParallel
from distattn.ir.errors import DistattnError
from distattn.kernels.merge import accumulation_dtype


def context_parallel(mesh: DeviceMesh, dim: str = "cp", **settings: Any) -> ContextParallel:
    """A `ContextParallel` over one dim of a mesh of data- and context-parallel ranks; the loss is over all of the mesh."""
    names = mesh.mesh_dim_names or ()
    if dim not in names:
        raise DistattnError(f"the mesh has dims {', '.join(names) or 'without names'}, none called {dim!r}.")
    return ContextParallel(mesh[dim].get_group(), loss_group=gradient_mesh(mesh).get_group(), **settings)


def gradient_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh as one dim: where `fully_shard` is to shard parameters and reduce gradients."""
    return mesh if mesh.ndim == 1 else mesh._flatten("_".join(mesh.mesh_dim_names or ()))


def inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A transformers model's keyword arguments for a sharded batch."""
    return {name: batch[name] for name in ("input_ids", "position_ids", "context_parallel")} | {"use_cache": False}


def forward(model: torch.nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits (1, T, V) of a transformers model, or one that is called alike, for a sharded batch."""
    logits = model(**inputs(batch)).logits
    sharded = batch["context_parallel"]
    if isinstance(sharded, ShardedBatch) and (unasked := sharded.parent.ways.unasked):
        raise DistattnError(f"layers= names layer {min(unasked)}, but the model has no attention layer of that number.")
    if not getattr(sharded, "asked", True):
        raise DistattnError(
            f"{type(unwrapped(model)).__name__} did not ask for attention: each rank has read its own tokens "
            'only. Models of transformers want attn_implementation="distattn", and attention layers.'
        )
    return logits


def local_loss(model: torch.nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """This rank's share of the loss: its token losses summed, times the batch's loss scale."""
    return loss_of(forward(model, batch), batch)


def loss_of(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The same of logits (1, T, V)."""
    logits_TV = logits.flatten(0, -2)
    given = logits_TV.to(accumulation_dtype(logits_TV.dtype)), batch["labels"].flatten()
    return F.cross_entropy(*given, ignore_index=IGNORE_INDEX, reduction="sum") * batch["loss_scale"]


def shard_parameters(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    """`fully_shard` every layer of a transformers model, and what is left, over all of the mesh."""
    flat = gradient_mesh(mesh)
    for layer in model.get_decoder().layers:  # type: ignore[operator]
        fully_shard(layer, mesh=flat)
    fully_shard(model, mesh=flat)


class Loop:
    """A loop of your own, to `ContextParallel.loss_scale`.

    forward: batch to logits, by default as a transformers model is called. reduce: what you do to gradients after backward,
    nothing by default. output_layer: the linear layer that makes logits, by default what transformers names so. Between
    steps, with FSDP2's gradient synchronization on.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        forward: Callable[[Mapping[str, Any]], Tensor] | None = None,
        reduce: Callable[[], None] | None = None,
        output_layer: torch.nn.Module | None = None,
    ):
        self.model, self._reduce = model, reduce
        self._forward = forward or (lambda batch: _forward(model, batch))
        self._output_layer = output_layer

    def layer(self) -> torch.nn.Module:
        """The output layer, or another one where that is frozen."""
        return trained_layer(self.model, self._output())

    def rows(self) -> int:
        """Of the whole vocabulary: a DTensor's shape is global."""
        weight: Any = self._output().weight
        return weight.shape[0]

    def backward(self, batch: Mapping[str, Any], loss_of: Callable[[Tensor], Tensor]) -> None:
        """As a loop does."""
        loss_of(self._forward(batch)).backward()
        if self._reduce is not None:
            self._reduce()

    def inputs(self, x: Tensor) -> Tensor:
        """Just what it is given."""
        return x

    def gradient(self) -> Tensor:
        """Of the layer's weight, sharded or not."""
        weight: Any = self.layer().weight
        return whole(weight.grad)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Gradients are put aside meanwhile. Raises DistattnError where FSDP2 holds some that nobody can put aside."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                _check_synchronized(module)
        with gradients_aside(self.model):
            yield

    def _output(self) -> torch.nn.Module:
        return self._output_layer or output_layer_of(unwrapped(self.model))


_forward = forward


def unwrapped(model: Any) -> Any:
    """The module inside DDP, a DeepSpeed engine or Megatron's wrappers."""
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    return model


def output_layer_of(model: torch.nn.Module) -> torch.nn.Module:
    """The layer that makes logits, of a transformers model. Raises DistattnError where a model does not say."""
    find = getattr(model, "get_output_embeddings", None)
    layer = find() if find is not None else None
    if layer is None:
        raise DistattnError(f"{type(model).__name__} does not say which layer makes its logits; give output_layer=.")
    return layer


def trained_layer(model: torch.nn.Module, output_layer: Any) -> torch.nn.Module:
    """The output layer if it is trained, else the last linear layer that is (LoRA)."""
    trained = [
        module for module in model.modules() if isinstance(module, torch.nn.Linear) and module.weight.requires_grad
    ]
    if output_layer.weight.requires_grad:
        return output_layer
    if not trained:
        raise DistattnError(
            "the model has no linear layer that is trained: how gradients are reduced cannot be measured."
        )
    return trained[-1]


def _check_synchronized(module: Any) -> None:
    # FSDP2 tells nobody of this but itself
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in groups:
        if group is None:
            continue
        whole_ones = [getattr(one, "_unsharded_param", None) for one in group.fsdp_params]
        held = any(one.unsharded_accumulated_grad is not None for one in group.fsdp_params)
        held |= any(one is not None and one.grad is not None for one in whole_ones)
        if held or not group.reduce_grads:
            raise DistattnError(
                "gradients are being accumulated (set_requires_gradient_sync(False)); call loss_scale between steps, with "
                "synchronization on."
            )


def whole(gradient: Tensor | None) -> Tensor:
    """A gradient as a plain tensor; all ranks call it."""
    if gradient is None:
        raise DistattnError(
            "the layer that is read has no gradient after backward: leave gradients until they are reduced."
        )
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


@contextmanager
def gradients_aside(model: torch.nn.Module) -> Iterator[None]:
    """Gradients and buffers of a model are put aside, and put back."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
