"""Checks of the attention kernels on a GPU: correct results, no out-of-bounds access, bitwise reproducibility.

    python benchmarks/gpu_checks.py [--tiers triton gluon gluon_split flash] [--seconds 200]

Forward and backward results, also merged into existing contents, are compared with the reference kernel in fp64: for
masks of every kind and all head dims, with and without score modifiers. Every operand and result is placed between
guards in a larger block of memory: NaN around inputs, a pattern around results. A kernel that reads out of bounds then
returns NaN, and one that writes out of bounds changes the pattern. If compute-sanitizer is installed, it runs the same
calls. Each call is made twice and compared bitwise (except dQ of "gluon" and "flash", whose sums have no fixed order),
and the host time per launch is printed. The row operations around kernels (copy, add, merge) are compared with the
CPU's. The exit code is 1 if anything is wrong. Without a GPU (TRITON_INTERPRET=1) only kernels that the interpreter
supports run, with fewer cases.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from findings import Findings
from process_guard import guard_processes
from torch import Tensor

import distattn as da
from distattn.kernels import glue, reference
from distattn.kernels.flash import attention as flash_attention
from distattn.kernels.glue import RowSelection
from distattn.kernels.gluon import attention as gluon_attention
from distattn.kernels.gluon import split as gluon_split
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.spec import KernelRequirements, ScoreMod
from distattn.kernels.triton import attention as triton_attention
from distattn.kernels.triton.launch import schedule_to_device

TIERS = {"triton": triton_attention, "gluon": gluon_attention, "gluon_split": gluon_split, "flash": flash_attention}
# tiers that sum dQ in no particular order
LOOSE = ("gluon", "flash")
HEADS, KV_HEADS = 4, 2
# head dims, and whether scores have softcap and ALiBi; the most common come first, because time may run out
SHAPES = [((128, 128), False), ((64, 64), False), ((192, 128), False), ((128, 128), True)]
SHAPES += [((dim, dim), False) for dim in (256, 96, 80, 192)]
# allowed error relative to fp64 (Frobenius norm)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 3e-3}
GUARD = 1 << 14
PATTERN = 12345.0
LAUNCHES = 200
SANITIZER_SECONDS = 120
# compute-sanitizer is not run if less time than this is left
LEAST_SECONDS = 15


def main() -> int:
    """Run all checks and print one line for each. Return exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only-run", action="store_true", help="a few calls, for a memory checker around them")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS))
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="what is not begun by then is left out, by name"
    )
    parser.add_argument("--findings", type=Path, help="where they are kept, as JSON lines")
    arguments = parser.parse_args()
    findings, ends = Findings(arguments.findings), time.monotonic() + arguments.seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # under compute-sanitizer every call takes a hundred times as long
    shapes = SHAPES if not arguments.only_run else [((64, 64), False), ((128, 128), True)]
    complaints, ran = [], []
    for dims, modifiers in shapes if device.type == "cuda" else [((32, 32), True)]:
        for name in arguments.tiers:
            label = f"{name} {dims}{' softcap alibi' * modifiers}"
            call = call_of(name, dims, modifiers, device)
            if why_not := call.tier.unsupported_reason(KernelRequirements(call.dtype, *dims, device)):
                findings.left_out(label, why_not)
            elif time.monotonic() > ends:
                findings.left_out(label, "no time was left")
            else:
                complaints += checked(label, call, findings, arguments.only_run)
                ran.append(name)
    # row operations do not depend on the tier: check them only once if each tier is checked by a separate program
    if next(iter(TIERS)) in arguments.tiers:
        differences = glue_differences(device)
        findings.check("rows around kernels", "; ".join(differences))
        complaints += differences
    if ran and not arguments.only_run and device.type == "cuda":
        complaints += sanitized(sorted(set(ran)), min(SANITIZER_SECONDS, ends - time.monotonic()), findings)
    findings.print_line("\n".join(complaints) or "guards whole, results the same bits every time" * bool(ran))
    return findings.ended()


def checked(label: str, call: Call, findings: Findings, only_run: bool) -> list[str]:
    """Check all masks with a tier and shape. Return a list of the faults found."""
    began, complaints = time.perf_counter(), []
    chosen = dict(list(masks(call.device).items())[:2]) if only_run else masks(call.device)
    for name, mask in chosen.items():
        try:
            problems = check(call, mask)
        except Exception as error:
            problems = [f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"]
        findings.check(f"{label} {name}", "; ".join(problems))
        complaints += [f"{label} {name}: {text}" for text in problems]
        if call.device.type == "cuda":
            # a compiler error only affects one call, but a lost device ends the program here
            torch.cuda.synchronize()
    host = ""
    if not (only_run or call.modifiers or complaints):
        host = f", {host_time(call):.0f} us of host time per forward launch"
    findings.print_line(f"{label}: {time.perf_counter() - began:.0f} s{host}")
    return complaints


class Call(NamedTuple):
    """A kernel and the kind of call to make. loose: True if the kernel sums dQ in no particular order."""

    tier: ModuleType
    loose: bool
    dims: tuple[int, int]
    modifiers: bool
    dtype: torch.dtype
    device: torch.device

    def work(self, mask: da.Mask) -> Any:
        """Return the kernel's schedule for a mask, on the device."""
        cells = LaunchMask.from_mask(mask, HEADS, KV_HEADS)
        return schedule_to_device(
            self.tier.prepare(cells, KernelRequirements(self.dtype, *self.dims, self.device)), self.device
        )


def call_of(name: str, dims: tuple[int, int], modifiers: bool, device: torch.device) -> Call:
    """Return a call of the tier `name`: in bfloat16 on a GPU, in float16 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    return Call(TIERS[name], name in LOOSE, dims, modifiers, dtype, device)


def masks(device: torch.device) -> dict[str, da.Mask]:
    """Return small masks, keyed by name, with lengths that are not multiples of a tile."""
    n = 1037 if device.type == "cuda" else 77
    third = n // 3
    some = {
        "causal": da.Mask.causal(n),
        "documents": da.Mask.documents([n // 2, third, n - n // 2 - third]),
        "window": da.Mask.sliding_window(n, n // 5, n // 7),
        "one token": da.Mask.causal(1),
    }
    if device.type == "cpu":
        return some
    return some | {
        "full": da.Mask.full(n),
        "block-causal": da.Mask.block_causal(n, 100),
        "prefix": da.Mask.prefix_lm(n, third),
        "shared question": da.Mask.shared_question([third, 200, 300, n - third - 500]),
        "global window": da.Mask.global_sliding_window(n, 100, 50, 7),
        "short documents": da.Mask.documents([17] * 61),
        "rows without keys": da.Mask.from_pieces([[20, 600, 0, 300, -n, n]], n=n),
    }


def check(call: Call, mask: da.Mask) -> list[str]:
    """Return the faults found in one call, forward and backward, whose results are added to zeros, then to themselves."""
    torch.manual_seed(0)
    (dim, v_dim), device = call.dims, call.device
    work = call.work(mask)
    slopes = torch.linspace(0.02, 0.5, HEADS, device=device) if call.modifiers else None
    score = ScoreMod(dim**-0.5, 2.0 if call.modifiers else 0.0, slopes)
    shapes = {"q": (HEADS, dim), "k": (KV_HEADS, dim), "v": (KV_HEADS, v_dim), "do": (HEADS, v_dim)}
    q, k, v, do = (guarded((mask.n, *shape), call.dtype, device, torch.nan) for shape in shapes.values())

    def forward(x: dict[str, Tensor]) -> None:
        call.tier.forward(q, k, v, work, score, into=(x["o"], x["lse"]), merge=True)

    def backward(x: dict[str, Tensor], lse: Tensor, delta: Tensor) -> None:
        into = x["dq"], (x["dk"], x["dv"])
        call.tier.backward(do, q, k, v, lse, delta, work, score, into=into, add=(True, True))

    results = []
    for _ in range(2):
        o, dq, dk, dv = (
            guarded((mask.n, *shapes[name]), torch.float32, device, PATTERN).zero_() for name in ("do", "q", "k", "v")
        )
        lse, delta = (guarded((mask.n, HEADS), torch.float32, device, PATTERN) for _ in range(2))
        results.append({"o": o, "lse": lse.fill_(-torch.inf), "dq": dq, "dk": dk, "dv": dv})
        forward(results[-1])
        delta.copy_((do.float() * o).sum(-1))
        backward(results[-1], lse, delta)
    first, second = results
    wanted = by_reference(mask, (q, k, v, do), score)
    complaints = [text for key, x in first.items() if (text := difference(key, x, wanted[key], call.dtype))]
    fixed = [key for key in first if key != "dq" or not call.loose]
    complaints += [f"{key} differs in bits" for key in fixed if not torch.equal(first[key], second[key])]
    # add a second time, because a kernel that overwrites instead of adding gives correct results on zeros
    backward(second, first["lse"], delta)
    forward(second)
    doubled = {key: {"o": x, "lse": x + math.log(2)}.get(key, 2 * x) for key, x in wanted.items()}
    problems = [text for key, x in second.items() if (text := difference(key, x, doubled[key], call.dtype))]
    complaints += [f"added to itself, {text}" for text in problems if text not in complaints]
    return complaints + [f"a write beyond {key}" for key, x in second.items() if not whole(x)]


def by_reference(mask: da.Mask, operands: tuple[Tensor, ...], score: ScoreMod) -> dict[str, Tensor]:
    """Return o, lse, dq, dk and dv, keyed by name, computed by the reference kernel in fp64. operands: (q, k, v, do)."""
    q, k, v, do = (x.double() for x in operands)
    cells = LaunchMask.from_mask(mask, HEADS, KV_HEADS)
    work = schedule_to_device(
        reference.prepare(cells, KernelRequirements(torch.float64, q.shape[2], v.shape[2], q.device)), q.device
    )
    o, lse = reference.forward(q, k, v, work, score)
    grads = reference.backward(do, q, k, v, lse, (do * o).sum(-1), work, score)
    return dict(zip(("o", "lse", "dq", "dk", "dv"), (o, lse, *grads), strict=True))


def difference(name: str, got: Tensor, wanted: Tensor, dtype: torch.dtype) -> str:
    """Return what is wrong with a result, or an empty string. Rows without keys have a log-sum-exp of -inf."""
    if not torch.equal(got == -torch.inf, wanted == -torch.inf):
        return f"{name} is -inf elsewhere"
    got, wanted = (torch.where(wanted == -torch.inf, 0.0, x.double()) for x in (got, wanted))
    # for a single token, the gradients of q and k are 0 up to rounding, so divide by at least 1
    error = float((got - wanted).norm() / max(float(wanted.norm()), 1.0))
    return "" if error <= TOLERANCE[dtype] else f"{name} is off by {error:.1e} (allowed: {TOLERANCE[dtype]:.0e})"


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, guard: float) -> Tensor:
    """Return a random tensor with guards before and after it in memory, filled with `guard`."""
    size = torch.Size(shape).numel()
    around = torch.full((size + 2 * GUARD,), guard, dtype=dtype, device=device)
    return around[GUARD : GUARD + size].view(shape).normal_()


def whole(x: Tensor) -> bool:
    """Return whether both guards of a result are unchanged."""
    around = torch.as_strided(x, (x.numel() + 2 * GUARD,), (1,), 0)
    return bool((around[:GUARD] == PATTERN).all() and (around[-GUARD:] == PATTERN).all())


def glue_differences(device: torch.device) -> list[str]:
    """Return a list of the row operators whose results differ from the CPU's."""
    torch.manual_seed(0)
    listed, segment = torch.randperm(900)[:500], RowSelection(7, 500)

    def results(on: torch.device) -> list[Tensor]:
        o, other, lse, other_lse = (x.to(on) for x in tensors)
        index = RowSelection.of(listed.to(on))
        glue.copy_rows(o[:, 1:3], segment, other[:, :2], index)
        glue.add_rows(o[:, 3:], index, other[:, 3:], segment)
        glue.merge_rows(o, lse, index, other, other_lse, segment)
        do, sums = torch.zeros_like(other), torch.zeros_like(lse)
        glue.copy_rows_with_products(do, sums, index, other, other.flip(0), segment)
        return [o, lse, glue.row_products(other, other), do, sums]

    tensors = torch.randn(1000, 5, 80), torch.randn(1000, 5, 80).bfloat16(), torch.randn(1000, 5), torch.randn(1000, 5)
    tensors[2][::3] = -torch.inf
    pairs = zip(
        ("o", "lse", "products", "copied rows", "their products"),
        results(device),
        results(torch.device("cpu")),
        strict=True,
    )
    return [
        f"rows around kernels: {name} differs"
        for name, a, b in pairs
        if not torch.allclose(a.cpu(), b, atol=1e-4, rtol=1e-4)
    ]


def host_time(call: Call) -> float:
    """Return the microseconds of host time per launch of a small forward pass."""
    (dim, v_dim), device, n = call.dims, call.device, 128
    q, k, v = (
        torch.randn(n, *shape, device=device, dtype=call.dtype)
        for shape in ((HEADS, dim), (KV_HEADS, dim), (KV_HEADS, v_dim))
    )
    work, into = (
        call.work(da.Mask.causal(n)),
        (torch.empty(n, HEADS, v_dim, device=device), q.new_empty(n, HEADS).float()),
    )
    launches = LAUNCHES if device.type == "cuda" else 1

    def spent() -> float:
        began = time.perf_counter()
        for _ in range(launches):
            call.tier.forward(q, k, v, work, ScoreMod(1.0), into=into)
        return time.perf_counter() - began

    # the first call compiles
    spent()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return spent() / launches * 1e6


def sanitized(tiers: list[str], seconds: float, findings: Findings) -> list[str]:
    """Run some of the calls under compute-sanitizer. Return a list of the faults found."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not tool:
        findings.left_out("compute-sanitizer", "it is not installed here; the guards alone have spoken")
        return []
    if seconds < LEAST_SECONDS:
        findings.left_out("compute-sanitizer", "no time was left")
        return []
    command = [tool, "--error-exitcode", "7", sys.executable, *sys.argv[:1], "--only-run", "--tiers", *tiers]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        findings.left_out("compute-sanitizer", f"it has not ended within {seconds:.0f} s: no verdict")
        return []
    findings.print_line("compute-sanitizer: " + (done.stdout.strip().splitlines() or ["no output"])[-1])
    complaints = [f"compute-sanitizer: {(done.stdout + done.stderr)[-1000:]}"] if done.returncode else []
    findings.check("compute-sanitizer", "".join(complaints))
    return complaints


if __name__ == "__main__":
    guard_processes()
    sys.exit(main())
