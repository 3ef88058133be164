"""Attention on several GPUs over NCCL: correctness, bytes moved, speed, and how much communication overlaps with compute.

    python -m torch.distributed.run --standalone --nproc-per-node gpu benchmarks/check_cluster.py [--tokens 131072]

Every rank compares the outputs and gradients of all strategies with one call of the same kernel on the entire axis. Then
the slowest rank's median times are printed: a layer forward and backward, and a bare all-to-all with as many bytes as the
busiest strategy moves. The rate of the all-to-all gives the time that each strategy's moves alone would take. Without
GPUs the benchmark runs over gloo on a short axis (TRITON_INTERPRET=1) and only checks correctness.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from findings import Findings
from gpu_executor import Case, at_once, far, too_far
from harness import Cell, compare, joined, table
from torch import Tensor

import distattn as da
from distattn.parallel.make_plan import STRATEGIES
from distattn.parallel.runtime.communication.transport import Transport


def main() -> int:
    """Run the checks and timings. Return exit code 1 if any rank has a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--findings", type=Path, help="where rank 0 keeps them, as JSON lines")
    arguments = parser.parse_args()
    job = Job.join(arguments.tokens)
    findings = Findings(arguments.findings, speaks=job.rank == 0)
    contestants: dict[str, Callable[[], Callable[[], dict[str, Tensor]]]] = {}
    moved = {}
    for strategy in STRATEGIES:
        try:
            plan = job.case.plan(strategy)
        except da.DistattnError as refusal:
            findings.left_out(strategy, f"refused: {refusal}")
            continue
        contestants[strategy] = lambda plan=plan: layer(plan, job)
        moved[strategy] = int(plan.bytes()["bytes"].sum())
    if job.cuda and job.ranks > 1:
        contestants["bare all-to-all"] = lambda: bare(max(moved.values()) // job.ranks**2, job.ranks, job.device)
    backend = dist.get_backend()
    cells = compare(
        f"{job.case.mask.n:,} tokens, {job.ranks} ranks, {backend}",
        contestants,
        lambda result: check(result, job.wanted),
        repeats=9 if job.cuda else 1,
        progress=lambda line: findings.print_line(line) if job.cuda else None,
    )
    for cell in cells:
        cell.facts["bytes"] = moved.get(cell.contestant, max(moved.values(), default=0))
        wrong = "" if cell.status == "ok" else f"{cell.status}: {cell.note}"
        findings.check(f"{cell.contestant} on {job.ranks} ranks over {backend}", wrong)
    findings.print_line(table(cells, {"bytes": lambda value: f"{value / 1e6:.0f} MB"}))
    findings.print_line(exposure(cells))
    dist.destroy_process_group()
    return findings.ended()


class Job(NamedTuple):
    """A rank's part of the case, and the correct results for that part."""

    rank: int
    ranks: int
    device: torch.device
    case: Case
    local: dict[str, Tensor]
    wanted: dict[str, Tensor]

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @staticmethod
    def join(tokens: int) -> Job:
        """Join the launcher's process group. On a CPU, `tokens` is ignored and the axis is short."""
        rank, ranks, device = joined()
        cuda = device.type == "cuda"
        case = Case.of(tokens if cuda else 128, 128 if cuda else 32, ranks, device)
        local, wanted = (
            {name: case.layout.shard(part, rank) for name, part in whole.items()}
            for whole in (case.x, at_once(case.mask, case.x))
        )
        return Job(rank, ranks, device, case, local, wanted)


def layer(
    plan: da.Plan, job: Job, wrap: Callable[[Transport], Transport] = lambda transport: transport
) -> Callable[[], dict[str, Tensor]]:
    """Return a function that runs attention forward and backward on this rank's tokens.

    wrap: maps the transport of its messages to a replacement.
    """
    ready = da.prepare(plan, kernel="triton", device=job.device)
    ready.transport = wrap(ready.transport)
    q, k, v = (job.local[name].detach().clone().requires_grad_() for name in ("q", "k", "v"))

    def run() -> dict[str, Tensor]:
        o = da.attention(q, k, v, ready)
        dq, dk, dv = torch.autograd.grad(o, (q, k, v), job.local["do"])
        return {"o": o.detach(), "dq": dq, "dk": dk, "dv": dv}

    return run


def bare(share: int, ranks: int, device: torch.device) -> Callable[[], dict[str, Tensor]]:
    """Return a function that runs an all-to-all in which every rank sends `share` bytes to every other rank."""
    ours, theirs = (torch.empty(share * ranks, dtype=torch.uint8, device=device) for _ in range(2))

    def run() -> dict[str, Tensor]:
        dist.all_to_all_single(theirs, ours)
        return {}

    return run


def check(result: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """Return what is wrong with a result, or an empty string. A rank without tokens has nothing to compare."""
    return too_far({name: far(got, wanted[name]) for name, got in result.items() if got.numel()})


def exposure(cells: list[Cell]) -> str:
    """Return lines that compare each strategy's layer time with the time that its moves would take at the rate of the
    bare all-to-all."""
    bare_cell = next((cell for cell in cells if cell.contestant == "bare all-to-all" and cell.median), None)
    if bare_cell is None:
        return ""
    rate = bare_cell.facts["bytes"] / bare_cell.median
    lines = [f"  {cell.contestant}: moves alone would take {cell.facts['bytes'] / rate * 1e3:.1f} ms of "
             f"{cell.median * 1e3:.1f}" for cell in cells if cell is not bare_cell and cell.median]  # fmt: skip
    return "\n".join([f"  all-to-all: {rate / 1e9:.0f} GB/s over all ranks", *lines])


if __name__ == "__main__":
    sys.exit(main())
