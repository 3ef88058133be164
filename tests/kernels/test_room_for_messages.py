"""Gluon's forward while a communicator holds some multiprocessors: dealt tiles lose time, and single tiles do not."""

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
from distattn.parallel.runtime.program import lower

CPU = torch.device("cpu")
NEEDED = KernelRequirements(torch.bfloat16, 128, 128, CPU)
PROCESSORS = 132
TILE = gluon_attention.FORWARD[128]
# (multiprocessors that the communicator holds, share of the kernel's own time for which it holds them)
HELD = ((16, 0.1), (16, 0.3), (16, 0.6), (32, 0.6), (32, 1.0))


def work_of_programs(mask, programs):
    """Return the key tiles of each of `programs` programs, plus one for a tile's fixed costs, as the kernel deals out tiles."""
    runs = tile_runs(mask, TILE.rows, TILE.keys)
    work = runs.work(TILE.keys)[runs.group][:, runs.order].T.ravel() + 1.0
    dealt = np.pad(work, (0, -len(work) % programs)).reshape(-1, programs)
    dealt[1::2] = dealt[1::2, ::-1]
    return dealt.sum(0)


def slowdown(mask, programs, held, share):
    """Time of the launch relative to equally busy multiprocessors, if each takes the next program when it is free."""
    work = work_of_programs(mask, programs)
    ideal = work.sum() / PROCESSORS
    free = [0.0] * (PROCESSORS - held) + [share * ideal] * held
    heapq.heapify(free)
    for tiles in work:
        heapq.heapreplace(free, free[0] + tiles)
    return max(free) / ideal


def overlapped_launches(strategy):
    """Return the launch masks of a forward pass. Check that lowering marks those with messages in flight."""
    lengths = [65536]
    shape = dict(heads=64, kv_heads=8, head_dim=128, dtype="bfloat16")
    plan = make_plan(Mask.documents(lengths), Layout.zigzag(lengths, 8), strategy=strategy, **shape)
    program = lower(plan, 4, lambda mask: mask)
    for step in (*program.forward, *program.backward):
        for launch in step.launches:
            assert launch.schedule.overlaps_messages == bool(step.sends or step.receives)
    return [launch.schedule for step in program.forward for launch in step.launches]


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_launches_with_messages_in_flight_have_one_program_for_each_tile(strategy):
    masks = overlapped_launches(strategy)
    # the last step of a ring and the only launch of Ulysses have no messages
    assert [mask.overlaps_messages for mask in masks][-1] is False
    assert any(mask.overlaps_messages for mask in masks) == (strategy == "ring")
    for mask in masks:
        tiles = mask.heads * -(-mask.rows // TILE.rows)
        programs = gluon_attention.prepare(mask, NEEDED).programs
        assert programs == (tiles if mask.overlaps_messages else PROCESSORS)


@pytest.mark.parametrize("mask", [LaunchMask.from_mask(Mask.causal(16384), 64, 8)], ids=["causal"])
def test_dealt_tiles_lose_what_is_held_and_single_tiles_do_not(mask):
    quiet, overlapped = (
        gluon_attention.prepare(mask._replace(overlaps_messages=overlaps), NEEDED).programs
        for overlaps in (False, True)
    )
    dealt = [slowdown(mask, quiet, *held) for held in HELD]
    single = [slowdown(mask, overlapped, *held) for held in HELD]
    # programs that begin late have a full share of the work: computation and communication do not overlap
    for (_, share), time in zip(HELD, dealt, strict=True):
        assert time >= 1 + share - 0.01
    for (held, share), time in zip(HELD, single, strict=True):
        # only the multiprocessors' time that the communicator takes is lost, except for the last tiles
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
