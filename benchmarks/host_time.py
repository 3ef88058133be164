"""Host time of the executor per rank and step, forward and backward, without kernels and moves.

    python benchmarks/host_time.py [--ranks 8] [--tokens 1024] [--heads 8] [--kv-heads 2] [--dim 64] [--strategies ulysses usp]

The design's budget is 150 microseconds per rank and step. Kernel and transport are stand-ins that return at once, and
the axis is short, so that compute and memory traffic hardly count. What remains is Python, and PyTorch's dispatch of
the views, copies and merges around kernels. With many heads, copies on a CPU still count: use fewer tokens and a small
dim.
"""

from __future__ import annotations

import argparse
import sys

import torch
from harness import Cell, compare, table
from torch import Tensor

import distattn as da
from distattn.kernels.spec import ScoreMod
from distattn.parallel.make_plan import STRATEGIES
from distattn.parallel.runtime.communication.transport import Packet
from distattn.parallel.runtime.execution import execute
from distattn.parallel.runtime.lowering.lower import lower
from distattn.parallel.runtime.program import Program

BUDGET = 150


class InstantKernel:
    """A kernel that returns uninitialized results of the right shape at once."""

    ACCUMULATES = False

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, work: object, score: ScoreMod) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape[:2], dtype=torch.float32)

    @staticmethod
    def backward(do, q, k, v, lse, delta, work, score):  # noqa: ANN001, ANN205
        return tuple(x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v))


class Nowhere:
    """A transport that delivers nothing."""

    def exchange(self, sends: list[Packet], receives: list[Packet], collective: bool, where: str = "") -> Nowhere:
        return self

    def wait(self) -> None:
        return None


def main() -> None:
    """Measure every strategy and mask. Each timed call runs all forward and backward steps of one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    arguments = parser.parse_args()
    # with several threads, copies of a few rows would wait for threads on busy cores
    torch.set_num_threads(1)
    shape = dict(heads=arguments.heads, kv_heads=arguments.kv_heads, head_dim=arguments.dim, dtype="bfloat16")
    lengths = [arguments.tokens // 32] * 32
    masks = {"causal": da.Mask.causal(arguments.tokens), "32 documents": da.Mask.documents(lengths)}
    cells: list[Cell] = []
    for name, mask in masks.items():
        layout = da.Layout.zigzag(lengths, arguments.ranks)
        contestants = {}
        for strategy in arguments.strategies:
            plan = da.make_plan(mask, layout, strategy=strategy, **shape)
            program = lower(plan, 1, lambda *_: None)
            contestants[strategy] = lambda program=program: layer(program)
        case = f"{name}, {arguments.ranks} ranks: microseconds per step; the budget is {BUDGET}"
        cells += compare(case, contestants, lambda result: "", repeats=15, warmup=3)
    steps = {"us_per_step": lambda value: f"{value:.0f} us/step"}
    for cell in cells:
        cell.facts["us_per_step"] = (cell.median or 0) * 1e6 / max(cell.facts["steps"], 1)
    sys.stdout.write(table(cells, steps) + "\n")


def layer(program: Program):  # noqa: ANN201
    """Return a function that runs one rank's forward and backward steps of a layer."""
    call = program.call
    q, do = (torch.empty(program.tokens, call.heads, call.head_dim, dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.empty(program.tokens, call.kv_heads, call.head_dim, dtype=torch.bfloat16) for _ in range(2))
    lse, delta = (torch.empty(program.tokens, call.heads) for _ in range(2))

    def run() -> None:
        *_, kept = execute.run_to_completion(execute.forward(program, Nowhere(), InstantKernel, q, k, v, ScoreMod(1.0)))
        inputs = (do, q, k, v, lse, delta, kept, ScoreMod(1.0))
        execute.run_to_completion(execute.backward(program, Nowhere(), InstantKernel, *inputs))

    run.facts = {"steps": len(program.forward) + len(program.backward)}
    return run


if __name__ == "__main__":
    main()
