"""Ray Train, which continues after failures: python examples/ray_train.py FOLDER (on a file system shared by all nodes)"""

import sys
from pathlib import Path
from typing import Any

import torch
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from distattn.adapters import pytorch
from distattn.adapters.ray_train import RunCheckpoints


def train(settings: dict[str, Any]) -> None:
    # do not import this earlier: it selects the device that Ray Train has assigned to this worker
    import packs

    mesh = torch.distributed.init_device_mesh(packs.DEVICE.type, (1, settings["workers"]), mesh_dim_names=("dp", "cp"))
    cp = pytorch.context_parallel(mesh, **packs.settings("replicated", settings["workers"]))
    model = packs.llama()
    pytorch.shard_parameters(model, mesh)
    cp.loss_scale(pytorch.ProbeTarget(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader, checkpoints, names = packs.steps(settings["steps"], cp), RunCheckpoints(), ("model", "optimizer")
    state = dict(zip(names, get_state_dict(model, optimizer), strict=True))
    loader.step = begin = checkpoints.load(state)
    if begin:
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    else:
        # discard the optimizer state that get_state_dict has created by a dummy step
        optimizer.state.clear()

    for done, batches in enumerate(cp.steps(loader), begin + 1):
        losses = []
        for batch in batches:
            loss = pytorch.local_loss(model, batch)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = cp.mean_loss(losses)
        if done % settings["every"] == 0:
            state = dict(zip(names, get_state_dict(model, optimizer), strict=True))
            checkpoints.report(done, state, {"loss": mean})
    checkpoints.close()
    cp.close()


def fit(settings: dict[str, Any], loop: Any = train) -> Result:
    storage, kept, failures = Path(settings["storage"]).absolute(), CheckpointConfig(num_to_keep=10), FailureConfig(3)
    workers = ScalingConfig(num_workers=settings["workers"], use_gpu=torch.cuda.is_available())
    run = RunConfig(name="ray_train", storage_path=str(storage), failure_config=failures, checkpoint_config=kept)
    return TorchTrainer(loop, train_loop_config=settings, scaling_config=workers, run_config=run).fit()


if __name__ == "__main__":
    print(fit({"storage": sys.argv[1], "workers": 2, "steps": 20, "every": 2}).metrics)  # noqa: T201
