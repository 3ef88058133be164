"""The pool of arenas: passes share arenas, and a failed pass does not return its arena."""

import gc
import os
import weakref
from types import SimpleNamespace

import pytest
import torch
from imitated_cuda import DEVICE, StreamNccl, imitated_cuda
from imitated_nccl import GROUP
from planted_changes import ChangedGradient

from distattn.ir.plan import Payload
from distattn.parallel.runtime import arenas
from distattn.parallel.runtime.arenas import ArenaPool
from distattn.parallel.runtime.communication.transport import GroupTransport, Packet
from distattn.parallel.runtime.execution.buffers import Buffers
from distattn.parallel.runtime.execution.kept_tensors import _part
from distattn.parallel.runtime.lowering.memory import FlatPlaces, PlacedTensor
from distattn.parallel.runtime.lowering.views import BufferKey

CPU = torch.device("cpu")


def address_of_next(pool, nbytes):
    with pool.borrowed(nbytes, CPU) as arena:
        return arena.data_ptr()


def test_passes_one_after_another_have_one_arena_which_grows():
    pool = ArenaPool()
    first = address_of_next(pool, 4096)
    assert address_of_next(pool, 1024) == first
    address_of_next(pool, 8192)
    assert pool.idle_bytes(CPU) == [8192]


def test_passes_that_are_under_way_at_once_have_an_arena_each():
    pool = ArenaPool()
    with pool.borrowed(4096, CPU) as first, pool.borrowed(4096, CPU) as second:
        assert first.data_ptr() != second.data_ptr()
    assert pool.idle_bytes(CPU) == [4096, 4096]
    pool.free(CPU)
    assert pool.idle_bytes(CPU) == []


def test_arenas_of_a_stream_that_is_used_no_longer_are_freed(monkeypatch):
    pool, stream = ArenaPool(), ["training"]
    monkeypatch.setattr(arenas, "_place", lambda device: (device, stream[0]))
    monkeypatch.setattr(arenas, "_FORGOTTEN_AFTER", 10)
    address_of_next(pool, 4096)
    stream[0] = "evaluation"
    address_of_next(pool, 8192)
    stream[0] = "training"
    for _ in range(9):
        address_of_next(pool, 4096)
    assert pool.idle_bytes(CPU) == [4096, 8192]
    for _ in range(9):
        address_of_next(pool, 4096)
    assert pool.idle_bytes(CPU) == [4096]


def test_the_arena_of_a_pass_that_fails_is_not_used_again():
    pool = ArenaPool()
    with pytest.raises(ValueError), pool.borrowed(4096, CPU):
        raise ValueError("a peer is lost")
    assert pool.idle_bytes(CPU) == []

    def paused():
        with pool.borrowed(4096, CPU):
            yield

    run = paused()
    next(run)
    run.close()
    assert pool.idle_bytes(CPU) == []


def in_backward(work):
    """Call `work` inside a backward pass, as a checkpoint does when it repeats a layer."""
    ChangedGradient.apply(torch.ones(1, requires_grad=True), lambda gradient: (work(), gradient)[1]).sum().backward()


def kept_by_a_pass(pool, count=8):
    with pool.kept(count, torch.float32, CPU) as kept:
        kept.fill_(count)
    return kept


def test_what_first_passes_keep_is_new_memory_while_something_refers_to_it():
    pool, freed = ArenaPool(), []
    address = kept_by_a_pass(pool).data_ptr()
    # the first arena was dropped immediately, as by a checkpoint, so its memory is reused
    held = [kept_by_a_pass(pool)]
    assert held[0].data_ptr() == address
    weakref.finalize(held[0].untyped_storage(), freed.append, True).atexit = False
    held.append(kept_by_a_pass(pool))
    assert held[1].data_ptr() != address
    # the pool refers only to the last arena, so the first is freed
    held.clear()
    assert freed


def test_repeated_layers_keep_what_the_backward_finds_again_in_the_same_memory():
    pool, held = ArenaPool(), []

    def repeat_layers():
        # both layers' tensors are alive at the same time if one checkpoint contains both layers
        first, second = kept_by_a_pass(pool), kept_by_a_pass(pool)
        addresses = {first.data_ptr(), second.data_ptr()}
        assert len(addresses) == 2
        part = second[1:]
        del first, second
        # a view is enough to keep an arena alive
        held.append(kept_by_a_pass(pool))
        assert held[0].data_ptr() in addresses and held[0].data_ptr() != part.data_ptr() - part.element_size()
        assert (held[0] == 8).all() and (part == 8).all()

    in_backward(repeat_layers)
    # the first pass keeps its tensors until a much later backward pass
    before = kept_by_a_pass(pool)
    in_backward(lambda: kept_by_a_pass(pool, 5))
    assert (held[0] == 8).all() and (before == 8).all()


def test_what_hooks_of_other_libraries_may_still_read_is_new_memory():
    pool = ArenaPool()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x), pool.kept(64, torch.float32, CPU) as kept:
        assert kept.shape == (64,)
    assert not pool._kept


@pytest.mark.parametrize("begin", [0, 16])
def test_kept_tensors_are_found_in_a_part_of_another_tensor(begin):
    whole = torch.arange(128.0)
    place = PlacedTensor(torch.float32, (2, 3), (8, 1), 4)
    holder, key = SimpleNamespace(fields={}, _rows={}), BufferKey(Payload.Q, 0, 0, 1)
    Buffers.bind_flat(holder, FlatPlaces({key: [place]}, 112, 448), whole[begin:])
    wanted = torch.tensor([[4.0, 5, 6], [12, 13, 14]]) + begin
    assert torch.equal(holder.fields[key][0], wanted) and torch.equal(_part(whole[begin:], place), wanted)


def test_memory_kept_by_a_failed_pass_is_not_reused():
    pool, freed = ArenaPool(), []

    def repeat_layers():
        with pytest.raises(ValueError), pool.kept(8, torch.float32, CPU) as kept:
            weakref.finalize(kept.untyped_storage(), freed.append, True).atexit = False
            raise ValueError("a peer is lost")

    in_backward(repeat_layers)
    gc.collect()
    assert freed


def test_idle_arenas_are_freed_where_memory_is_short(monkeypatch):
    pool, new, alive = ArenaPool(), arenas._new, weakref.WeakSet()
    with pool.borrowed(1024, CPU) as first, pool.borrowed(1024, CPU) as second:
        alive |= {first.untyped_storage(), second.untyped_storage()}
    del first, second

    def full(nbytes, device):
        if alive:
            raise torch.OutOfMemoryError("full")
        return new(nbytes, device)

    monkeypatch.setattr(arenas, "_new", full)
    address_of_next(pool, 4096)
    assert pool.idle_bytes(CPU) == [4096]


def test_an_arena_of_an_inference_pass_serves_training():
    pool = ArenaPool()
    with torch.inference_mode():
        first = address_of_next(pool, 4096)
    with pool.borrowed(4096, CPU) as arena:
        assert arena.data_ptr() == first
        arena.zero_()


def test_a_forked_process_has_a_pool_of_its_own_and_leaves_the_memory_of_its_parent_alone():
    arenas.ARENAS.free()
    freed = []
    with arenas.ARENAS.borrowed(4096, CPU) as arena:
        weakref.finalize(arena.untyped_storage(), freed.append, True).atexit = False
    del arena
    assert arenas.ARENAS.idle_bytes(CPU) == [4096]
    child = os.fork()
    if not child:
        os._exit(len(arenas.ARENAS.idle_bytes(CPU)) + len(freed))
    assert os.waitpid(child, 0)[1] == 0
    arenas.ARENAS.free()
    assert freed


def a_pass(pool, transport):
    """Send one half of an arena, and receive into the other."""
    with pool.borrowed(64, DEVICE) as arena:
        arena[:32].zero_()
        packets = [Packet(1, "rows", arena[:32])], [Packet(1, "rows", arena[32:])]
        transport.exchange(*packets, False).wait()
        arena[32:].sum()


def violations_of_passes(pool):
    """Run several passes on each of two streams in turn, with one pass nested in the first."""
    with imitated_cuda() as cuda:
        transport, side = GroupTransport(GROUP, StreamNccl(cuda)), torch.cuda.Stream()
        for _ in range(2):
            a_pass(pool, transport)
            with torch.cuda.stream(side):
                a_pass(pool, transport)
        with pool.borrowed(32, DEVICE) as outer:
            outer.zero_()
            a_pass(pool, transport)
            outer.sum()
        side.synchronize()
        pool.free()
        return cuda.clocks.violations


def test_passes_on_two_streams_share_arenas_without_a_race():
    assert violations_of_passes(ArenaPool()) == []


def test_an_arena_of_another_stream_is_found():
    class OneForAllStreams(ArenaPool):
        def _take(self, place, nbytes, idle):
            others = [arenas for arenas in self._idle.values() if arenas]
            return super()._take(place, nbytes, others[0] if others else idle)

    assert violations_of_passes(OneForAllStreams())


def test_an_arena_that_is_handed_back_before_its_messages_are_there_is_found():
    pool = ArenaPool()
    with imitated_cuda() as cuda:
        transport = GroupTransport(GROUP, StreamNccl(cuda))
        with pool.borrowed(64, DEVICE) as arena:
            pending = transport.exchange([], [Packet(1, "rows", arena[:32])], False)
        a_pass(pool, transport)
        pending.wait()
        pool.free()
        violations = cuda.clocks.violations
    assert any("zero_ (32,) writes" in violation and "receive from rank 1" in violation for violation in violations)
