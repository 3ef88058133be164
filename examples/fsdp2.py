"""Your own loop with PyTorch's FSDP2: torchrun --nproc-per-node 4 examples/fsdp2.py [--data per_rank] [--dtype float64]"""

import torch
import torch.distributed as dist
from packs import DEVICE, arguments, llama, settings, steps
from torch.distributed.device_mesh import init_device_mesh

from distattn.adapters import pytorch


def main() -> None:
    options = arguments(dtype="float32", replicas=1)

    dist.init_process_group()
    degree = dist.get_world_size() // options.replicas
    mesh = init_device_mesh(DEVICE.type, (options.replicas, degree), mesh_dim_names=("dp", "cp"))
    cp = pytorch.context_parallel(mesh, **settings(options.data, dist.get_world_size()))
    model = llama(getattr(torch, options.dtype))
    pytorch.shard_parameters(model, mesh)
    # measure once by which factor gradients are scaled when they are reduced
    cp.loss_scale(pytorch.ProbeTarget(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    for number, batches in enumerate(cp.steps(steps(options.steps, cp))):
        losses = []
        for batch in batches:
            loss = pytorch.local_loss(model, batch)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = cp.mean_loss(losses)
        if dist.get_rank() == 0:
            print(f"step {number + 1} loss {mean:.12f}", flush=True)  # noqa: T201
    cp.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
