"""DeepSpeed, any ZeRO stage: torchrun --nproc-per-node 4 examples/deepspeed_zero.py [--stage 3] [--bf16]"""

import argparse
import os

import torch
import torch.distributed as dist
from packs import DEVICE, llama, steps

import distattn as da

if DEVICE.type == "cpu":
    os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed

from distattn.adapters.deepspeed import ProbeTarget, SequenceGroups
from distattn.adapters.pytorch import local_loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    given = parser.parse_args()

    # on CPUs DeepSpeed would compile an extension for shared memory
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if DEVICE.type == "cpu" else "nccl", verbose=False)
    cp = da.ContextParallel(strategy="ring", layout="document_zigzag", layout_options={"min_chunk": 64})
    model = llama(torch.bfloat16 if given.bf16 else torch.float32)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": given.bf16},
        "zero_optimization": {"stage": given.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.01, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config, mpu=SequenceGroups(cp)
    )
    # by what DeepSpeed divides gradients depends on the stage; it is measured, once
    factor = cp.loss_scale(ProbeTarget(engine))

    for number, packs in enumerate(steps(given.steps)):
        total = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for batch in cp.shard_step(packs):
            loss = local_loss(engine, batch)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / factor
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {number + 1} loss {total:.12f}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
