"""Tensors that an engine gathers for a checkpoint: copied to the host one after another, few at a time on the device,
without a race.
"""

import ctypes
import gc
import mmap
import weakref
from types import SimpleNamespace

import pytest
import torch
from imitated_cuda import DEVICE, imitated_cuda

from distattn.checkpoints.staging import HostBuffers, StagedState
from distattn.ir.errors import DistattnError
from distattn.memory.pinned_memory import pinned_like


@pytest.fixture
def pinned(monkeypatch):
    """Record the bytes that CUDA was asked to pin, by address. Assert that ranges are whole mapped pages, each pinned
    once.
    """
    ranges: dict[int, int] = {}
    record = SimpleNamespace(ranges=ranges, error=0)

    def register(address, size, flags):
        assert not record.ranges.get(address) and address % mmap.PAGESIZE == 0
        if not record.error:
            ranges[address] = size
        return record.error

    def unregister(address):
        # reading it checks that the memory is still mapped
        ctypes.string_at(address, ranges.pop(address))
        return 0

    monkeypatch.setattr(
        torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    )
    return record


def test_pinned_memory_is_not_rounded_to_a_power_of_two(pinned):
    like = torch.zeros(5, 1000, dtype=torch.bfloat16)
    tensor = pinned_like(like)
    assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
    assert list(pinned.ranges.values()) == [10_000]
    view = tensor[1:].fill_(3)
    del tensor
    gc.collect()
    assert pinned.ranges and view.sum() == 12_000
    del view
    gc.collect()
    assert not pinned.ranges


def test_memory_that_cannot_be_pinned_is_refused_by_its_size(pinned):
    pinned.error = 2
    with pytest.raises(DistattnError, match=r"cannot pin 0.01 GB of host memory \(error 2\)"):
        pinned_like(torch.empty(10_000_000, dtype=torch.uint8))


def test_gathered_tensors_are_copied_without_a_race_and_few_are_held():
    with imitated_cuda() as cuda:
        buffers, alive, most = HostBuffers(), weakref.WeakSet(), 0
        for _ in range(2):
            state = {}
            for number in range(6):
                gathered = torch.zeros(4, device=DEVICE)
                alive.add(gathered)
                state[f"layer {number}"] = buffers.keep(f"layer {number}", gathered)
                most = max(most, len(alive))
                del gathered
            # the next optimizer step changes it
            last = torch.zeros(4, device=DEVICE)
            state["last"] = buffers.keep("last", last)
            buffers.finish_kept()
            last.add_(1)
            assert len(buffers._leaving) == 0
            buffers.wait_kept()
            for buffer in state.values():
                buffer.sum()
        assert most <= 3
        assert not cuda.clocks.violations, "\n".join(cuda.clocks.violations)


def test_a_state_keeps_tensors_that_are_buffers_already_as_they_are():
    buffers = HostBuffers()
    kept, other = buffers.keep("a", torch.ones(3)), torch.full((3,), 2.0)
    staged = StagedState({"a": kept, "b": other}, True, buffers)
    staged.copy_tensors()
    assert staged._staged["a"] is kept and staged._staged["b"] is not other
    assert list(buffers._buffers) == ["a", "b"] and buffers.keep("a", torch.zeros(3)) is kept
    # a buffer of an earlier save is an ordinary tensor
    assert not HostBuffers().holds(kept)


def test_a_tensor_with_the_id_of_a_buffer_that_is_gone_is_no_buffer():
    buffers = HostBuffers()
    buffers.keep("a", torch.ones(3))
    other = torch.ones(4)
    buffers._kept[id(other)] = "a"
    assert not buffers.holds(other)


def test_a_buffer_of_another_shape_replaces_the_old_one():
    buffers = HostBuffers()
    old = weakref.ref(buffers.keep("a", torch.ones(3)))
    assert buffers.keep("a", torch.ones(4)).shape == (4,) and old() is None
