"""Clocks of streams: the order that each kind of wait creates, what is reported without it, and messages of a
transport.
"""

import re
from concurrent.futures import Future
from threading import Thread

import pytest
import torch
from imitated_cuda import DEVICE, StreamNccl, imitated_cuda
from imitated_nccl import GROUP

from distattn.ir.plan import Payload
from distattn.parallel.runtime.communication.streams import Handover
from distattn.parallel.runtime.communication.transport import GroupTransport, Packet


def violations(work):
    """Return the violations of `work`, which is called with a side stream."""
    with imitated_cuda() as cuda:
        work(torch.cuda.Stream())
        return cuda.clocks.violations


def event(side, x):
    done = torch.cuda.Event()
    done.record()
    done.wait(side)


def handover(side, x):
    waited = Handover.of([x])
    with torch.cuda.stream(side):
        waited.join()


WAITS = {
    "event": event,
    "stream": lambda side, x: side.wait_stream(torch.cuda.current_stream()),
    "host": lambda side, x: torch.cuda.current_stream().synchronize(),
    "number": lambda side, x: x[0].item(),
    "handover": handover,
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_a_read_on_another_stream_must_wait_for_the_write(wait):
    def work(side, wait=wait):
        x = torch.ones(4, device=DEVICE)
        wait(side, x)
        with torch.cuda.stream(side):
            x.sum()
        side.synchronize()

    assert not violations(work)
    (text,) = violations(lambda side: work(side, lambda side, x: torch.cuda.Event()))
    assert text == (
        "sum (4,) reads on a side stream (the main thread) what ones (4,) writes on the default stream (the main thread), "
        "without waiting for it"
    )


def test_an_event_knows_of_what_was_queued_before_it_was_recorded_only():
    def work(side):
        x, y, done = torch.ones(4, device=DEVICE), torch.ones(4, device=DEVICE), torch.cuda.Event()
        # not recorded yet, so there is nothing to wait for
        side.wait_event(done)
        with torch.cuda.stream(side):
            x.sum()
        done.record()
        y.zero_()
        side.wait_event(done)
        with torch.cuda.stream(side):
            x.amin()
            y.amax()
        side.synchronize()

    pairs = [re.match(r"(\w+) .* what (\w+) ", text).groups() for text in violations(work)]
    assert pairs == [("sum", "ones"), ("amax", "zero_")]


def test_a_write_must_wait_for_reads_of_the_same_elements_only():
    def work(side, rows):
        x = torch.ones(8, 4, device=DEVICE)
        side.wait_stream(torch.cuda.current_stream())
        x[:4].sum()
        with torch.cuda.stream(side):
            x[rows].zero_()
        side.synchronize()

    assert not violations(lambda side: work(side, slice(4, 8)))
    (text,) = violations(lambda side: work(side, slice(3, 8)))
    assert text.startswith("zero_ (5, 4) writes on a side stream (the main thread) what sum (4, 4) reads")


@pytest.mark.parametrize("tells", [True, False])
def test_a_future_passes_on_what_its_thread_has_waited_for(tells):
    def work(side):
        done, x = Future(), torch.ones(4, device=DEVICE)

        def wait():
            torch.cuda.set_device(DEVICE)
            if tells:
                torch.cuda.current_stream().synchronize()
            done.set_result(None)

        Thread(target=wait).start()
        done.result()
        with torch.cuda.stream(side):
            x.sum()
        side.synchronize()

    assert bool(violations(work)) != tells


@pytest.mark.parametrize("joins", [True, False])
def test_threads_that_use_one_stream_have_an_order(joins):
    def work(side):
        x, done = torch.empty(4, device=DEVICE), torch.cuda.Event()

        def write():
            torch.cuda.set_device(DEVICE)
            x.zero_()
            done.record()

        thread = Thread(target=write, name="W")
        thread.start()
        # polling does not order the two threads
        while not done.clock and thread.is_alive():
            pass
        if joins:
            thread.join()
        x.sum()
        side.wait_event(done)

    assert (
        violations(work) == []
        if joins
        else [
            "sum (4,) reads on the default stream (the main thread) what zero_ (4,) writes on the default stream (thread W), "
            "and the threads have no order",
            "the main thread waits for an event that thread W may not have recorded yet",
        ]
    )


@pytest.mark.parametrize("tells", [True, False])
def test_memory_used_on_another_stream_is_not_freed_unrecorded(tells):
    def work(side):
        x = torch.ones(4, device=DEVICE)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.sum()
        if tells:
            x.record_stream(side)

    assert (
        violations(work) == []
        if tells
        else [
            "memory (4,) float32 of the default stream is freed while sum (4,) may still use it on a side stream (the main "
            "thread), without record_stream"
        ]
    )


@pytest.mark.parametrize("waits", [True, False])
def test_pinned_memory_is_not_written_while_it_is_copied(waits):
    def work(side):
        pinned = torch.zeros(4, pin_memory=True)
        pinned.to(DEVICE, non_blocking=True)
        if waits:
            torch.cuda.current_stream().synchronize()
        pinned.fill_(1)

    texts = violations(work)
    assert bool(texts) != waits and all("fill_ (4,) writes on the main thread what _to_copy" in text for text in texts)


def messages(work):
    """Return the violations of `work`, which is called with a transport."""
    with imitated_cuda() as cuda:
        work(GroupTransport(GROUP, StreamNccl(cuda)))
        return cuda.clocks.violations


@pytest.mark.parametrize("reads_early", [True, False])
def test_what_is_received_is_read_after_the_wait(reads_early):
    def work(transport):
        x = torch.empty(4, device=DEVICE)
        pending = transport.exchange([], [Packet(1, Payload.KV, x)], False)
        if reads_early:
            x.sum()
        pending.wait()
        x.sum()

    texts = messages(work)
    assert bool(texts) == reads_early
    assert all(
        "sum (4,) reads on the default stream" in text and "receive from rank 1 (4,) writes" in text for text in texts
    )


@pytest.mark.parametrize("writes_early", [True, False])
def test_what_is_sent_is_written_after_the_wait(writes_early):
    def work(transport):
        x = torch.ones(4, device=DEVICE)
        pending = transport.exchange([Packet(1, Payload.KV, x)], [], False)
        # reading the tensor is allowed
        x.sum()
        if writes_early:
            x.zero_()
        pending.wait()
        x.zero_()

    texts = messages(work)
    assert bool(texts) == writes_early
    assert all(
        "zero_ (4,) writes on the default stream" in text and "send to rank 1 (4,) reads" in text for text in texts
    )


def test_messages_of_one_call_are_in_no_order():
    def work(transport, count):
        x = torch.ones(8, device=DEVICE)
        packets = [Packet(1, Payload.KV, x[:4])], [Packet(1, Payload.KV, x[count:])]
        transport.exchange(*packets, False).wait()

    assert not messages(lambda transport: work(transport, 4))
    (text,) = messages(lambda transport: work(transport, 3))
    assert re.match(
        r"receive from rank 1 \(5,\) writes on message 1 .* what send to rank 1 \(4,\) reads on message 0", text
    )
