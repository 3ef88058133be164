"""DeepSpeed, any ZeRO stage: torchrun --nproc-per-node 4 examples/deepspeed_zero.py [--stage 3] [--data per_rank]"""

import os
import warnings

import torch.distributed as dist
from packs import DEVICE, PACKS_PER_STEP, arguments, llama, settings, steps

import distattn as da

if DEVICE.type == "cpu":
    os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed

from distattn.adapters.deepspeed import ProbeTarget, SequenceGroups
from distattn.adapters.pytorch import local_loss

# ignore warnings about the deprecated names by which DeepSpeed calls collectives
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


def main() -> None:
    options = arguments(stage=2)

    # otherwise DeepSpeed would compile a shared-memory extension on CPUs
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo" if DEVICE.type == "cpu" else "nccl", verbose=False)
    cp = da.ContextParallel(**settings(options.data, dist.get_world_size()))
    model = llama()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": PACKS_PER_STEP // cp.data_parallel_size,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": options.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.01, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config, mpu=SequenceGroups(cp)
    )
    # DeepSpeed divides gradients by a factor that depends on the stage, so measure it once
    cp.loss_scale(ProbeTarget(engine))

    for number, batches in enumerate(cp.steps(steps(options.steps, cp))):
        losses = []
        for batch in batches:
            loss = local_loss(engine, batch)
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        mean = cp.mean_loss(losses)
        if dist.get_rank() == 0:
            print(f"step {number + 1} loss {mean:.12f}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
