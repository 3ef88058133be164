"""The pool of arenas: passes share them, those that failed do not give theirs back."""

import os

import pytest
import torch

from distattn.parallel.runtime import arenas
from distattn.parallel.runtime.arenas import ArenaPool

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
    with pool.borrowed(4096, CPU) as one, pool.borrowed(4096, CPU) as other:
        assert one.data_ptr() != other.data_ptr()
    assert pool.idle_bytes(CPU) == [4096, 4096]
    pool.free(CPU)
    assert pool.idle_bytes(CPU) == []


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


def test_idle_arenas_are_freed_where_memory_is_short(monkeypatch):
    pool, new = ArenaPool(), arenas._new
    with pool.borrowed(1024, CPU), pool.borrowed(1024, CPU):
        pass

    def full(nbytes, device):
        if pool.idle_bytes(device):
            raise torch.OutOfMemoryError("full")
        return new(nbytes, device)

    monkeypatch.setattr(arenas, "_new", full)
    address_of_next(pool, 4096)
    assert pool.idle_bytes(CPU) == [4096]


def test_a_forked_process_has_a_pool_of_its_own():
    arenas.ARENAS.free()
    address_of_next(arenas.ARENAS, 4096)
    assert arenas.ARENAS.idle_bytes(CPU) == [4096]
    child = os.fork()
    if not child:
        os._exit(len(arenas.ARENAS.idle_bytes(CPU)))
    assert os.waitpid(child, 0)[1] == 0
    arenas.ARENAS.free()
