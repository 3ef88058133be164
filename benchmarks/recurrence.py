"""Measured ways to compute a Gated DeltaNet layer over ranks: states in turn, gathered or by heads, or tokens all-to-all.

    python benchmarks/recurrence.py [--tokens 8192] [--ranks 4] [--repeats 5] [--out benchmarks/results/recurrence.jsonl]

Forward and backward run on gloo ranks on one machine, in fp32 with 4 heads of 64 x 64 and our PyTorch kernel for all
contestants. Results are checked against one process before anything is timed. "fla's way" reimplements what
flash-linear-attention 0.6 does with contiguous slices: one all-gather of all ranks' states and transitions in each
pass, regardless of the documents. "all-to-all" is the method of Megatron's context parallelism, run by our executor. The
originals need GPUs; benchmarks/hybrid_layers.py simulates them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from harness import Cell, Contestant, compare, table, write
from process_guard import guard_processes
from torch import Tensor

import distattn as da
from distattn.ir.op import OPS
from distattn.ir.text_format import readable_bytes
from distattn.kernels.recurrence import chunked
from distattn.kernels.recurrence.tokens import RecurrenceTokens
from distattn.kernels.spec import KernelRequirements
from distattn.parallel.runtime.communication.transport import Transport

HEADS, DIM = 4, 64
NEEDED = KernelRequirements(torch.float32, DIM, DIM, torch.device("cpu"), op=OPS["gated_delta_rule"])
TOLERANCE = 2e-4


class RecurrencePlan(NamedTuple):
    """A way to split a recurrence: the layout of tokens, the strategy and its schedule."""

    layout: str
    strategy: str = "scan"
    schedule: str | None = None

    def plan(self, op: str, lengths: Sequence[int], ranks: int, x: RecurrenceTokens) -> da.Plan:
        """Return the plan for documents of the given lengths. x: the inputs, which determine heads, dims and dtype."""
        shape: dict[str, Any] = dict(
            heads=x.heads, kv_heads=x.q.shape[1], head_dim=x.q.shape[2], dtype=str(x.q.dtype)[6:]
        )
        options = {"schedule": self.schedule} if self.schedule else None
        layout = getattr(da.Layout, self.layout)(lengths, ranks)
        return da.make_plan(da.Mask.documents(lengths), layout, strategy=self.strategy, op=op, options=options, **shape)


WAYS = {
    "contiguous, in turn": RecurrencePlan("contiguous", schedule="sequential"),
    "contiguous, gathered": RecurrencePlan("contiguous", schedule="allgather_states"),
    "zigzag, gathered": RecurrencePlan("zigzag", schedule="allgather_states"),
    "zigzag, by heads": RecurrencePlan("zigzag", schedule="head_sharded"),
    "all-to-all": RecurrencePlan("zigzag", "ulysses"),
}


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append the cells to this file, as JSON lines")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (arguments, f"file://{folder}/store", sys.argv), nprocs=arguments.ranks)


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
        contestants = {name: contestant(way, "gated_delta_rule", lengths, x, do) for name, way in WAYS.items()}
        contestants["contiguous, fla's way"] = lambda lengths=lengths, x=x, do=do: gathered_by_all(lengths, x, do)
        print_line = (lambda line: sys.stderr.write(line + "\n")) if rank == 0 else (lambda line: None)
        named = f"{case}, {sum(lengths):,} tokens, {arguments.ranks} ranks"
        cells += compare(named, contestants, checker(lengths, x, do), repeats=arguments.repeats, progress=print_line)
    if rank == 0:
        sys.stdout.write(table(cells, {"plan_bytes": readable_bytes}) + "\n")
        if arguments.out:
            write(arguments.out, cells)
    dist.destroy_process_group()


def make_inputs(tokens: int) -> tuple[RecurrenceTokens, Tensor]:
    """Return ((q, k, v, g, beta), do) for the entire axis, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(tokens, HEADS, DIM, generator=generator) for _ in range(4))
    g, beta = -0.1 * torch.rand(tokens, HEADS, generator=generator), torch.rand(tokens, HEADS, generator=generator)
    return RecurrenceTokens(q * DIM**-0.5, F.normalize(k, dim=-1), v, g, beta), do


def checker(lengths: list[int], x: RecurrenceTokens, do: Tensor) -> Any:
    """Return a function that compares a rank's (tokens, o, dq, dk, dv, dg, dbeta) with those of one process."""
    ends = np.cumsum([0, *lengths]).tolist()
    segments = list(itertools.pairwise(ends))
    state = torch.zeros(len(lengths), HEADS, DIM, DIM)
    chunks = chunked.prepare(segments, NEEDED)
    o, _ = chunked.forward(x, chunks, state)
    dx, _ = chunked.backward(x, chunks, state, do, torch.zeros_like(state))
    wanted = {"o": o, **{f"d{name}": value for name, value in dx.by_token().items()}}

    def check(result: tuple[Tensor, ...]) -> str:
        tokens, *got = result
        for (name, right), mine in zip(wanted.items(), got, strict=True):
            error = float((mine - right[tokens]).abs().max() / right.abs().max())
            if not error < TOLERANCE:
                return f"{name} is off by {error:.1e}"
        return ""

    return check


def contestant(
    way: RecurrencePlan,
    op: str,
    lengths: Sequence[int],
    x: RecurrenceTokens,
    do: Tensor,
    wrap: Callable[[Transport], Transport] = lambda transport: transport,
) -> Contestant:
    """Return a contestant that computes this rank's part of an op that is split as `way` says. wrap: maps its transport
    to a replacement."""

    def make() -> Any:
        plan = way.plan(op, lengths, dist.get_world_size(), x)
        ready, rank, layout = da.prepare(plan, device=x.q.device), dist.get_rank(), plan.call.layout
        ready.transport = wrap(ready.transport)
        tokens = torch.from_numpy(layout.tokens(rank))
        local = {name: layout.shard(value, rank) for name, value in x.by_token().items()}
        do_local = layout.shard(do, rank)

        def run() -> tuple[Tensor, ...]:
            leaves = {name: value.detach().requires_grad_() for name, value in local.items()}
            q, k, v, g, beta = x._replace(**leaves)
            o = da.recurrence(q, k, v, ready, g=g, beta=beta, scale=1.0)
            return tokens, o.detach(), *torch.autograd.grad(o, list(leaves.values()), do_local)

        run.facts = {"plan_bytes": int(plan.bytes()["bytes"].sum())}  # type: ignore[attr-defined]
        return run

    return make


def gathered_by_all(lengths: list[int], x: RecurrenceTokens, do: Tensor) -> Any:
    """Return a function that computes the layer on contiguous slices the way fla does.

    Every rank gathers the states of all ranks and combines the states before its own slice.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layout = da.Layout.contiguous(lengths, ranks)
    mine = torch.from_numpy(layout.tokens(rank))
    begin, end = int(mine[0]), int(mine[-1]) + 1
    bounds = [0, *np.cumsum(lengths).tolist()]
    segments = [
        (max(a, begin) - begin, min(b, end) - begin) for a, b in itertools.pairwise(bounds) if a < end and b > begin
    ]
    # whether the first segment continues from the previous rank, and whether the last segment goes on to the next rank
    enters, leaves = begin not in bounds, end not in bounds
    local, do_local = x._replace(**{name: value[mine] for name, value in x.by_token().items()}), do[mine]
    nothing = torch.zeros(len(segments), HEADS, DIM, DIM)
    every, first_one, last_one = (chunked.prepare(some, NEEDED) for some in (segments, segments[:1], segments[-1:]))

    def gathered(state: Tensor, transition: Tensor, passes: bool) -> list[Tensor]:
        """Gather all ranks' (transition, state). passes: False if a document starts in the slice and resets the state."""
        own_state = torch.stack([transition if passes else torch.zeros_like(transition), state])
        states = [torch.empty_like(own_state) for _ in range(ranks)]
        dist.all_gather(states, own_state)
        return states

    def run() -> tuple[Tensor, ...]:
        # fla sends the transition of every slice
        last, transition = chunked.states(local, last_one, nothing[:1], True)
        whole = enters and leaves and len(segments) == 1
        states = gathered(last[0], transition[0], whole)
        state = nothing.clone()
        for of_slice in states[:rank] if enters else ():
            state[0] = of_slice[0] @ state[0] + of_slice[1]
        o, _ = chunked.forward(local, every, state)
        dstate = nothing.clone()
        first, transition = chunked.gradient_states(local, first_one, do_local, nothing[:1], True)
        states = gathered(first[0], transition[0].mT, whole)
        for of_slice in reversed(states[rank + 1 :]) if leaves else ():
            dstate[-1] = of_slice[0] @ dstate[-1] + of_slice[1]
        dx, _ = chunked.backward(local, every, state, do_local, dstate)
        return mine, o, *dx.by_token().values()

    run.facts = {"plan_bytes": 2 * 2 * 4 * HEADS * DIM * DIM * ranks * (ranks - 1)}  # type: ignore[attr-defined]
    return run


if __name__ == "__main__":
    guard_processes()
    main()
