"""The end of communicators: one shutdown, with their driver, group or process, or an abort if a rank is lost."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from imitated_nccl import Group, ImitatedNccl, QueueWire

from distattn.ir.errors import DistattnError
from distattn.parallel.runtime.communication import communicator_end
from distattn.parallel.runtime.communication.communicator_end import end_communicator, end_with_group
from distattn.parallel.runtime.communication.transport import GroupTransport, Packet

SUPPORT = Path(__file__).parents[2] / "support" / "gpus"


@pytest.fixture
def opened(monkeypatch):
    """Yield a single-rank communicator and its group. Waits for its end are short."""
    monkeypatch.setattr(communicator_end, "_END_SECONDS", 0.2)
    group, backend = Group(), ImitatedNccl(QueueWire().end(0), 0, 1)
    end_with_group(backend, group)
    yield group, backend
    end_communicator(backend, gracefully=False)


def test_a_communicator_that_is_dropped_without_an_end_prints_the_warning(capfd):
    ImitatedNccl(QueueWire().end(0), 0, 1).size()
    assert "destroy_process_group() was not called" in capfd.readouterr().err


def test_a_closed_transport_is_shut_down_once_and_refuses_messages(opened):
    group, backend = opened
    transport = GroupTransport(group, backend)
    transport.acquire()
    transport.acquire()
    transport.release(gracefully=True)
    assert transport.is_open and not backend._is_shut
    transport.release(gracefully=True)
    transport.close()
    assert backend._is_shut and not backend._is_aborted
    with pytest.raises(DistattnError, match="close it after the last backward pass"):
        transport.exchange([Packet(0, "numbers", torch.ones(1))], [], False)
    with pytest.raises(RuntimeError, match="used after its shutdown"):
        backend.allreduce([torch.ones(1)])


def test_a_transport_on_a_backend_of_the_callers_own_is_aborted_once():
    backend = ImitatedNccl(QueueWire().end(0), 0, 1)
    group = Group()
    transport = GroupTransport(group, backend)
    transport.abort()
    assert backend._is_aborted
    backend._is_aborted = False
    transport.abort()
    assert not backend._is_aborted
    # otherwise its destructor prints a warning
    backend.abort()


def test_garbage_collection_may_end_a_communicator_on_a_thread_that_ends_another():
    lock = communicator_end._LOCK
    with lock:
        assert lock.acquire(blocking=False)
        lock.release()


def test_no_thread_is_left_after_a_communicator(opened):
    threads = communicator_end._OPEN[id(opened[1])].helper.threads
    assert len(threads) == 2 and set(threads) <= set(threading.enumerate())
    end_communicator(opened[1])
    assert opened[1]._is_shut and not set(threads) & set(threading.enumerate())


def test_a_communicator_ends_with_its_group(opened):
    group, backend = opened
    del group
    # the fixture still holds a reference to the group, so call the finalizer directly
    communicator_end._OPEN[id(backend)].finalizer()
    assert backend._is_shut and id(backend) not in communicator_end._OPEN


def test_a_communicator_whose_shutdown_fails_is_aborted(opened, monkeypatch):
    def shutdown():
        raise RuntimeError("NCCL error")

    monkeypatch.setattr(opened[1], "shutdown", shutdown)
    end_communicator(opened[1])
    assert opened[1]._is_aborted


def test_a_shutdown_that_hangs_is_left_behind_and_others_are_ended(opened, monkeypatch):
    monkeypatch.setattr(communicator_end, "_ABORT_SECONDS", 0.2)
    release, backend = threading.Event(), opened[1]

    def shutdown():
        with backend._end_lock:
            release.wait()

    monkeypatch.setattr(backend, "shutdown", shutdown)
    other = ImitatedNccl(QueueWire().end(0), 0, 1)
    end_with_group(other, opened[0])
    end_communicator(backend)
    end_communicator(other)
    assert other._is_shut and not backend._is_aborted
    release.set()


def test_a_communicator_is_aborted_without_a_shutdown_if_a_rank_does_not_come_to_the_end(opened, monkeypatch):
    def farewell(seconds):
        raise RuntimeError(f"rank 1 has not come in {seconds} s")

    group, backend = Group(), ImitatedNccl(QueueWire().end(0), 0, 1)
    end_with_group(backend, group, farewell)
    end_communicator(backend)
    assert backend._is_aborted and not backend._is_shut


def test_messages_after_an_abort_fail_as_the_communicators_own_do(opened):
    transport = GroupTransport(*opened)
    transport.abort()
    with pytest.raises(RuntimeError, match="was aborted"):
        transport.exchange([Packet(0, "numbers", torch.ones(1))], [], False)


def test_a_rank_that_one_driver_lost_is_not_waited_for_by_the_last(opened):
    transport = GroupTransport(*opened)
    transport.acquire()
    transport.acquire()
    transport.release(gracefully=False)
    transport.release(gracefully=True)
    assert opened[1]._is_aborted and not opened[1]._is_shut


def test_after_an_error_that_ends_the_process_no_rank_is_waited_for(opened, monkeypatch):
    monkeypatch.setattr(sys, "last_value", ValueError(), raising=False)
    communicator_end._OPEN[id(opened[1])].finalizer()
    assert opened[1]._is_aborted and not opened[1]._is_shut


def test_a_forked_process_leaves_communicators_of_its_parent_alone(opened, monkeypatch):
    backend, process_id = opened[1], os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process_id + 1)
    end_communicator(backend)
    assert not backend._is_shut and not backend._is_aborted
    # abort here, so that the fixture prints no warning
    backend.abort()


# two ranks, forked after the imports, that end like ordinary programs
PROGRAM = """
import logging, os, sys, tempfile
sys.path.insert(0, {support!r})
import torch, torch.distributed as dist
import distattn as da
from distattn.parallel.runtime.communication import communicator_end

# without the advice to call loss_scale
logging.getLogger("distattn").setLevel(logging.ERROR)
communicator_end._END_SECONDS = {seconds}
folder = tempfile.mkdtemp()
ranks = [os.fork()]
ranks += [os.fork()] if ranks[0] else []
if all(ranks):
    # neither rank waits for the other's end except in the tested calls
    sys.exit(max(os.waitpid(rank, 0)[1] for rank in ranks) and 3)
rank = len(ranks) - 1
if {nccl}:
    from imitated_nccl import imitate_nccl
    imitate_nccl()
dist.init_process_group("gloo", init_method="file://" + folder + "/store", rank=rank, world_size=2)
cp = da.ContextParallel(strategy="ring")
(step,) = cp.steps([[{{"input_ids": torch.zeros(1, 64, dtype=torch.int64), "document_lengths": [64]}}]])
batch = step[0]["context_parallel"]
q = torch.ones(32, 2, 8, requires_grad=True)
batch.attention(q, q, q).sum().backward()
{end}
"""
ENDS = {
    "closed": "cp.close(); dist.destroy_process_group()",
    "close is forgotten": "dist.destroy_process_group()",
    "everything is forgotten": "",
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("nccl", [True, False], ids=["by NCCL's rules", "gloo"])
@pytest.mark.parametrize("end", ENDS)
def test_a_process_ends_silently(end, nccl):
    assert printed(ENDS[end], nccl, seconds=60) == (0, "", "")


def test_a_process_that_closes_while_it_raises_does_not_wait_for_its_peer():
    end = """
import contextlib, time
dist.barrier()
if rank:
    time.sleep(600)
before = time.monotonic()
try:
    with contextlib.closing(cp):
        raise ValueError
except ValueError:
    os.kill(int(open(folder + "/peer").read()), 9)
    assert time.monotonic() - before < 300
"""
    assert printed('open(folder + "/peer", "w").write(str(os.getpid())) if rank else None\n' + end, True, seconds=600)[
        1:
    ] == ("", "")


def test_a_process_whose_peer_died_ends_silently():
    # the shutdown waits for the peer and gives up
    assert printed("dist.barrier(); os._exit(0) if rank else None", nccl=True, seconds=0.5) == (0, "", "")


def printed(end, nccl, seconds):
    """Run PROGRAM on two ranks. Return its exit code and the output of both ranks."""
    program = PROGRAM.format(support=str(SUPPORT), nccl=nccl, end=end, seconds=seconds)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr
