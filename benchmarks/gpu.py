"""Our attention kernels and their rivals on one GPU: correctness first, then speed.

    python benchmarks/gpu.py [--out benchmarks/results/gpu.jsonl] [--fa3 PATH/flash_attn_3/_C.so]
                             [--tutorial PATH/06-fused-attention.py] [--quick] [--tiers-only] [--seconds 200]

Rates are TFLOP/s on the mask's allowed cells (4 x area x heads x dim forward, 10 backward), medians over repeats. Each
timed repeat is a CUDA graph of several calls if one can be captured, otherwise eager calls (marked). The share is
relative to the matrix-product rate measured first in the same run. A contestant with wrong results is not timed. Ours
also counts as wrong if its error exceeds one and a half times the best rival's. The trial of kernel="auto" chooses a
tier for every case. The benchmark is meant to end within ten minutes on an H200. --quick runs a third of the cases,
--tiers-only leaves out the cost of epilogues, and --seconds starts no case that would exceed this time. Without a GPU
(TRITON_INTERPRET=1) it runs tiny cases.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from findings import Findings
from gpu_cases import Case, Inputs, Run, auto_choice, contestants, epilogues, inputs_of
from harness import Cell, compare, table, write
from torch import Tensor

from distattn.ir.bands import row_key_ranges

# the number of rows, and of keys, to compare with fp64, and the number of rows to compute at a time
CHECKED = 24
BLOCK = 256
# allowed relative error (Frobenius norm)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float32: 1e-5}
# allowed ratio of our error to the best rival's
WORST_RATIO = 1.5
CALLS = 5


def main() -> int:
    """Measure the ceilings, then the cases one by one. Return exit code 1 if any of our kernels is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fa3", type=Path)
    parser.add_argument("--tutorial", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiers-only", action="store_true")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--findings", type=Path, help="where they are kept, as JSON lines")
    arguments = parser.parse_args()
    findings = Findings(arguments.findings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began, longest = time.perf_counter(), 0.0
    ceilings = measure_ceilings(device)
    findings.print_line("  ".join(f"{name} {value:.1f}" for name, value in ceilings.items()))
    runners = contestants(arguments.fa3, arguments.tutorial) | ({} if arguments.tiers_only else epilogues())
    everything: list[Cell] = []
    for case in cases(device, arguments.quick):
        case_began = time.perf_counter()
        if case_began - began + longest > arguments.seconds:
            findings.left_out(f"speed of {case.name}", "no time was left")
            continue
        auto = auto_choice(case, device)
        cells = run_case(case, device, runners)
        for cell in cells:
            cell.facts["tflops"] = case.flops / cell.median / 1e12 if cell.median else 0.0
            cell.facts["share"] = cell.facts["tflops"] / ceilings["product TFLOP/s"]
            cell.facts["auto"] = cell.contestant == f"distattn {auto}"
            note(findings, cell)
        shown: dict[str, Callable[[Any], str]] = {
            "tflops": lambda value: f"{value:.0f} TFLOP/s",
            "error": lambda value: f"{value:.1e}",
            "share": lambda value: f"{value:.0%}",
            "graph": lambda value: "graph" if value else "eager",
            "auto": lambda value: "auto" if value else "",
        }
        findings.print_line(table(cells, shown) + f"\n  auto: {auto}\n  ({time.perf_counter() - began:.0f} s)")
        everything += cells
        if arguments.out:
            write(arguments.out, cells, ceilings=ceilings)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        longest = max(longest, time.perf_counter() - case_began)
    wrong = [cell for cell in everything if is_ours(cell) and cell.status in ("wrong", "error")]
    findings.print_line(f"{len(everything)} cells; ours wrong or failing in {len(wrong)}")
    return findings.ended()


def note(findings: Findings, cell: Cell) -> None:
    """Record a cell's speed, or why it has none. If the cell is of a tier that serves the case, also record a check."""
    fault = f"{cell.status}: {cell.note}" if cell.status != "ok" else ""
    if is_ours(cell) and cell.status in ("ok", "wrong", "error"):
        findings.check(f"{cell.contestant}, {cell.case}", fault)
    facts = {name: cell.facts[name] for name in ("tflops", "auto")}
    findings.speed(cell.case, cell.contestant, fault, seconds=cell.median, **facts)


def is_ours(cell: Cell) -> bool:
    """Return whether a cell's contestant is one of our tiers, not a rival."""
    return cell.contestant.startswith("distattn")


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield the cases, the most informative first, since a time limit drops the last ones."""
    if device.type == "cpu":
        for direction in ("forward", "backward"):
            for pattern in ("causal", "documents"):
                yield Case(pattern, 256, (2, 1), (32, 32), direction, torch.float16)
        return
    directions = ("forward", "backward")
    gqa, mha = (64, 8), (16, 16)
    order = [("causal", 8192), ("documents", 8192), ("causal", 32768), ("documents", 32768), ("window", 32768)]
    order += [("full", 8192), ("block-causal", 8192), ("window", 8192), ("block-causal", 32768)]
    for pattern, tokens in order:
        for direction in directions:
            yield Case(pattern, tokens, gqa, (128, 128), direction)
    if quick:
        return
    for dims in ((64, 64), (192, 128), (256, 256)):
        for direction in directions:
            yield Case("causal", 8192, mha, dims, direction)
    for pattern in ("prefix", "shared question", "global window"):
        for direction in directions:
            yield Case(pattern, 16384, mha, (128, 128), direction)
    for tokens in (1024, 2048):
        for direction in directions:
            yield Case("causal", tokens, gqa, (128, 128), direction)
    yield Case("causal", 65536, mha, (128, 128), "forward")


def run_case(case: Case, device: torch.device, runners: dict[str, Callable[[Case, Inputs], Run]]) -> list[Cell]:
    """Run all contestants of a case. Return their cells."""
    x = inputs_of(case, device)
    check = checker(case, x)
    makers = {name: (lambda make=make: Repeated(lambda: make(case, x), device)) for name, make in runners.items()}
    cells = compare(case.name, makers, check, repeats=7 if device.type == "cuda" else 1)
    right = [cell for cell in cells if cell.status == "ok"]
    best = min((cell.facts["error"] for cell in right if not is_ours(cell)), default=math.inf)
    for cell in filter(is_ours, right):
        if cell.facts["error"] > WORST_RATIO * best:
            cell.status, cell.note = "wrong", f"error {cell.facts['error']:.1e}, the best rival's {best:.1e}"
    return cells


class Repeated:
    """A function that makes several calls, as a CUDA graph if they can be captured, and returns the last result and its
    facts.

    Everything, including `make`, runs on one stream, because autograd runs a backward pass on the stream of its forward
    pass.
    """

    def __init__(self, make: Callable[[], Callable[[], Any]], device: torch.device):
        self.calls, self.graph, self.stream = 1, None, None
        if device.type == "cuda":
            self.calls, self.stream = CALLS, torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.work = make()
            if device.type == "cuda":
                self._capture()
        self.facts = {"graph": self.graph is not None}

    def _capture(self) -> None:
        for _ in range(2):
            self.work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                for _ in range(self.calls):
                    self.result = self.work()
            self.graph = graph
        except RuntimeError:
            torch.cuda.synchronize()

    def __call__(self) -> tuple[Any, dict[str, Any]]:
        with torch.cuda.stream(self.stream):
            if self.graph is not None:
                self.graph.replay()
                result = self.result
            else:
                for _ in range(self.calls):
                    result = self.work()
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        return result, self.facts


def checker(case: Case, x: Inputs) -> Callable[[tuple[Any, dict[str, Any]]], str]:
    """Return a check that compares some rows of o, or of dq, dk and dv, with fp64, and stores the error in the facts."""
    generator = np.random.default_rng(1)
    some = np.sort(generator.choice(case.tokens, min(CHECKED, case.tokens), replace=False)).tolist()
    wanted = by_definition(case, x, some)

    def check(outcome: tuple[Any, dict[str, Any]]) -> str:
        result, facts = outcome
        names = ("o",) if case.direction == "forward" else ("dq", "dk", "dv")
        tensors = (result,) if case.direction == "forward" else result
        errors = {name: error_of(tensor[some], wanted[name]) for name, tensor in zip(names, tensors, strict=True)}
        name, facts["error"] = max(errors.items(), key=lambda pair: pair[1] if pair[1] == pair[1] else math.inf)
        allowed = TOLERANCE[case.dtype]
        return "" if facts["error"] <= allowed else f"{name} is off by {facts['error']:.1e} (allowed: {allowed:.0e})"

    return check


def by_definition(case: Case, x: Inputs, some: list[int]) -> dict[str, Tensor]:
    """Compute rows `some` of o, dq, dk and dv in fp64, block by block, without our kernels."""
    group, scale, n = case.heads[0] // case.heads[1], case.dims[0] ** -0.5, case.tokens
    k, v = (part.double().repeat_interleave(group, 1) for part in (x.k, x.v))
    index = torch.tensor(some, device=x.q.device)
    dk, dv = torch.zeros_like(k[index]), torch.zeros_like(v[index])
    rows: dict[str, list[Tensor]] = {"o": [], "dq": []}
    # o needs only the queries in `some`; dk and dv need all queries
    blocks = [some] if case.direction == "forward" else [range(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]
    for block in blocks:
        here = torch.tensor(list(block), device=x.q.device)
        q, do = x.q[here].double(), x.do[here].double()
        scores = torch.einsum("thd,shd->hts", q, k) * scale
        weights = torch.softmax(scores.masked_fill(~allowed(case, here), -torch.inf), -1)
        o = torch.einsum("hts,she->the", weights, v)
        dp = torch.einsum("the,she->hts", do, v)
        ds = weights * (dp - (do * o).sum(-1).T[..., None]) * scale
        chosen = torch.isin(here, index)
        rows["o"].append(o[chosen])
        rows["dq"].append(torch.einsum("hts,shd->thd", ds[:, chosen], k))
        dk += torch.einsum("hts,thd->shd", ds[..., index], q)
        dv += torch.einsum("hts,the->she", weights[..., index], do)
    by_group = {"dk": dk, "dv": dv}
    gradients = {name: part.unflatten(1, (-1, group)).sum(2) for name, part in by_group.items()}
    return gradients | {name: torch.cat(parts) for name, parts in rows.items()}


def allowed(case: Case, rows: Tensor) -> Tensor:
    """Return whether each row in `rows` may attend to each key, bool (rows, N)."""
    edges = torch.zeros(len(rows), case.tokens + 1, dtype=torch.int32, device=rows.device)
    at = np.arange(len(rows))
    wanted = rows.cpu().numpy()
    for piece in case.mask.pieces:
        inside = (wanted >= piece[0]) & (wanted < piece[1])
        if inside.any():
            begin, end = row_key_ranges(np.broadcast_to(piece, (int(inside.sum()), len(piece))), wanted[inside])
            for place, sign in ((begin, 1), (end, -1)):
                flat = torch.from_numpy(at[inside] * (case.tokens + 1) + place).to(rows.device)
                edges.view(-1).index_add_(0, flat, torch.full_like(flat, sign, dtype=torch.int32))
    return edges.cumsum(1)[:, :-1] > 0


def error_of(got: Tensor, wanted: Tensor) -> float:
    """Return the relative error (Frobenius norm)."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """Measure the GPU's ceilings: a large product of random bf16 matrices and a large copy."""
    if device.type == "cpu":
        return {"product TFLOP/s": 1.0, "copy TB/s": 1.0}
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = timed(lambda: a @ b)
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source))
    return {"product TFLOP/s": 2 * 8192**3 / product / 1e12, "copy TB/s": 2 * source.nbytes / copy / 1e12}


def timed(work: Callable[[], Any], repeats: int = 20) -> float:
    """Return the median seconds of `work`, measured with device events."""
    for _ in range(3):
        work()
    seconds = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return float(np.median(seconds))


if __name__ == "__main__":
    sys.exit(main())
