"""A peer that is lost outside a driver: in `prepare`, or between two attention calls."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from cases import LENGTHS, layouts, masks
from processes import run_survivors

import distattn as da

pytestmark = pytest.mark.waits(3)

# the time-out of the group and of the communicators created for it; after it, other ranks may be a few seconds late
TIMEOUT = timedelta(seconds=15)


def lost_in(rank, lost, how, where):
    """Kill or stop a rank before a driver is created, before `prepare`, or after it. Return the error, and the seconds
    until it was raised.
    """
    group = dist.new_group(timeout=TIMEOUT)
    shape = dict(heads=4, kv_heads=2, head_dim=8, dtype="float64")
    plan = da.make_plan(masks()["causal"], layouts(LENGTHS, 3)["zigzag"], strategy="ring", **shape)
    q, k, v = (torch.ones(len(plan.call.layout.tokens(rank)), heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    ready = da.prepare(plan, group) if where == "attention" else None
    dist.barrier(group)
    if rank == lost:
        os.kill(os.getpid(), how)
    began = time.monotonic()
    with pytest.raises(da.LostRankError) as error:
        # a rank may complete the first of two calls with messages sent earlier, but not the second
        if where == "driver":
            da.ContextParallel(group, strategy="ring")
        for _ in range(2):
            da.attention(q, k, v, ready or da.prepare(plan, group))
    return str(error.value), time.monotonic() - began


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=["stops", "dies"])
@pytest.mark.parametrize("where", ["driver", "prepare", "attention"])
def test_a_lost_peer_is_named_soon_after_the_groups_own_time_out(where, how):
    for error, seconds in run_survivors(3, 1, lost_in, 1, how, where).values():
        # in a ring, a neighbour that gave up counts as lost for the next rank
        assert "rank 1 " in error or (where == "attention" and "of the group stopped answering" in error)
        # the backend's own limit is half an hour
        assert seconds < 100
