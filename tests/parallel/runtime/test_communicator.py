"""Communicators next to process groups work for any kind of group, without involving the rest of the world."""

import pytest
import torch
import torch.distributed as dist
from cases import LENGTHS, layouts, masks
from oracle import dense, random_inputs
from processes import run_on_ranks

import distattn as da
from distattn.ops import executable
from distattn.parallel.runtime.communication import communicator

SHAPE = dict(heads=4, kv_heads=2, head_dim=8, dtype="float64")


def bound_to_devices():
    """Bind the world to a device, as init_process_group(device_id=...) does. torch then splits its communicator for new
    groups.
    """
    dist.group.WORLD.bound_device_id = torch.device("cuda:0")

    def split(group):
        raise AssertionError("the world's communicator is split, a call that all its ranks would have to make")

    dist.distributed_c10d._get_split_source = split


def alone_in_a_bound_world(rank):
    bound_to_devices()
    if rank == 0:
        group = communicator.new_group([0])
        assert dist.get_world_size(group) == 1
    assert dist.group.WORLD.bound_device_id == torch.device("cuda:0")
    return True


def test_groups_of_a_device_bound_world_are_made_by_their_ranks_alone():
    assert run_on_ranks(2, alone_in_a_bound_world) == [True, True]


def attended_run(rank, kind):
    """Return (backend, error of attention) for a group with backend `kind`, or for the world if `kind` is None."""
    group = dist.new_group(backend=kind) if kind else dist.group.WORLD
    bound_to_devices()
    before = len(dist.distributed_c10d._world.pg_names)
    layout = layouts(LENGTHS, 2)["zigzag"]
    inputs = random_inputs(sum(LENGTHS), 4, 2, 8)
    plan = da.make_plan(masks()["documents"], layout, strategy="ring", **SHAPE)
    o = da.attention(*(layout.shard(x, rank) for x in inputs[:3]), da.prepare(plan, group))
    wanted = layout.shard(dense(masks()["documents"], inputs).o, rank)
    assert len(dist.distributed_c10d._world.pg_names) == before
    return dist.get_backend(group), float((o - wanted).abs().max())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", [None, "cpu:gloo", "cpu:gloo,cuda:gloo"])
def test_plans_run_beside_any_kind_of_group(kind):
    for name, difference in run_on_ranks(2, attended_run, kind):
        assert name == (kind or "gloo") and difference < 1e-12


def without_backend(rank):
    for device, has in (("xpu", "no backend"), ("cuda", "gloo")):
        with pytest.raises(da.DistattnError, match=f"the process group has {has} for {device} tensors"):
            world = dist.group.WORLD
            communicator.open_communicator(world, torch.device(device), communicator.timeout_of(world))
    return True


def test_a_group_without_a_backend_for_the_device_is_refused():
    assert run_on_ranks(2, without_backend) == [True, True]


def test_a_device_without_index_is_the_current_one(monkeypatch):
    # every thread has its own current device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert executable.with_device_index("cuda") == torch.device("cuda:3")
    assert executable.with_device_index("cuda:1") == torch.device("cuda:1")
    assert executable.with_device_index("cpu") == torch.device("cpu")
    with pytest.raises(da.DistattnError, match="there is no device 'gpu'"):
        executable.with_device_index("gpu")
