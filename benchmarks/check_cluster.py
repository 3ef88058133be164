"""Several GPUs over NCCL: is attention right there, what moves, how fast, and how much of it hides under compute?

    python -m torch.distributed.run --standalone --nproc-per-node gpu benchmarks/check_cluster.py [--tokens 131072]

On every rank all strategies are compared, outputs and gradients, with the same kernel on the whole axis at once. Then, medians
of the slowest rank: a layer forward and backward, and a bare all-to-all of as many bytes as the busiest strategy moves; from
its rate follows how long each strategy's moves would take alone. Without GPUs it runs on gloo (TRITON_INTERPRET=1), on a
short axis, for the parity alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from gpu_executor import HEADS, KV_HEADS, TOLERANCE, at_once, far, random_tensors
from harness import Cell, compare, table
from torch import Tensor

import distattn as da
from distattn.parallel.make_plan import STRATEGIES


def main() -> int:
    """Exit code 1 where any rank has a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    tokens, dim, dtype = (arguments.tokens, 128, torch.bfloat16) if cuda else (128, 32, torch.float16)
    lengths = [tokens // 2, tokens // 4, tokens // 8, tokens // 8]
    mask, layout = da.Mask.documents(lengths), da.Layout.zigzag(lengths, ranks)
    x = random_tensors(tokens, dim, dtype, device)
    wanted = {name: layout.shard(part, rank) for name, part in at_once(mask, x).items()}
    local = {name: layout.shard(part, rank) for name, part in x.items()}
    contestants: dict[str, Callable[[], Callable[[], dict[str, Tensor]]]] = {}
    moved = {}
    for strategy in STRATEGIES:
        shape = dict(heads=HEADS, kv_heads=KV_HEADS, head_dim=dim, dtype=str(dtype)[6:])
        try:
            plan = da.make_plan(mask, layout, strategy=strategy, **shape)
        except da.DistattnError as refusal:
            say(rank, f"{strategy}: refused: {refusal}")
            continue
        contestants[strategy] = lambda plan=plan: layer(plan, local, device)
        bytes_of = plan.bytes()
        moved[strategy] = int(bytes_of["bytes"].sum())
    if cuda and ranks > 1:
        contestants["bare all-to-all"] = lambda: bare(max(moved.values()) // ranks**2, ranks, device)
    cells = compare(
        f"{tokens:,} tokens, {ranks} ranks, {dist.get_backend()}",
        contestants,
        lambda result: check(result, wanted),
        repeats=9 if cuda else 1,
        progress=lambda line: say(rank, line) if cuda else None,
    )
    for cell in cells:
        cell.facts["bytes"] = moved.get(cell.contestant, max(moved.values(), default=0))
    shown = {"bytes": lambda value: f"{value / 1e6:.0f} MB"}
    say(rank, table(cells, shown))
    say(rank, exposure(cells))
    dist.destroy_process_group()
    return int(any(cell.status != "ok" for cell in cells))


def layer(plan: da.Plan, local: dict[str, Tensor], device: torch.device) -> Callable[[], dict[str, Tensor]]:
    """Attention forward and backward of this rank's tokens."""
    ready = da.prepare(plan, kernel="triton", device=device)
    q, k, v = (local[name].detach().clone().requires_grad_() for name in ("q", "k", "v"))

    def run() -> dict[str, Tensor]:
        o = da.attention(q, k, v, ready)
        dq, dk, dv = torch.autograd.grad(o, (q, k, v), local["do"])
        return {"o": o.detach(), "dq": dq, "dk": dk, "dv": dv}

    return run


def bare(share: int, ranks: int, device: torch.device) -> Callable[[], dict[str, Tensor]]:
    """An all-to-all in which every rank sends `share` bytes to every other."""
    ours, theirs = (torch.empty(share * ranks, dtype=torch.uint8, device=device) for _ in range(2))

    def run() -> dict[str, Tensor]:
        dist.all_to_all_single(theirs, ours)
        return {}

    return run


def check(result: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """What is wrong with a result, or nothing. (A rank without tokens has nothing to compare.)"""
    for name, got in result.items():
        if got.numel() and not far(got, wanted[name]) <= TOLERANCE:
            return f"{name} is off by {far(got, wanted[name]):.1e} (allowed: {TOLERANCE:.0e})"
    return ""


def exposure(cells: list[Cell]) -> str:
    """How each strategy's layer compares with bare moves of the same bytes at the bare all-to-all's rate."""
    bare_cell = next((cell for cell in cells if cell.contestant == "bare all-to-all" and cell.median), None)
    if bare_cell is None:
        return ""
    rate = bare_cell.facts["bytes"] / bare_cell.median
    lines = [f"  {cell.contestant}: moves alone would take {cell.facts['bytes'] / rate * 1e3:.1f} ms of "
             f"{cell.median * 1e3:.1f}" for cell in cells if cell is not bare_cell and cell.median]  # fmt: skip
    return "\n".join([f"  all-to-all: {rate / 1e9:.0f} GB/s over all ranks", *lines])


def say(rank: int, text: str) -> None:
    if rank == 0 and text:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
