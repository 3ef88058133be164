"""Core-attention disaggregation and its rivals, on packs of real document lengths. All times are simulated, except planning.

    python benchmarks/disaggregation.py --lengths FILE.json [--servers 8 64] [--context 131072] [--scale 1 8] [--grouped]
        [--heads 32:8 64:16] [--tensor-parallel 8] [--inner causal] [--batches 3] [--hypergraph] [--out FILE.jsonl]

FILE is a JSON list of document lengths. Every server (a rank of the pool) gets a pack of --context tokens: documents
drawn at random, --scale times as long, cut when the pack is full. The contestants: attention on the rank that has the
pack ("plain"); `cad` and `cad_greedy` on the same packs; `cad` on the same documents in the layout `placed`;
per-document context parallelism (`document_zigzag` ring); and allgather in chunks of equal work (`balanced` with eight
chunks per rank).

--grouped: sort the packs of all batches by work first, so that the ranks of a step have packs as equal as possible, for
all contestants. --tensor-parallel T: divide heads by T; nodes then have 8 / T ranks of the pool. --inner: causal,
window (4,096 keys), shared_question or causal_blockwise (each pack is one group). --hypergraph: also run mtkahypar (pip
install mtkahypar). --wire: the dtype in which outputs and gradients are sent.

cells, cost: max/mean of cells x heads, and of the kernels' time for them, for the worse of forward and backward and the
worst batch. GB is the sum of the move tables, forward and backward. forward and backward ms are simulated for one
attention call on h200 nodes; plan ms is measured on this machine, best of 3. All but cells and cost are means over the
batches.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypergraph import partitioned

import distattn as da
from distattn.cluster import spec as describe
from distattn.cluster.spec import ClusterSpec
from distattn.ir.bands import K0, K1, OK, OQ, Q0, Q1
from distattn.ir.layout import make_layout
from distattn.parallel.analysis.quality import quality

# maximum pairs of chunks: a whole-pool strategy with more is left out
MOST_PAIRS = 3_000_000
COLUMNS = ("contestant", "cells", "cost", "GB", "GB across", "GB busiest", "plan ms", "forward ms", "backward ms")


def main() -> int:
    """Print one table per setting. Return exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--servers", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[131072])
    parser.add_argument("--scale", type=int, nargs="+", default=[1])
    parser.add_argument("--heads", nargs="+", default=["32:8"])
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument(
        "--inner", choices=("causal", "window", "shared_question", "causal_blockwise"), default="causal"
    )
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wire", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--grouped", action="store_true")
    parser.add_argument("--hypergraph", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    all_lengths = np.array(json.loads(arguments.lengths.read_text()))
    for servers, context, scale, heads in (
        (s, c, x, h)
        for s in arguments.servers
        for c in arguments.context
        for x in arguments.scale
        for h in arguments.heads
    ):
        query, key = (int(part) // arguments.tensor_parallel for part in heads.split(":"))
        per_node = min(max(8 // arguments.tensor_parallel, 1), servers)
        cluster = describe.load(f"h200-{servers // per_node}x{per_node}")
        shape = dict(
            heads=query, kv_heads=key, head_dim=128, dtype="bfloat16", comm_dtype=arguments.wire, cluster=cluster
        )
        print_line(
            f"\n{servers} servers x {context:,} tokens, lengths x{scale}, {query}:{key} heads, {arguments.inner}"
            f"{', packs grouped by work' * arguments.grouped}, {arguments.wire} wire; simulated on {cluster.name}"
        )
        print_line(f"{COLUMNS[0]:24s}" + "".join(f"{name:>12s}" for name in COLUMNS[1:]))
        batches = list(
            packs(all_lengths * scale, servers, context, arguments.batches, arguments.seed, arguments.grouped)
        )
        for name, make in contestants(arguments.inner, arguments.tolerance, arguments.hypergraph).items():
            rows = [row for batch in batches if (row := measured(make, batch, shape, cluster))]
            if not rows:
                print_line(f"{name:24s} left out: more than {MOST_PAIRS:,} pairs of chunks, or not this mask")
                continue
            means = {
                key: float(max(r[key] for r in rows) if key in ("cells", "cost") else np.mean([r[key] for r in rows]))
                for key in rows[0]
            }
            print_line(f"{name:24s}" + "".join(f"{means[key]:12.3f}" for key in COLUMNS[1:]))
            if arguments.out:
                setting = dict(
                    servers=servers,
                    context=context,
                    scale=scale,
                    heads=[query, key],
                    inner=arguments.inner,
                    grouped=arguments.grouped,
                    comm_dtype=arguments.wire,
                )
                with open(arguments.out, "a", encoding="utf-8") as file:
                    file.write(
                        json.dumps({"simulated_on": cluster.name, **setting, "contestant": name, **means}) + "\n"
                    )
    return 0


def packs(
    lengths: np.ndarray, servers: int, context: int, batches: int, seed: int, grouped: bool
) -> Iterator[list[list[int]]]:
    """Yield batches: for each server, a pack as a list of document lengths."""
    generator = np.random.default_rng(seed)
    all_packs = []
    for _ in range(servers * batches):
        pack: list[int] = []
        while sum(pack) < context:
            pack.append(min(int(generator.choice(lengths)), context - sum(pack)))
        all_packs.append(pack)
    if grouped:
        all_packs.sort(key=lambda pack: sum(length * length for length in pack))
    for first in range(0, len(all_packs), servers):
        yield all_packs[first : first + servers]


def contestants(inner: str, tolerance: float, hypergraph: bool) -> dict[str, Callable[..., da.Plan | None]]:
    """Return, by name, functions from packs and shape to a plan, or to None if it would be too large or is impossible."""

    def as_they_came(strategy: str, **options: Any) -> Callable[..., da.Plan]:
        def make(batch: list[list[int]], shape: dict[str, Any]) -> da.Plan:
            mask, lengths = mask_of(batch, inner)
            layout = da.Layout.contiguous(lengths, len(batch))
            return da.make_plan(mask, layout, strategy=strategy, options=options or None, **shape)

        return make

    def laid_out(name: str, strategy: str, **options: Any) -> Callable[..., da.Plan | None]:
        def make(batch: list[list[int]], shape: dict[str, Any]) -> da.Plan | None:
            mask, lengths = mask_of(batch, inner)
            if (
                strategy == "ring"
                and sum((min(2 * len(batch), length // 512) or 1) ** 2 for length in lengths) > MOST_PAIRS
            ):
                return None
            # eight chunks of equal work per rank; without `chunk`, balanced would take the cheapest of several layouts
            chunk = {"chunk": -(-sum(lengths) // (8 * len(batch)))} if name == "balanced" else {}
            layout = make_layout(name, lengths, len(batch), mask, **chunk)
            return da.make_plan(mask, layout, strategy=strategy, options=options or None, **shape)

        return make

    makers: dict[str, Callable[..., da.Plan | None]] = {
        "plain": as_they_came("allgather"),
        "cad_greedy 0.10": as_they_came("cad_greedy"),
        "cad_greedy 0": as_they_came("cad_greedy", tolerance=0.0),
        f"cad {tolerance}": as_they_came("cad", tolerance=tolerance),
        f"placed, cad {tolerance}": laid_out("placed", "cad", tolerance=tolerance),
        "document_zigzag ring": laid_out("document_zigzag", "ring"),
        "balanced allgather": laid_out("balanced", "allgather"),
    }
    if inner != "causal":
        # cad_greedy only supports causal documents
        makers = {name: make for name, make in makers.items() if "greedy" not in name}
    if hypergraph:
        makers["mtkahypar 0.02"] = lambda batch, shape: partitioned(*mask_of(batch, inner), len(batch), shape, 0.02)
    return makers


def mask_of(batch: list[list[int]], inner: str) -> tuple[da.Mask, list[int]]:
    """Return (mask, document lengths) for all packs, concatenated."""
    lengths = [length for pack in batch for length in pack]
    if inner in ("causal", "window"):
        return da.Mask.documents(lengths, "causal" if inner == "causal" else (4095, 0)), lengths
    pieces, at = [], 0
    for pack in batch:
        pack_pieces = getattr(da.Mask, inner)(pack).pieces.copy()
        pack_pieces[:, [Q0, Q1, K0, K1, OQ, OK]] += at
        pieces.append(pack_pieces)
        at += sum(pack)
    return da.Mask(np.concatenate(pieces), at), lengths


def measured(
    make: Callable[..., da.Plan | None], batch: list[list[int]], shape: dict[str, Any], cluster: ClusterSpec
) -> dict[str, float] | None:
    """Make one plan and return its figures by column name, or None if there is no plan."""
    times, plan = [], None
    for _ in range(3):
        began = time.perf_counter()
        plan = make(batch, shape)
        times.append(time.perf_counter() - began)
        if plan is None:
            return None
        if times[-1] > 3:
            break
    assert plan is not None
    passes = quality(plan, cluster)
    timeline = da.simulate(plan, cluster)
    moved = plan.bytes()
    out = np.bincount(moved["src"], moved["bytes"], cluster.ranks)
    return {
        "cells": max(stats.cells_imbalance for stats in passes.values()),
        "cost": max(stats.cost_imbalance for stats in passes.values()),
        "GB": float(out.sum()) / 1e9,
        "GB across": sum(stats.inter_node_bytes for stats in passes.values()) / 1e9,
        "GB busiest": float(out.max()) / 1e9,
        "GB at least": sum(stats.lower_bound_bytes for stats in passes.values()) / 1e9,
        "plan ms": min(times) * 1e3,
        "forward ms": timeline.forward.seconds * 1e3,
        "backward ms": timeline.backward.seconds * 1e3,
    }


def print_line(line: str) -> None:
    """Print a line and flush stdout."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
