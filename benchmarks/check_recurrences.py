"""Recurrent layers on several GPUs over NCCL: correctness on every rank, and speed compared with all-to-all and fla-core.

    python -m torch.distributed.run --standalone --nproc-per-node gpu benchmarks/check_recurrences.py [--tokens 32768]

The outputs and gradients of every op and schedule are compared, token by token, with fp64 in one process. On every rank
the error may be at most twice that of one device's kernel on the same tokens, or 2e-5. One device's own error may be at
most 2e-2 of the largest element in bfloat16, and 2e-5 in float32. Gradients of states are covered by tests: here
documents start from zero states. Then the slowest rank's median times, forward and backward, are measured in one run: our
schedules, an all-to-all of tokens, one device with the entire axis and, for the ops that it supports, fla-core's own
context parallelism (`fla.ops.cp`, contiguous and zigzag slices), which is left out if its results are wrong. Without GPUs
the benchmark runs over gloo on a short axis and only checks correctness.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from findings import Findings
from gpu_recurrence import NAMES
from harness import Contestant, compare, joined, slowest, table, write
from recurrence import RecurrencePlan, contestant
from torch import Tensor

import distattn as da
from distattn.ir.op import OPS
from distattn.ir.text_format import readable_bytes
from distattn.kernels.recurrence import chunked
from distattn.kernels.recurrence.tokens import RecurrenceTokens
from distattn.kernels.recurrence.trial import RecurrenceInputs
from distattn.kernels.spec import KernelRequirements
from distattn.parallel.runtime.communication.transport import Transport

WAYS = {
    "in turn": RecurrencePlan("contiguous", schedule="sequential"),
    "gathered": RecurrencePlan("zigzag", schedule="allgather_states"),
    "by heads": RecurrencePlan("zigzag", schedule="head_sharded"),
    "by halves": RecurrencePlan("zigzag", schedule="tree"),
    "all-to-all": RecurrencePlan("zigzag", "ulysses"),
}
# ops supported by fla-core's context parallelism, with their module and function
FLA = {
    "gated_delta_rule": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "kda": ("fla.ops.kda", "chunk_kda"),
}
SLICES_OF_FLA = {"fla": "contiguous", "fla, zigzag": "zigzag"}
# the relative error that is always allowed, suited to fp32, since one device's own error may be small by chance
LEAST_ALLOWED = 2e-5
# the limit for one device's own error, as a fraction of the largest element: ranks are compared with one device, so
# without this limit a kernel that is wrong on a long axis would pass
MOST_OF_ONE_DEVICE = {torch.bfloat16: 2e-2, torch.float32: 2e-5}
# the number of heads to compute in fp64 at a time
EXACT_HEADS = 4


def main() -> int:
    """Run the checks and timings. Return exit code 1 if any rank has a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="what is not begun by then is left out, by name"
    )
    parser.add_argument("--out", type=Path, help="append the cells to this file, as JSON lines")
    parser.add_argument("--findings", type=Path, help="where rank 0 keeps them, as JSON lines")
    arguments = parser.parse_args()
    began = time.monotonic()
    rank, ranks, device = joined()
    cuda = device.type == "cuda"
    findings = Findings(arguments.findings, speaks=rank == 0)
    # give all ranks pieces of the same length, because fla-core supports no others
    piece = 16 * 2 * ranks
    tokens, heads = (max(arguments.tokens // piece, 1) * piece, arguments.heads) if cuda else (128, 4)
    if without_fla := why_not_fla(device):
        findings.left_out("fla-core's own context parallelism", without_fla)
    packs = {"one document": [tokens], "nine documents": [tokens // 2, *[tokens // 16] * 8]}
    for op, (documents, lengths) in itertools.product(NAMES, packs.items()):
        if slowest(time.monotonic() - began) > arguments.seconds:
            findings.left_out(f"{op} of {documents}", "no time was left")
            continue
        case = Case.of(op, lengths, heads, device)
        named = f"{op}, {documents}, {tokens:,} tokens, {ranks} ranks, {dist.get_backend()}"
        cells = compare(named, case.contestants(not without_fla), case.check, repeats=9 if cuda else 1)
        for cell in cells:
            name, note = f"{cell.contestant} of {named}", f"{cell.status}: {cell.note}" * (cell.status != "ok")
            if note and cell.contestant in SLICES_OF_FLA:
                findings.left_out(name, note)
            else:
                findings.check(name, note)
            findings.time(named, cell.contestant, note, cell.median)
        findings.print_line(table(cells, {"plan_bytes": readable_bytes}))
        if arguments.out and rank == 0:
            write(arguments.out, cells)
    dist.destroy_process_group()
    return findings.ended()


class Case(NamedTuple):
    """An op on packed documents. Every rank holds the inputs, the exact results and one device's results for the entire
    axis."""

    op: str
    lengths: Sequence[int]
    inputs: RecurrenceInputs
    exact: tuple[Tensor, ...]
    one_device: Callable[[], tuple[Tensor, ...]]
    of_one_device: tuple[Tensor, ...]

    @staticmethod
    def of(op: str, lengths: Sequence[int], heads: int, device: torch.device) -> Case:
        """Return a case: on a GPU, bfloat16 with the head dim of most models; on a CPU, float32 with a small head dim."""
        dtype, dim = (torch.bfloat16, 128) if device.type == "cuda" else (torch.float32, 16)
        inputs = RecurrenceInputs.random(lengths, heads, heads, KernelRequirements(dtype, dim, dim, device, op=OPS[op]))
        # zero initial states, and decays so weak that a state matters for hundreds of tokens
        x = inputs.x if inputs.x.g is None else inputs.x._replace(g=inputs.x.g / 100)
        inputs = inputs._replace(x=x, state=torch.zeros_like(inputs.state), dstate=torch.zeros_like(inputs.dstate))
        kernel = da.prepare(
            RecurrencePlan("contiguous").plan(op, lengths, dist.get_world_size(), x), device=device
        ).kernel

        def one_device() -> tuple[Tensor, ...]:
            return torch.arange(len(x.v)), *computed(kernel, inputs)

        one_device.facts = {"plan_bytes": 0}  # type: ignore[attr-defined]
        return Case(op, lengths, inputs, in_fp64(inputs), one_device, one_device()[1:])

    def contestants(self, with_fla: bool) -> dict[str, Contestant]:
        """Return all contestants. Each returns its tokens, their outputs, and the gradients of its inputs."""
        ways: dict[str, Contestant] = {name: self.by(way) for name, way in WAYS.items()}
        if with_fla and self.op in FLA:
            ways |= {name: lambda slices=slices: of_fla(self, slices) for name, slices in SLICES_OF_FLA.items()}
        return ways | {"one device": lambda: self.one_device}

    def by(
        self, way: RecurrencePlan, wrap: Callable[[Transport], Transport] = lambda transport: transport
    ) -> Contestant:
        """Return the contestant that runs a plan. wrap: maps its transport to a replacement."""
        return contestant(way, self.op, self.lengths, self.inputs.x, self.inputs.do, wrap)

    def check(self, result: tuple[Tensor, ...]) -> str:
        """Return what is wrong with a rank's result, or an empty string."""
        tokens, *got = result
        names = ("o", *(f"d{name}" for name in self.inputs.x.by_token()))
        most = MOST_OF_ONE_DEVICE[self.inputs.x.v.dtype]
        for name, mine, alone_result, right in zip(names, got, self.of_one_device, self.exact, strict=True):
            alone = float((alone_result.double() - right).abs().max() / right.abs().max())
            # "not <=" also catches NaN
            if not alone <= most:
                return f"{name} of one device is off by {alone:.1e} of the largest number (allowed: {most:.0e})"
            error, allowed = far(mine, right[tokens]), max(2 * far(alone_result[tokens], right[tokens]), LEAST_ALLOWED)
            if not error <= allowed:
                return f"{name} is off by {error:.1e} (allowed: {allowed:.0e})"
        return ""


def in_fp64(inputs: RecurrenceInputs) -> tuple[Tensor, ...]:
    """Compute outputs and gradients with the chunked kernel in fp64, a few heads at a time."""
    parts = []
    for begin in range(0, inputs.x.heads, EXACT_HEADS):
        heads = slice(begin, begin + EXACT_HEADS)
        # decays shared by all tokens have only a head dimension
        some = {name: y[:, heads] if y.dim() > 1 else y[heads] for name, y in inputs.x.present().items()}
        x = RecurrenceTokens(**{name: y.double() for name, y in some.items()})
        state = inputs.state[:, heads].double()
        parts.append(
            computed(chunked, inputs._replace(x=x, state=state, do=inputs.do[:, heads].double(), dstate=state))
        )
    return tuple(torch.cat(parts_of_one, 1) for parts_of_one in zip(*parts, strict=True))


def computed(kernel: Any, inputs: RecurrenceInputs) -> tuple[Tensor, ...]:
    """Compute the outputs and the gradients of all per-token inputs with one call of a kernel on the entire axis."""
    x, state, do, dstate = inputs[:4]
    schedule = inputs.schedule_of(kernel)
    o, _ = kernel.forward(x, schedule, state)
    dx, _ = kernel.backward(x, schedule, state, do, dstate)
    return o, *dx.by_token().values()


def far(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def why_not_fla(device: torch.device) -> str:
    """Return why fla-core's own context parallelism cannot be measured here, or an empty string."""
    if find_spec("fla") is None or find_spec("fla.ops.cp") is None:
        return 'it is not installed: pip install "distattn[fla]"'
    return "" if device.type == "cuda" else "it runs on GPUs alone"


def of_fla(case: Case, layout: str) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that runs fla-core's own context parallelism through its public functions."""
    module, function = FLA[case.op]
    compute = getattr(import_module(module), function)
    x, device = case.inputs.x, case.inputs.do.device
    tokens = slices_of_fla(len(x.v), layout, dist.get_rank(), dist.get_world_size())
    ends = torch.tensor([0, *itertools.accumulate(case.lengths)])
    build = import_module("fla.ops.cp").build_cp_context
    context = build(ends.to(device), dist.group.WORLD, cu_seqlens_cpu=ends, layout=layout)
    local = {name: value[tokens] for name, value in x.by_token().items()}
    do_local = case.inputs.do[tokens][None]
    # in fla-core, each pass gathers the state and the transition of every piece, in fp32
    heads, key_dim, value_dim = case.inputs.state.shape[1:]
    pieces = dist.get_world_size() * (2 if layout == "zigzag" else 1)
    gathered = 4 * pieces * heads * key_dim * (key_dim + value_dim) * (dist.get_world_size() - 1)

    def run() -> tuple[Tensor, ...]:
        leaves = {name: value.detach().requires_grad_() for name, value in local.items()}
        o, _ = compute(**{name: leaf[None] for name, leaf in leaves.items()}, scale=1.0, cp_context=context)
        return tokens, o[0].detach(), *torch.autograd.grad(o, list(leaves.values()), do_local)

    run.facts = {"plan_bytes": 2 * gathered}  # type: ignore[attr-defined]
    return run


def slices_of_fla(tokens: int, layout: str, rank: int, ranks: int) -> Tensor:
    """Return a rank's tokens when fla-core slices the axis into pieces of equal length."""
    pieces = [rank] if layout == "contiguous" else [rank, 2 * ranks - 1 - rank]
    length = tokens // (ranks * len(pieces))
    return torch.cat([torch.arange(piece * length, (piece + 1) * length) for piece in pieces])


if __name__ == "__main__":
    sys.exit(main())
