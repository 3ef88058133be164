"""Resharding: a model sharded by FSDP2 and its AdamW state load bitwise equal on another number of ranks."""

import checkpoint_faults as faults
import pytest
import torch

# import torch._dynamo once here, not in every forked rank at its first optimizer step
import torch._dynamo  # noqa: F401
import torch.distributed as dist
from processes import run_on_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distattn.checkpoints.checkpoints import Checkpoints
from distattn.checkpoints.retention import KeepRule


def build(seed, replicas=1):
    """Return a model and its optimizer. Its weights have 7 and 3 rows, so ranks get shards of unequal sizes."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False))
    model.register_buffer("counts", torch.rand(3))
    shape = (dist.get_world_size(),) if replicas == 1 else (replicas, dist.get_world_size() // replicas)
    fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[-len(shape) :]))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1 + seed, weight_decay=0.05)


def train(model, optimizer, steps):
    for step in range(steps):
        batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model(batch).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(state):
    """Return a state by name, with all tensors unsharded and all other values unchanged."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, torch.Tensor):
        state = state.full_tensor() if hasattr(state, "full_tensor") else state
        return state.detach().clone()
    return list(state) if isinstance(state, list) else state


def both(model, optimizer):
    names = ("model", "optimizer")
    return dict(zip(names, get_state_dict(model, optimizer), strict=True))


def save(rank, folder, replicas=1):
    model, optimizer = build(0, replicas)
    saver = Checkpoints(folder, group=dist.group.WORLD, facts={}, keep=KeepRule(), warn=faults.no_warning)
    for step in (2, 3):
        train(model, optimizer, step)
        state = both(model, optimizer)
        wanted = whole(state)
        saver.save(step, state, overlap=True)
        # training continues immediately. PyTorch does not count changes of sharded tensors, so the optimizer's step
        # waits for the copies
        train(model, optimizer, 1)
    saver.close()
    return wanted


def load(rank, folder, replicas=1):
    model, optimizer = build(1, replicas)
    # as in a trainer that resumes, the optimizer has no state yet and get_state_dict creates it
    state = both(model, optimizer)
    saver = Checkpoints(folder, group=dist.group.WORLD, facts={}, keep=KeepRule(), warn=faults.no_warning)
    loaded = saver.load_newest(state)
    saver.close()
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return loaded.step, whole(both(model, optimizer))


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(1, 4), (2, 2), (4, 1), (4, 2), (1, 2), (2, 1), (2, 4), (4, 4)])
@pytest.mark.sampled(3)
def test_other_numbers_of_ranks_load_the_same_state(saved_on, loaded_on, tmp_path):
    check(saved_on, loaded_on, tmp_path)


def test_replicated_shards_are_written_once_and_loaded_by_other_meshes(tmp_path):
    check(4, 1, tmp_path, replicas=2)
    names = [file.name for file in (tmp_path / "step-00000003").iterdir()]
    sizes = [sum(file.stat().st_size for file in (tmp_path / "step-00000003").glob("*.distcp"))]
    assert "verdict.json" in names and len(names) == 7
    alone = tmp_path / "alone"
    check(2, 4, alone, replicas=1)
    sizes.append(sum(file.stat().st_size for file in (alone / "step-00000003").glob("*.distcp")))
    assert sizes[0] < 1.2 * sizes[1]


def check(saved_on, loaded_on, folder, replicas=1):
    wanted = run_on_ranks(saved_on, save, folder, replicas)
    loaded = run_on_ranks(loaded_on, load, folder)
    assert all(faults.equal(saved, wanted[0]) for saved in wanted)
    for step, state in loaded:
        assert step == 3 and faults.equal(state, wanted[0])
    state = wanted[0]["optimizer"]["state"]
    assert len(state) == 3 and all(int(parameter_state["step"]) == 6 for parameter_state in state.values())
