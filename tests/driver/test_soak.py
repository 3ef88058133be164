"""Nothing grows over many steps: threads, descriptors, objects or messages in flight. Closing releases all of them."""

import gc
import os
import threading

import pytest
import torch
from packs_of_ranks import shared
from processes import run_on_ranks
from waiting import eventually

import distattn as da

# warm-up steps, in which caches fill
WARM_UP = 20


def counted(cp):
    """Return (descriptors, threads, Python objects, control messages in flight)."""
    gc.collect()
    control = cp._communicators.control
    in_flight = sum(map(len, control._host._in_flight.values())) if control else 0
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(gc.get_objects()), in_flight


def batches(rank, steps):
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        lengths = torch.randint(1, 40, (2,), generator=generator).tolist()
        ids = torch.randint(0, 99, (1, sum(lengths)), generator=generator)
        yield {"input_ids": ids, "document_lengths": lengths}


def soaked(rank, steps, settings):
    if rank >= 3 - settings.get("servers", 0):
        return da.serve().backward
    seen = []
    with shared(**settings) as cp:
        for number, (batch,) in enumerate(cp.steps(batches(rank, steps))):
            tokens = batch["input_ids"].shape[1]
            q, k, v = (torch.randn(tokens, heads, 8, requires_grad=True) for heads in (2, 1, 1))
            for _ in range(2):
                q = batch["context_parallel"].attention(q, k, v)
            q.sum().backward()
            if number in (WARM_UP, steps - 1):
                seen.append(counted(cp))
    return seen


@pytest.mark.full
@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "settings", [{"options": {"block": 8}}, {"servers": 1}, {"data": "replicated", "strategy": "ring"}], ids=str
)
def test_nothing_grows_over_many_steps(settings):
    assert_nothing_grows(100, settings)


@pytest.mark.full
def test_nothing_grows_over_hundreds_of_steps_with_servers():
    assert_nothing_grows(500, {"servers": 1})


def assert_nothing_grows(steps, settings):
    # ranks that split a batch must all get the same batch
    work = soaked if settings.get("data") != "replicated" else _same_batches
    for result in run_on_ranks(3, work, steps, settings):
        if isinstance(result, int):
            assert result == 2 * steps
            continue
        (files, threads, objects, _), (files_later, threads_later, objects_later, in_flight) = result
        assert files_later <= files and threads_later <= threads
        # the number of objects varies between steps; a leak adds at least one object per step
        assert objects_later - objects < (steps - WARM_UP) / 2 + 200
        assert in_flight <= 64


def _same_batches(rank, steps, settings):
    return soaked(0, steps, settings)


def opened_and_closed(rank, times):
    """Return the numbers of descriptors and threads after each of `times` drivers has been created, used and closed."""
    counts = []
    for _ in range(times):
        with shared() as cp:
            for (batch,) in cp.steps(batches(rank, 2)):
                q, k, v = (torch.randn(batch["input_ids"].shape[1], heads, 8) for heads in (2, 1, 1))
                batch["context_parallel"].attention(q, k, v)
        # closing waits one second for the health thread, which may be too short on a busy machine
        eventually(lambda: not any("distattn-health" in thread.name for thread in threading.enumerate()), "it goes on")
        gc.collect()
        counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    return counts


def test_a_closed_driver_gives_back_its_threads_and_connections():
    for counts in run_on_ranks(2, opened_and_closed, 6):
        # the first driver opens a process group for messages, which stays open
        assert counts[-1] <= counts[1], counts
