"""Kernels of recurrent layers on one GPU: correctness first, then the time of every kind of task, side by side.

    python benchmarks/gpu_recurrence.py [--tokens 32768] [--heads 32] [--seconds 200] [--out benchmarks/results/gpu.jsonl]

Every op's kernels, `fla` (package fla-core) and our `triton_chunked` and `chunked`, are compared with the chunked
kernel in fp64: outputs, final states, (A, B) of segments and all gradients. Then a complete pass, a state pass, the
backward and the gradients' state pass are timed on one segment, in bf16 with dims of 128. State passes are the extra
work that plans for several ranks do. The exit code is 1 if an installed kernel is wrong. Without a GPU, small cases run
in fp32, without `fla`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from findings import Findings
from harness import Cell, Unsupported, compare, table, write

from distattn.ir.errors import DistattnError
from distattn.ir.op import OPS
from distattn.kernels.recurrence.trial import RecurrenceInputs, differences
from distattn.kernels.registry import OTHER_KERNELS, load_kernel
from distattn.kernels.spec import KernelRequirements

# the most common ops come first, because time may run out
NAMES = ("gated_delta_rule", "ssd", "kda", "gla", "delta_rule", "retention", "linear_attention")
KERNELS = tuple(reversed(OTHER_KERNELS["recurrence"]))
LENGTHS = (500, 1, 64, 300)
# shorter segments for the interpreter, still with several chunks of 64, both full and partial
INTERPRETED_LENGTHS = (130, 1, 64, 67)
# allowed error relative to fp64 (Frobenius norm)
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}


def main() -> int:
    """Run all checks, then measure all times. Return exit code 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="by default 32768 on a GPU")
    parser.add_argument("--heads", type=int, help="by default 32 on a GPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="what is not begun by then is left out, by name"
    )
    parser.add_argument("--findings", type=Path, help="where they are kept, as JSON lines")
    arguments = parser.parse_args()
    findings, ends = Findings(arguments.findings), time.monotonic() + arguments.seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, dim, tokens, heads = (
        (torch.bfloat16, 128, 32768, 32) if device.type == "cuda" else (torch.float32, 16, 256, 2)
    )
    tokens, heads = arguments.tokens or tokens, arguments.heads or heads
    faults: dict[tuple[str, str], str] = {}
    for name in NAMES:
        needed = KernelRequirements(dtype, dim, dim, device, op=OPS[name])
        faults |= {(kernel, name): fault_of(kernel, needed, findings) for kernel in KERNELS}
    for name in NAMES:
        if time.monotonic() > ends:
            findings.left_out(f"times of {name}", "no time was left")
            continue
        needed = KernelRequirements(dtype, dim, dim, device, op=OPS[name])
        cells = times(f"{name}, {tokens:,} tokens, {heads} heads", needed, tokens, heads, faults)
        findings.print_line(table(cells))
        for cell in cells:
            findings.time(
                cell.case, cell.contestant, f"{cell.status}: {cell.note}" * (cell.status != "ok"), cell.median
            )
        if arguments.out:
            write(arguments.out, cells)
    return findings.ended()


def fault_of(kernel: str, needed: KernelRequirements, findings: Findings) -> str:
    """Return what is wrong with a kernel's results for an op, or an empty string. A kernel that does not support the op
    is left out."""
    label = f"kernel {kernel}, {needed.op.name}"
    try:
        module = served(kernel, needed)
    except Unsupported as why_not:
        findings.left_out(label, str(why_not))
        return ""
    try:
        lengths = LENGTHS if needed.device.type == "cuda" else INTERPRETED_LENGTHS
        largest = max(differences(module, RecurrenceInputs.random(lengths, 4, 2, needed)), key=lambda x: (x != x, x))
        allowed = TOLERANCE[needed.dtype]
        wrong = "" if largest <= allowed else f"it is off by {largest:.1e} (allowed: {allowed:.0e})"
    except Exception as error:
        wrong = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    findings.check(label, wrong)
    findings.print_line(f"{label}: {wrong or 'right'}")
    return wrong


def served(kernel: str, needed: KernelRequirements) -> Any:
    """Return a kernel's module. Raise Unsupported if the kernel is not installed or does not meet the requirements
    `needed`."""
    try:
        module = load_kernel(kernel)
    except DistattnError as error:
        raise Unsupported(str(error)) from None
    if why_not := module.unsupported_reason(needed):
        raise Unsupported(why_not)
    return module


def times(
    case: str, needed: KernelRequirements, tokens: int, heads: int, faults: dict[tuple[str, str], str]
) -> list[Cell]:
    """Time every kind of task on one segment with every correct kernel. faults: why a (kernel, op) is wrong, or ""."""
    inputs = RecurrenceInputs.random((tokens,), heads, heads, needed)
    x, state, do, dstate = inputs[:4]
    tasks: dict[str, Callable[[Any, Any], Any]] = {
        "whole pass": lambda module, schedule: module.forward(x, schedule, state),
        "state pass": lambda module, schedule: module.states(x, schedule, state, True),
        "backward": lambda module, schedule: module.backward(x, schedule, state, do, dstate),
        "gradients' state pass": lambda module, schedule: module.gradient_states(x, schedule, do, dstate, True),
    }
    cells = []
    repeats = 5 if needed.device.type == "cuda" else 1
    for task, work in tasks.items():
        makers = {kernel: (lambda work=work, kernel=kernel: runner(work, kernel, inputs)) for kernel in KERNELS}
        cells += compare(f"{case}: {task}", makers, lambda kernel: faults[kernel, needed.op.name], repeats=repeats)
    return cells


def runner(work: Callable[[Any, Any], Any], kernel: str, inputs: RecurrenceInputs) -> Callable[[], str]:
    """Return a function that runs a task with a kernel, waits for the device, and returns the kernel's name."""
    module = served(kernel, inputs.requirements)
    schedule = inputs.schedule_of(module)

    def run() -> str:
        work(module, schedule)
        if inputs.requirements.device.type == "cuda":
            torch.cuda.synchronize()
        return kernel

    return run


if __name__ == "__main__":
    sys.exit(main())
