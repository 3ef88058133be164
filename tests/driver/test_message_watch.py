"""Messages that only the device waits for: a lost rank is still named."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from imitated_nccl import imitate_nccl
from packs_of_ranks import loader, shared
from processes import run_survivors

import distattn as da
from distattn.driver.message_watch import describe_messages
from distattn.ir.plan import Payload
from distattn.parallel.runtime.communication import communicator
from distattn.parallel.runtime.communication.transport import Packet

pytestmark = pytest.mark.waits

# the driver's time-out: a step takes far less even on a loaded machine
TIMEOUT = 16.0
SHAPES = dict(q=4, k=2, v=2)


def attend(batch):
    tokens = batch["input_ids"].shape[1]
    q, k, v = (torch.ones(tokens, heads, 8, dtype=torch.float64) for heads in SHAPES.values())
    return batch["context_parallel"].attention(q, k, v)


def late_run(rank, lost, how):
    """Return the error that ends a loop of attention calls that never block the host."""
    imitate_nccl(seconds=600, blocks=False)
    with pytest.raises(da.LostRankError) as error, shared(strategy="ring", data="replicated", timeout=TIMEOUT) as cp:
        batch = cp.shard(next(iter(loader(0)))[0])
        for _ in range(3):
            attend(batch)
        dist.barrier()
        if rank == lost:
            os.kill(os.getpid(), how)
        attend(batch)
        # imitate a loop that never reads the outputs. Without an error, only the test's own limit would end it
        while True:
            time.sleep(0.2)
            attend(batch)
    return str(error.value)


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=["stops", "dies"])
def test_a_lost_rank_is_named_with_the_move_that_is_waited_for(how):
    errors = run_survivors(3, 1, late_run, 1, how)
    for error in errors.values():
        assert "rank 1 stopped answering: killed, stopped or unreachable" in error
    # some of the other ranks wait for a message from rank 1
    assert any(
        "KV from rank" in error and "of the forward pass did not arrive within 12 s" in error
        for error in errors.values()
    )


def first_contact(rank, lost, how):
    """Return the error that ends attention calls whose first message to the lost rank blocks the host."""
    imitate_nccl(seconds=600, blocks=False)
    communicator._CONNECTED_NEIGHBOURS = 0
    ids = torch.zeros(1, 96, dtype=torch.int64)
    settings = dict(strategy="ring", layout="contiguous", data="replicated", timeout=TIMEOUT)
    with pytest.raises(da.LostRankError) as error, shared(**settings) as cp:
        # this opens the communicator; no document spans two ranks, so nothing is sent
        first = cp.shard({"input_ids": ids, "document_lengths": [32, 32, 32]})
        attend(first)
        batch = cp.shard({"input_ids": ids, "document_lengths": [96]})
        for shape, device in first["context_parallel"]._executables:
            # this waits until the ranks have agreed on the plan
            batch["context_parallel"].executable(shape, device)
        dist.barrier()
        if rank == lost:
            os.kill(os.getpid(), how)
        while True:
            attend(batch)
            time.sleep(0.2)
    return str(error.value)


@pytest.mark.full
def test_a_rank_that_is_lost_before_its_first_message_is_named():
    errors = run_survivors(3, 1, first_contact, 1, signal.SIGSTOP)
    for error in errors.values():
        assert "rank 1 stopped answering: killed, stopped or unreachable" in error


def test_moves_are_named_by_payload_rank_and_step():
    def packets(*pairs):
        return [Packet(peer, payload, torch.empty(0)) for peer, payload in pairs]

    receives = packets((2, Payload.KV), (2, Payload.KV), (0, Payload.Q), (1, Payload.Q))
    text = "KV from rank 6, Q from ranks 4, 5 in step 1 of 2"
    assert describe_messages([], receives, [4, 5, 6], "in step 1 of 2") == (text, (4, 5, 6))
    assert describe_messages(packets((1, "hidden states")), [], [0, 8], "") == ("hidden states to rank 8", (8,))
