"""Pipeline stages that pool their attention against 1F1B without pooling, on packs of real document lengths. All simulated.

    python benchmarks/pipeline.py --lengths FILE.json [--stages 2 4 8 16] [--replicas 4] [--micro-batches 16] [--context 131072]

An 8B-like model (32 layers of width 4,096, 32:8 heads of 128, feed-forward 14,336), tensor-parallel 8 inside each node of h200;
every rank of the pool is one of its 8 indices. Everything but attention takes 2 (forward) or 4 (backward) operations a parameter
and token at the description's speed of products; attention is simulated with the plan of each tick; messages between stages
take no time.

Contestants: 1F1B, each replica for itself until the step's end; aligned ticks whose ranks keep their own attention; aligned
ticks with `cad` over all stages and replicas, none of its messages hidden ("pooled"), or hidden under everything else as far as
they fit ("ping-pong"). Lost ticks: more than the 2 * (micro-batches + stages - 1) of 1F1B.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from disaggregation import packs, print_line

import distattn as da
from distattn.cluster import spec as describe
from distattn.driver.pipeline_ticks import one_forward_one_backward, ticks

LAYERS, WIDTH, FEED, TENSOR = 32, 4096, 14336, 8
SHAPE = dict(heads=32 // TENSOR, kv_heads=8 // TENSOR, head_dim=128, dtype="bfloat16")
PARAMETERS = 2 * WIDTH * WIDTH + 2 * WIDTH * 1024 + 3 * WIDTH * FEED


def main() -> int:
    """One line for each number of stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--tolerance", type=float, default=0.02)
    given = parser.parse_args()
    known = np.array(json.loads(given.lengths.read_text()))
    print_line("simulated, seconds of one step of attention and everything else; 8 GPUs a rank of the pool")
    print_line(
        f"{'stages':>6s}{'ranks':>7s}{'ticks':>7s}{'lost':>6s}{'1F1B':>9s}{'aligned':>9s}{'pooled':>9s}{'ping-pong':>11s}"
    )
    for stages in given.stages:
        # of each replica its micro-batches
        found = list(packs(known, given.micro_batches, given.context, given.replicas, 0, False))
        one = describe.load("h200-1x1")
        layers = LAYERS // stages
        product = 2 * PARAMETERS * given.context / TENSOR / (one.device.gemm_tflops * 1e12)
        # seconds of each micro-batch on a stage: (replicas, micro-batches, forward or backward)
        alone = np.array([[kernels(pack) for pack in replica] for replica in found]) + product * np.array([1, 2])
        alone *= layers
        plain = max(one_forward_one_backward(stages, *replica.T.tolist()) for replica in alone)
        order = ticks(stages, given.micro_batches)
        aligned = pooled = hidden = 0.0
        cluster = describe.load(f"h200-{stages * given.replicas}x1")
        for tick in order:
            column = 0 if tick.direction == "forward" else 1
            numbers = [number for number in tick.micro_batches if number is not None]
            aligned += alone[:, numbers, column].max()
            documents = [
                [] if number is None else replica[number] for number in tick.micro_batches for replica in found
            ]
            seconds, kernels_only, messages = shared(documents, cluster, given.tolerance, tick.direction)
            others = product * (1 + column)
            pooled += layers * (others + seconds)
            hidden += layers * max(others + kernels_only, messages)
        lost = len(order) - 2 * (given.micro_batches + stages - 1)
        print_line(
            f"{stages:6d}{cluster.ranks:7d}{len(order):7d}{lost:6d}{plain:9.2f}{aligned:9.2f}{pooled:9.2f}{hidden:11.2f}"
        )
    return 0


def kernels(pack: list[int]) -> tuple[float, float]:
    """Seconds of one attention layer of a pack on one rank, forward and backward."""
    plan = da.make_plan(da.Mask.documents(pack), da.Layout.contiguous(pack, 1), strategy="allgather", **SHAPE)
    timeline = da.simulate(plan, "h200-1x1")
    return timeline.forward.seconds, timeline.backward.seconds


def shared(
    documents: list[list[int]], cluster: describe.ClusterSpec, tolerance: float, direction: str
) -> tuple[float, float, float]:
    """Seconds of one attention layer of all ranks' documents, shared out: as it is, kernels alone, messages alone."""
    lengths = [length for own in documents for length in own]
    ends = np.cumsum([0, *(sum(own) for own in documents)]).tolist()
    chunks = [[(a, b)] if a < b else [] for a, b in zip(ends, ends[1:], strict=False)]
    layout = da.Layout.from_chunks(lengths, chunks)
    # the topology alone: whether moving pays depends on what hides it
    how = dict(cluster=cluster.topology, options=dict(tolerance=tolerance))
    plan = da.make_plan(da.Mask.documents(lengths), layout, strategy="cad", **how, **SHAPE)
    one = getattr(da.simulate(plan, cluster), direction)
    return one.seconds, float(one.busy.max()), float((one.arrived - one.begin).sum(0).max())


if __name__ == "__main__":
    sys.exit(main())
