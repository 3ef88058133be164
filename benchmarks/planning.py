"""The cost of planning on one core: masks, plans and proofs for a long axis of packed documents.

    python benchmarks/planning.py [--tokens 1048576] [--documents 400 | --lengths FILE.json] [--ranks 64] [--causal]

Times are milliseconds on the host, the best of three. "lower" makes one rank's program (rank 0, kernel cpu), without
the proof. Nodes have 8 ranks if the number of ranks is a multiple of 8. Budgets at the defaults: plan 150, verify 600,
lower 100 ms; with 512 ranks 1,000, 4,000 and 200 ms.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import distattn as da
from distattn.ir.layout import LAYOUTS, make_layout
from distattn.kernels.registry import kernel_preparer
from distattn.ops.executable import kernel_requirements
from distattn.parallel.make_plan import STRATEGIES
from distattn.parallel.runtime.lowering.lower import lower

REPEATS = 3
CPU = torch.device("cpu")


def main() -> None:
    """Measure all strategies and layouts and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--lengths", type=Path, help="a JSON list of document lengths instead of synthetic ones")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--heads", type=int, nargs=2, default=(64, 8), metavar=("QUERY", "KEY_VALUE"))
    parser.add_argument("--causal", action="store_true", help="one causal mask over all documents")
    arguments = parser.parse_args()
    lengths = (
        json.loads(arguments.lengths.read_text())
        if arguments.lengths
        else synthetic(arguments.tokens, arguments.documents)
    )

    mask_ms, mask = best(lambda: da.Mask.causal(sum(lengths)) if arguments.causal else da.Mask.documents(lengths))
    spans = [(i * mask.n // 7, i * mask.n // 7 + mask.n // 20) for i in range(7)]
    area_ms, _ = best(mask.area)
    keys_ms, _ = best(lambda: mask.needed_keys(spans))
    tiles_ms, runs = best(lambda: mask.tiles(128, 128))
    documents = f"{len(lengths)} documents, the longest {max(lengths):,}"
    print_line(f"{mask.n:,} tokens, {documents}; {arguments.ranks} ranks; python {sys.version.split()[0]}")
    print_line(f"mask {mask_ms:.1f} ms, area {area_ms:.1f} ms, needed keys {keys_ms:.1f} ms")
    print_line(f"{len(runs['tile']):,} tile runs {tiles_ms:.1f} ms\n")
    times = "layout ms  plan ms  verify ms  lower ms"
    print_line(f"strategy    layout            {times}    tasks    moves  max/mean  moved GB  peak GB fwd/bwd")
    for strategy in STRATEGIES:
        for name in LAYOUTS:
            layout_ms, layout = best(lambda name=name: make_layout(name, lengths, arguments.ranks, mask))
            try:
                plan_ms, plan = best(
                    lambda layout=layout, strategy=strategy: planned(mask, layout, strategy, *arguments.heads)
                )
            except da.DistattnError as refusal:
                print_line(f"{strategy:11s} {name:16s} refused: {refusal}")
                continue
            verify_ms, proof = best(lambda plan=plan: da.verify(plan))
            lower_ms, _ = best(
                lambda plan=plan, proof=proof: lower(
                    plan, 0, kernel_preparer("cpu", kernel_requirements(plan.call, CPU)), proof
                )
            )
            area, tables = plan.area_by_rank(), plan.forward
            sizes = f"{len(tables.tasks['step']):8,d} {len(tables.moves['step']):8,d} {area.max() / area.mean():9.2f}"
            peaks = "/".join(f"{peak.max() / 1e9:.2f}" for peak in (proof.forward_peak, proof.backward_peak))
            print_line(
                f"{strategy:11s} {name:16s} {layout_ms:9.1f} {plan_ms:8.1f} {verify_ms:10.1f} {lower_ms:9.1f} {sizes}"
                f" {plan.bytes()['bytes'].sum() / 1e9:9.2f}  {peaks}"
            )


def planned(mask: da.Mask, layout: da.Layout, strategy: str, heads: int, kv_heads: int) -> da.Plan:
    """Return the plan of one attention call in bf16 with head dim 128."""
    cluster = da.Cluster(layout.ranks // 8, 8) if layout.ranks % 8 == 0 else None
    shape = dict(heads=heads, kv_heads=kv_heads, head_dim=128, dtype="bfloat16", cluster=cluster)
    return da.make_plan(mask, layout, strategy=strategy, **shape)


def synthetic(tokens: int, documents: int) -> list[int]:
    """Return log-normal document lengths that add up to `tokens`, drawn with a fixed seed."""
    raw = np.random.default_rng(0).lognormal(6.6, 1.6, documents)
    lengths = np.maximum(1, (raw * tokens / raw.sum()).astype(int))
    lengths[lengths.argmax()] += tokens - lengths.sum()
    return lengths.tolist()


def best(work: Callable[[], Any]) -> tuple[float, Any]:
    """Run `work` a few times. Return (milliseconds of the fastest run, result)."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        result = work()
        times.append((time.perf_counter() - began) * 1e3)
    return min(times), result


def print_line(line: str) -> None:
    """Print a line and flush stdout."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
