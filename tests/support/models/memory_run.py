"""Trains a small model for one step with given memory settings on gloo ranks, to compare gradients with a single
process.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import small
import torch
from processes import sum_gradients
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distattn.adapters import pytorch
from distattn.memory.activation_checkpointing import checkpoint_layers
from distattn.memory.host_offload import HostOffload
from distattn.memory.tiled_loss import TiledLoss
from distattn.memory.tiled_mlp import tile_feed_forward

# 81 tokens, the first half without labels, so rank 0 has no labels in a contiguous layout on two or four ranks
LENGTHS = [30, 8, 43]
VARIANTS: dict[str, dict[str, Any]] = {
    "tiled loss": dict(loss=TiledLoss(tile_tokens=7)),
    "tiled mlp": dict(mlp_tile=5),
    "checkpointed": dict(save="nothing"),
    "attention saved": dict(save="attention"),
    "offloaded": dict(save="nothing", offload=True),
    "attention saved, offloaded": dict(save="attention", offload=True),
    "all": dict(loss=TiledLoss(tile_tokens=4), mlp_tile=3, save="nothing", offload=True),
}


def batches() -> list[dict[str, Any]]:
    """Return two micro-batches. The number of labels differs between ranks, and some ranks have no labels."""
    return [small.micro_batch(LENGTHS, masked=True), small.micro_batch([11, 21])]


def apply(model: Any, *, mlp_tile: int = 0, save: str | None = None, offload: bool = False) -> None:
    """Apply the settings of a variant that change the model."""
    if mlp_tile:
        tile_feed_forward(model, mlp_tile)
    if save is not None:
        checkpoint_layers(model.model.layers, save=save, offload=HostOffload(1) if offload else None)


def step(rank: int, ranks: int, fsdp: bool, variant: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Run one step on this rank. Return (loss, full gradients)."""
    model = small.build(dtype, **changes)
    how = dict(VARIANTS[variant])
    loss = how.pop("loss", None)
    apply(model, **how)
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("dp", "cp"))
    if fsdp:
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=pytorch.gradient_mesh(mesh))
    with pytorch.context_parallel(mesh, strategy="ring", layout="contiguous", kernel="reference") as cp:
        reduce = None if fsdp else partial(sum_gradients, model)
        cp.loss_scale(pytorch.ProbeTarget(model, reduce=reduce))
        losses = []
        for batch in cp.shard_step(batches()):
            losses.append(pytorch.local_loss(model, batch, loss=loss))
            losses[-1].backward()
        if reduce is not None:
            reduce()
        return cp.mean_loss(losses), [pytorch.full_tensor(parameter.grad) for parameter in model.parameters()]
