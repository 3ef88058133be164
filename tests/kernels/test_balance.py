"""Load balance on an H100: with a launch's programs run in order, no multiprocessor works long after the others."""

import heapq

import numpy as np
import pytest
from cases import all_masks, layouts

pytest.importorskip("triton", reason="Triton is not installed")

from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.kernels.gluon.attention import forward_programs
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.split_tiles import split_long_tiles
from distattn.kernels.tile_runs import TileRuns, tile_runs, transposed_runs
from distattn.parallel.make_plan import make_plan
from distattn.parallel.runtime.lowering.lower import lower

pytestmark = pytest.mark.sampled(4)

PROCESSORS = 132
# query rows and keys per tile at head dim 128, for Triton's and Gluon's kernels alike. STEP is the step of the backward
# kernels' inner loops
ROWS, KEYS, STEP = 128, 128, 64
# the fixed cost of a program, in tiles
FIXED = 2
# a pack of very uneven documents, 16K tokens per rank
LENGTHS = (70_000, 24_000, 9_000, 700, 12_000, 31, 3_000, 12_341)
ALL_MASKS = all_masks(32, LENGTHS) | {"sinks of one document": Mask.documents([131_072], (4095, 0), sink_tokens=4)}
KERNELS = ("forward", "dq", "dkdv")


def programs(runs: TileRuns, mask: LaunchMask, step: int, by_keys: bool) -> np.ndarray:
    """Return the number of tiles that each program visits, in launch order."""
    size = -(-(runs.run[:, 3] - runs.run[:, 0]) // step)
    place = np.repeat(np.arange(len(runs.first) - 1), np.diff(runs.first))
    work = np.bincount(place, size, len(runs.first) - 1).reshape(-1, runs.tiles)[runs.group]
    if by_keys:
        owner = (np.arange(mask.heads) + mask.first_head) // mask.group_size
        work, by_head = np.zeros((mask.kv_heads, runs.tiles)), work
        np.add.at(work, owner, by_head)
    return work[:, runs.order].T.ravel()


def makespan(work: np.ndarray) -> float:
    """Return when the last multiprocessor finishes, if each takes the next program as soon as it is free."""
    free = [0.0] * PROCESSORS
    for tiles in work:
        heapq.heapreplace(free, free[0] + tiles)
    return max(free)


def launches(plan, rank):
    """Yield (kernel, work of its programs) for all launches of a layer call."""
    program = lower(plan, rank, lambda mask: mask, None)
    for step in program.forward:
        for launch in step.launches:
            yield "forward", programs(tile_runs(launch.schedule, ROWS, KEYS), launch.schedule, KEYS, False)
    for step in program.backward:
        for launch in step.launches:
            mask = launch.schedule
            yield "dq", programs(tile_runs(mask, ROWS, STEP), mask, STEP, False)
            split = split_long_tiles(transposed_runs(mask, KEYS, STEP), mask, STEP, PROCESSORS)
            yield "dkdv", programs(split.runs, mask, STEP, True)


@pytest.mark.parametrize("strategy", ["ring", "allgather", "ulysses", "usp", "cad"])
@pytest.mark.parametrize("name", ALL_MASKS)
def test_processors_finish_together(name, strategy):
    laid_out = layouts(LENGTHS, 8)
    if name == "sinks of one document":
        laid_out = layouts((131_072,), 8)
    # the layouts cut the token axis differently: two chunks per rank, or eight chunks of equal work
    laid_out["chunks of equal work"] = Layout.balanced(laid_out["zigzag"].lengths, 8, chunk=2048)
    for layout in ("contiguous",) if strategy == "cad" else ("zigzag", "chunks of equal work"):
        shape = dict(heads=32, kv_heads=8, head_dim=128, dtype="bfloat16")
        try:
            plan = make_plan(ALL_MASKS[name], laid_out[layout], strategy=strategy, **shape)
        except DistattnError as refusal:
            pytest.skip(str(refusal))
        spans, means = dict.fromkeys(KERNELS, 0.0), dict.fromkeys(KERNELS, 0.0)
        for kernel, work in launches(plan, 1):
            work = work[work > 0] + FIXED
            spans[kernel] += makespan(work)
            means[kernel] += work.sum() / PROCESSORS
        for kernel in KERNELS:
            # a hundred tiles take a tenth of a millisecond. Below that, latencies dominate
            assert spans[kernel] <= 1.2 * means[kernel] or means[kernel] < 100, f"{kernel} on {layout}"


def test_gluons_forward_deals_tiles_out_where_that_is_even():
    for name, mask in ALL_MASKS.items():
        runs = tile_runs(LaunchMask.from_mask(mask, 4, 1), ROWS, KEYS)
        work = programs(runs, LaunchMask.from_mask(mask, 4, 1), KEYS, False)
        count = forward_programs(runs, KEYS, PROCESSORS)
        assert count in (PROCESSORS, len(work))
        rounds = [work[a : a + PROCESSORS] for a in range(0, len(work), PROCESSORS)]
        dealt = np.zeros(PROCESSORS)
        for i, part in enumerate(rounds):
            dealt[np.arange(len(part)) if i % 2 == 0 else PROCESSORS - 1 - np.arange(len(part))] += part
        is_even = dealt.max() <= 1.15 * work.sum() / PROCESSORS
        assert (count == PROCESSORS) == is_even, name
    few = tile_runs(LaunchMask.from_mask(Mask.causal(300), 4, 1), ROWS, KEYS)
    assert forward_programs(few, KEYS, PROCESSORS) == 12


def test_without_the_cut_sink_tokens_keep_one_processor_busy():
    mask = LaunchMask.from_mask(ALL_MASKS["sinks of one document"], 8, 1)
    runs = transposed_runs(mask, KEYS, STEP)
    whole = programs(runs, mask, STEP, True) + FIXED
    cut = programs(split_long_tiles(runs, mask, STEP, PROCESSORS).runs, mask, STEP, True) + FIXED
    assert makespan(whole) > 3.5 * whole.sum() / PROCESSORS
    assert makespan(cut) < 1.1 * cut.sum() / PROCESSORS
