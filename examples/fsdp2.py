"""A loop of your own on PyTorch's FSDP2: torchrun --nproc-per-node 4 examples/fsdp2.py [--steps 20] [--dtype float64]"""

import argparse

import torch
import torch.distributed as dist
from packs import DEVICE, llama, steps
from torch.distributed.device_mesh import init_device_mesh

from distattn.adapters import pytorch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--replicas", type=int, default=1, help="groups of ranks with data of their own")
    given = parser.parse_args()

    dist.init_process_group()
    degree = dist.get_world_size() // given.replicas
    mesh = init_device_mesh(DEVICE.type, (given.replicas, degree), mesh_dim_names=("dp", "cp"))
    cp = pytorch.context_parallel(mesh, strategy="ring", layout="document_zigzag", layout_options={"min_chunk": 64})
    model = llama(getattr(torch, given.dtype))
    pytorch.shard_parameters(model, mesh)
    # how gradients are reduced is measured, once
    factor = cp.loss_scale(pytorch.ProbeTarget(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    for number, packs in enumerate(steps(given.steps)):
        # each replica has its own share of the step's packs
        mine = packs[mesh["dp"].get_local_rank() :: given.replicas]
        total = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for batch in cp.shard_step(mine):
            loss = pytorch.local_loss(model, batch)
            loss.backward()
            total += loss.detach() / factor
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {number + 1} loss {total:.12f}", flush=True)  # noqa: T201
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
