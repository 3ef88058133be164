"""Gluon's forward kernel while a communicator holds some multiprocessors: persistent programs lose time, single-tile
programs do not.
"""

import heapq

import numpy as np
import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")

from oracle import dense, random_inputs, relative_error
from test_gluon import run_emulated

from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.kernels.gluon import attention as gluon_attention
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.spec import KernelRequirements, ScoreMod
from distattn.kernels.tile_runs import tile_runs
from distattn.parallel.make_plan import make_plan
from distattn.parallel.runtime.lowering.lower import lower

CPU = torch.device("cpu")
NEEDED = KernelRequirements(torch.bfloat16, 128, 128, CPU)
PROCESSORS = 132
TILE = gluon_attention.FORWARD[128]
# (multiprocessors held by the communicator, fraction of the kernel's own time for which they are held)
HELD = ((16, 0.1), (16, 0.3), (16, 0.6), (32, 0.6), (32, 1.0))


def work_of_programs(mask, programs, unhidden=0.0):
    """Return the work of each program, in key tiles, if tiles of rows are dealt out to `programs` programs as in the
    kernel. Each tile of rows has a fixed cost of one key tile.

    unhidden: extra time per program, in key tiles.
    """
    runs = tile_runs(mask, TILE.rows, TILE.keys)
    work = runs.work(TILE.keys)[runs.group][:, runs.order].T.ravel() + 1.0
    dealt = np.pad(work, (0, -len(work) % programs)).reshape(-1, programs)
    dealt[1::2] = dealt[1::2, ::-1]
    return dealt.sum(0) + unhidden


def slowdown(mask, programs, held, share, unhidden=0.0):
    """Return the launch's time relative to perfectly balanced multiprocessors, if each takes the next program once it
    is free.
    """
    ideal = work_of_programs(mask, programs).sum() / PROCESSORS
    work = work_of_programs(mask, programs, unhidden)
    free = [0.0] * (PROCESSORS - held) + [share * ideal] * held
    heapq.heapify(free)
    for tiles in work:
        heapq.heapreplace(free, free[0] + tiles)
    return max(free) / ideal


def forward_launches(strategy, ranks=8, lengths=(65536,), **how):
    """Return the launch masks of a forward pass. Check that lowering marks the launches with messages in flight."""
    shape = dict(heads=64, kv_heads=8, head_dim=128, dtype="bfloat16")
    plan = make_plan(Mask.documents(lengths), Layout.zigzag(lengths, ranks), strategy=strategy, **shape)
    program = lower(plan, ranks // 2, lambda mask: mask, **how)
    for step in (*program.forward, *program.backward):
        for launch in step.launches:
            assert launch.schedule.overlaps_messages == bool(step.sends or step.receives)
            assert launch.schedule.in_larger_job == (ranks > 1 or bool(how))
    return [launch.schedule for step in program.forward for launch in step.launches]


def single_tiles(mask):
    return mask.heads * -(-mask.rows // TILE.rows)


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_launches_with_messages_in_flight_have_one_program_for_each_tile(strategy):
    masks = forward_launches(strategy)
    # neither the last step of a ring nor the only launch of Ulysses has messages in flight
    assert [mask.overlaps_messages for mask in masks][-1] is False
    assert any(mask.overlaps_messages for mask in masks) == (strategy == "ring")
    for mask in masks:
        # even in the other launches, FSDP may have messages in flight
        assert gluon_attention.prepare(mask, NEEDED).programs == single_tiles(mask)
        alone = mask._replace(overlaps_messages=False, in_larger_job=False)
        assert gluon_attention.prepare(alone, NEEDED).programs == PROCESSORS


def test_quiet_launches_deal_short_tiles_and_those_of_one_rank():
    (short,) = forward_launches("ulysses", lengths=(8192,) * 8)
    assert gluon_attention.prepare(short, NEEDED).programs == PROCESSORS
    # a plan for one rank has no messages, but other ranks of its job may send messages
    (alone,), (in_job,) = forward_launches("ulysses", ranks=1), forward_launches("ulysses", ranks=1, in_larger_job=True)
    assert gluon_attention.prepare(alone, NEEDED).programs == PROCESSORS
    assert gluon_attention.prepare(in_job, NEEDED).programs == single_tiles(in_job)


@pytest.mark.parametrize("document", [2048, 8192, 16384, 65536])
def test_tiles_are_dealt_in_quiet_launches_where_single_ones_would_cost_more_than_they_save_beside_fsdp(document):
    (mask,) = forward_launches("ulysses", lengths=(document,) * (65536 // document))
    # persistent programs hide their first loads and last writes; single-tile programs do not. Moving these 192 KB takes
    # a latency of 2 us plus the time at a multiprocessor's 19 KB/us; a key tile takes 1.9 us at 600 TFLOP/s
    unhidden = (192 / 19 + 2) / 1.9
    # an all-gather of the next layer's weights takes a tenth of the launch's time
    beside = slowdown(mask, single_tiles(mask), 16, 0.1, unhidden) - slowdown(mask, PROCESSORS, 16, 0.1)
    is_dealt = gluon_attention.prepare(mask, NEEDED).programs == PROCESSORS
    assert is_dealt == (beside > 0.02)


@pytest.mark.parametrize("mask", [LaunchMask.from_mask(Mask.causal(16384), 64, 8)], ids=["causal"])
def test_dealt_tiles_lose_what_is_held_and_single_tiles_do_not(mask):
    quiet, overlapped = (
        gluon_attention.prepare(mask._replace(overlaps_messages=overlaps), NEEDED).programs
        for overlaps in (False, True)
    )
    dealt = [slowdown(mask, quiet, *held) for held in HELD]
    single = [slowdown(mask, overlapped, *held) for held in HELD]
    # programs that start late still have a full share of the work, so computation starts only after communication
    for (_, share), time in zip(HELD, dealt, strict=True):
        assert time >= 1 + share - 0.01
    for (held, share), time in zip(HELD, single, strict=True):
        # apart from the last tiles, only the multiprocessor time that the communicator takes is lost
        assert time <= 1 + held * share / PROCESSORS + 0.03
    assert max(single) < 1.25 and max(dealt) > 1.95


@pytest.mark.parametrize("overlaps", [False, True])
def test_both_launches_equal_the_oracle(overlaps, monkeypatch):
    launched = []

    def run(launch):
        launched.append(launch.grid[0])
        run_emulated(launch)

    monkeypatch.setattr(gluon_attention, "run_launch", run)
    monkeypatch.setattr(gluon_attention, "multiprocessors", lambda device: 3)
    mask, inputs = Mask.causal(520), random_inputs(520, 4, 2, 64)
    cells = LaunchMask.from_mask(mask, 4, 2)._replace(overlaps_messages=overlaps)
    q, k, v, do = (x.to(torch.float16) for x in inputs)
    schedule = gluon_attention.prepare(cells, KernelRequirements(torch.float16, 64, 64, CPU))
    score = ScoreMod(0.25)
    o, lse = gluon_attention.forward(q, k, v, schedule, score)
    assert launched == [4 * -(-520 // 192) if overlaps else 3]
    grads = gluon_attention.backward(do, q, k, v, lse, (do.float() * o).sum(-1), schedule, score)
    wanted = dense(mask, inputs, 0.25)
    for got, name in zip((o, lse, *grads), ("o", "lse", "dq", "dk", "dv"), strict=True):
        assert relative_error(got, getattr(wanted, name)) < 8e-3, name
