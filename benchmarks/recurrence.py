"""Ways to compute a recurrent layer over ranks: states in turn, gathered, by heads, or tokens to all. Gated DeltaNet, one run.

    python benchmarks/recurrence.py [--tokens 8192] [--ranks 4] [--repeats 5] [--out benchmarks/results/recurrence.jsonl]
    python benchmarks/recurrence.py --simulate

Measured: forward and backward on gloo ranks of one machine, fp32, 4 heads of 64 x 64, our PyTorch kernel; results are checked
against one process before anything is timed. "contiguous, gathered" is what flash-linear-attention's context parallelism
does with contiguous slices, "all-to-all" what Megatron's does, both run by our executor; theirs need GPUs. Simulated:
32 heads of 128 x 128 in bf16 on H100 nodes, one document; kernel times of recurrences are estimates.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from harness import Cell, Contestant, compare, table, write
from torch import Tensor

import distattn as da
from distattn.cluster.spec import load
from distattn.kernels.recurrence import chunked
from distattn.kernels.recurrence.tokens import RecurrenceTokens
from distattn.parallel.analysis.columns import aligned, readable_bytes

HEADS, DIM = 4, 64
TOLERANCE = 2e-4
# name: layout, strategy, options
WAYS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "contiguous, in turn": ("contiguous", "scan", {"schedule": "in_turn"}),
    "contiguous, gathered": ("contiguous", "scan", {"schedule": "gathered"}),
    "zigzag, gathered": ("zigzag", "scan", {"schedule": "gathered"}),
    "zigzag, by heads": ("zigzag", "scan", {"schedule": "by_heads"}),
    "zigzag, auto": ("zigzag", "scan", None),
    "all-to-all": ("zigzag", "ulysses", None),
}


def main() -> None:
    """Spawn the ranks, or simulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--simulate", action="store_true", help="a table of simulated times in place of measured ones")
    parser.add_argument("--out", type=Path, help="append the cells to this file, as JSON lines")
    arguments = parser.parse_args()
    if arguments.simulate:
        sys.stdout.write(simulated() + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (arguments, f"file://{folder}/store", sys.argv), nprocs=arguments.ranks)


def simulated() -> str:
    """Milliseconds forward + backward of a layer."""
    rows = [["tokens, ranks", *WAYS]]
    for tokens, cluster in itertools.product((1 << 17, 1 << 18, 1 << 20), ("h100-1x8", "h100-2x8", "h100-8x8")):
        spec = load(cluster)
        row = [f"{tokens:,}, {spec.ranks}"]
        for name in WAYS:
            try:
                plan = _plan(name, [tokens], spec.ranks, heads=32, head_dim=128, dtype="bfloat16", cluster=spec)
                passes = da.simulate(plan, spec)
                row.append(f"{passes.forward.seconds * 1e3:.2f} + {passes.backward.seconds * 1e3:.2f}")
            except da.DistattnError:
                row.append("refused")
        rows.append(row)
    return "\n".join([*aligned(rows), "(ms forward + backward of one layer, simulated; kernel times estimated)"])


def _plan(name: str, lengths: list[int], ranks: int, **shape: Any) -> da.Plan:
    layout, strategy, options = WAYS[name]
    made = getattr(da.Layout, layout)(lengths, ranks)
    shape |= dict(kv_heads=shape["heads"], op="gated_delta_rule", options=options)
    return da.make_plan(da.Mask.documents(lengths), made, strategy=strategy, **shape)


def _rank(rank: int, arguments: argparse.Namespace, store: str, argv: list[str]) -> None:
    sys.argv = argv
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=arguments.ranks, timeout=timedelta(minutes=10)
    )
    cells: list[Cell] = []
    pack = [arguments.tokens // 2, *[arguments.tokens // 16] * 8]
    for case, lengths in {"one document": [arguments.tokens], "nine documents": pack}.items():
        x, do = make_inputs(sum(lengths))
        contestants = {name: contestant(name, lengths, x, do) for name in WAYS if name != "zigzag, auto"}
        say = (lambda line: sys.stderr.write(line + "\n")) if rank == 0 else (lambda line: None)
        named = f"{case}, {sum(lengths):,} tokens, {arguments.ranks} ranks"
        cells += compare(named, contestants, checker(lengths, x, do), repeats=arguments.repeats, progress=say)
    if rank == 0:
        sys.stdout.write(table(cells, {"plan_bytes": readable_bytes}) + "\n")
        if arguments.out:
            write(arguments.out, cells)
    dist.destroy_process_group()


def make_inputs(tokens: int) -> tuple[RecurrenceTokens, Tensor]:
    """q, k, v, g, beta and do of the whole axis; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(tokens, HEADS, DIM, generator=generator) for _ in range(4))
    g, beta = -0.1 * torch.rand(tokens, HEADS, generator=generator), torch.rand(tokens, HEADS, generator=generator)
    return RecurrenceTokens(q * DIM**-0.5, F.normalize(k, dim=-1), v, g, beta), do


def checker(lengths: list[int], x: RecurrenceTokens, do: Tensor) -> Any:
    """Compares a rank's (tokens, o, dq, dk, dv, dg, dbeta) with one process."""
    ends = np.cumsum([0, *lengths]).tolist()
    stretches = list(itertools.pairwise(ends))
    state = torch.zeros(len(lengths), HEADS, DIM, DIM)
    o, _ = chunked.forward(x, stretches, state)
    dx, _ = chunked.backward(x, stretches, state, do, torch.zeros_like(state))
    wanted = {"o": o, **{f"d{name}": value for name, value in dx.by_token().items()}}

    def check(result: tuple[Tensor, ...]) -> str:
        tokens, *got = result
        for (name, right), mine in zip(wanted.items(), got, strict=True):
            error = float((mine - right[tokens]).abs().max() / right.abs().max())
            if not error < TOLERANCE:
                return f"{name} is off by {error:.1e}"
        return ""

    return check


def contestant(name: str, lengths: list[int], x: RecurrenceTokens, do: Tensor) -> Contestant:
    """One way to compute it."""

    def make() -> Any:
        plan = _plan(name, lengths, dist.get_world_size(), heads=HEADS, head_dim=DIM, dtype="float32")
        ready, rank, layout = da.prepare(plan), dist.get_rank(), plan.call.layout
        tokens = torch.from_numpy(layout.tokens(rank))
        local = [layout.shard(value, rank) for value in x]
        do_local = layout.shard(do, rank)

        def run() -> tuple[Tensor, ...]:
            leaves = [value.detach().requires_grad_() for value in local]
            q, k, v, g, beta = leaves
            o = da.recurrence(q, k, v, ready, g=g, beta=beta, scale=1.0)
            return tokens, o.detach(), *torch.autograd.grad(o, leaves, do_local)

        run.facts = {"plan_bytes": int(plan.bytes()["bytes"].sum())}  # type: ignore[attr-defined]
        return run

    return make


if __name__ == "__main__":
    main()
