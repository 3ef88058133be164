"""A lint of the machine code that Triton compiles for the attention and recurrence kernels. It needs no GPU.

    python benchmarks/compile_lint.py [--arch 80 90 100] [--only REGULAR-EXPRESSION] [--production [STRATEGY ...]]
                                      [--all] [--update | --names]

Every kernel, epilogue and tile size goes through the real launch path with a stand-in for the driver. Then the machine
code is read: registers, stack, spills inside the loops that multiply, shared memory, matrix instructions, products that
ptxas serialized, products that overlap with other work, and narrow asynchronous loads. For the main loop (of the loops
that multiply, the one with the most exponentials, and the shortest of these) it also counts instructions, in total and
by pipe. The metrics are compared with a committed budget, one file per version of Triton. The exit code is 1 if any of
them is worse; --update rewrites the file.

The budget has a digest of the compiler's input. A kernel with the same digest is not compiled again, since the budget
was taken from the same machine code; --all compiles it nevertheless.

--production adds launches of layer calls that are not among the others. They are found by running the executor on plans
of all strategies, or of the given ones (see `production_launches`). --names compiles nothing and fails if a kernel has
no budget.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from process_guard import guard_processes
from production_launches import SHAPES, named_launches, production_launches
from triton.backends.compiler import GPUTarget

from distattn.ir.mask import Mask
from distattn.ir.op import OPS
from distattn.kernels.gluon import attention as gluon_attention
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.recurrence.tokens import RecurrenceTokens
from distattn.kernels.recurrence.triton import kernel as triton_recurrence
from distattn.kernels.spec import FinalRows, KernelRequirements, ScoreMod
from distattn.kernels.triton import attention as triton_attention
from distattn.kernels.triton import spinner
from distattn.kernels.triton.launch import TritonLaunch
from distattn.kernels.triton.sums import scratch_of_parts, sums_launch
from distattn.parallel.make_plan import STRATEGIES

ARCHITECTURES = (80, 90, 100)
DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
SINGLE_DIMS = ((64, 64), (128, 128), (256, 256))
# maximum bytes of shared memory per program (CUDA programming guide, compute capabilities)
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
# the matrix-multiply instruction of each architecture
PRODUCTS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
WORSE_IF_MORE = (
    "registers",
    "stack",
    "hot_spills",
    "shared",
    "narrow_loads",
    "serialized",
    "loop",
    "fma",
    "alu",
    "mufu",
    "bar",
)
# words in the names of kernels that do not use matrix-multiply instructions
WITHOUT_PRODUCTS = {"float32", "numbers", "row_numbers_kernel", "sums", "sum_parts_kernel", "spin", "glue"}
# instruction prefixes of each pipe (nvdisasm, sm_80 to sm_100)
PIPES = {
    "fma": ("FFMA", "FMUL", "FADD", "HFMA", "HADD", "HMUL", "IMAD"),
    "alu": (
        "IADD",
        "LOP",
        "FMNMX",
        "ISETP",
        "FSETP",
        "PLOP",
        "SEL",
        "FSEL",
        "PRMT",
        "SHF",
        "LEA",
        "IMNMX",
        "VIMNMX",
        "F2FP",
        "IABS",
    ),
    "mufu": ("MUFU",),
    "bar": ("BAR",),
}
# with this many registers per thread, rounded up to a multiple of 8, the spinner's 1024 threads hold 49,152 of a
# multiprocessor's 65,536 registers, so that no second program fits
HELD_BY_SPIN = 41
HEADS, KV_HEADS, TOKENS = 8, 2, 256
CPU = torch.device("cpu")


class StandIn:
    """A stand-in for Triton's driver that only knows its target."""

    def __init__(self, arch: int):
        self.target, self.utils = GPUTarget("cuda", arch, 32), None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # compiled kernels are cached by device, so report each architecture as a separate device
        return int(self.target.arch)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def launcher_cls(self, *args: object, **kwargs: object) -> None:
        return None


def main() -> int:
    """Compile the kernels, compare them with their budgets and report. Return exit code 1 if there are any complaints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--only", type=re.compile, default="", help="kernels whose names have this")
    parser.add_argument("--production", nargs="*", metavar="STRATEGY", help="what layer calls launch, too")
    parser.add_argument("--all", action="store_true", help="compile what has not changed, too")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--update", action="store_true", help="write the budget of what is compiled")
    how.add_argument("--names", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    path = Path(__file__).parent / "budgets" / f"triton-{triton.__version__.split('+')[0]}.json"
    budget: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    if not budget and not arguments.update:
        print_line(f"there is no budget for Triton {triton.__version__}; make one with --update")
        return 1
    complaints: list[str] = []
    names: set[str] = set()
    unchanged = 0
    for arch in arguments.arch:
        # compute all digests first: they cannot be computed for kernels that are already compiled
        described = [(name, launch, digest(launch, arch)) for name, launch in variants(arch)]
        if arguments.production is not None:
            described += launched(arch, {digest_ for _, _, digest_ in described}, arguments.production or STRATEGIES)
        for name, launch, digest_ in described:
            names.add(name)
            if not re.search(arguments.only, name):
                continue
            if arguments.names:
                complaints += [] if name in budget else [f"{name}: has no budget"]
                continue
            if budget.get(name, {}).get("digest") == digest_ and not arguments.all:
                unchanged += 1
                continue
            measured = facts(compiled(launch, arch), arch)
            wrong = [
                *broken_rules(measured, arch, name),
                *(worse(measured, budget.get(name)) if not arguments.update else []),
            ]
            complaints += [f"{name}: {complaint}" for complaint in wrong]
            print_line(
                f"{name:42s} {'  '.join(f'{key} {value}' for key, value in measured.items())}{'  <- ' * bool(wrong)}"
            )
            budget[name] = measured | {"digest": digest_}
    print_line(
        f"{unchanged} kernels are what their budgets were taken from"
        if not arguments.names
        else f"{len(names)} kernels"
    )
    if arguments.update:
        if arguments.production == [] and not arguments.only.pattern:
            # drop the budgets of kernels that are no longer launched
            linted = tuple(f"sm_{arch} " for arch in arguments.arch)
            budget = {name: kept for name, kept in budget.items() if name in names or not name.startswith(linted)}
        path.parent.mkdir(exist_ok=True)
        lines = (f"{json.dumps(name)}: {json.dumps(budget[name])}" for name in sorted(budget))
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print_line("\n".join(complaints) or "nothing is worse than its budget")
    return 1 if complaints else 0


def variants(arch: int) -> Iterator[tuple[str, TritonLaunch]]:
    """Yield (name, launch) for every kernel, epilogue, dtype and head dim on an architecture."""
    named = {torch.bfloat16: DIMS, torch.float16: ((128, 128),), torch.float32: SINGLE_DIMS}
    for dtype, dims in named.items():
        for dim, v_dim in dims:
            for modifiers in (False, True) if dim == 128 and dtype == torch.bfloat16 else (False,):
                for kernel, launch in launches(arch, dtype, dim, v_dim, modifiers):
                    more = " softcap alibi" if modifiers else ""
                    yield f"sm_{arch} {str(dtype)[6:]} {dim}/{v_dim} {kernel}{more}", launch
    halves = ((dtype, dim) for dtype in (torch.bfloat16, torch.float16) for dim in (64, 128))
    for dtype, dim in halves if arch == 90 else ():
        for modifiers in (False, True) if dim == 128 and dtype == torch.bfloat16 else (False,):
            for kernel, launch in gluon_launches(dtype, dim, modifiers):
                yield f"sm_{arch} {str(dtype)[6:]} {dim}/{dim} {kernel}{' softcap alibi' if modifiers else ''}", launch
    for kernel, launch in recurrence_launches(torch.bfloat16, 128):
        yield f"sm_{arch} bfloat16 128/128 recurrence {kernel}", launch
    yield f"sm_{arch} spin", spinner.spin_launch(torch.zeros(2, dtype=torch.int32), torch.zeros(1), 16)


def launched(arch: int, known_digests: set[str], strategies: Iterable[str]) -> Iterator[tuple[str, TritonLaunch, str]]:
    """Yield (name, launch, digest) for each launch of layer calls on an architecture, unless its digest is already known."""
    launches_of_calls = [launch for shape in SHAPES for launch in production_launches(arch, shape, strategies)]
    for name, launch in named_launches(launches_of_calls).items():
        if (launch_digest := digest(launch, arch)) not in known_digests:
            yield f"sm_{arch} launched {name}", launch, launch_digest


def launches(
    arch: int, dtype: torch.dtype, dim: int, v_dim: int, modifiers: bool
) -> Iterator[tuple[str, TritonLaunch]]:
    """Yield (name, launch) for each kernel that a call with the given dtypes and dims launches."""
    (q, k, v, do), (o, lse, grads), score = tensors(dtype, dim, v_dim, modifiers)
    tiles = triton_attention.tiles_for(KernelRequirements(dtype, dim, v_dim, CPU), arch)
    # use a single multiprocessor, for which no tile is split
    work = triton_attention.prepare_tiles(LaunchMask.from_mask(Mask.causal(TOKENS), HEADS, KV_HEADS), tiles, 1)
    with mock.patch.object(triton_attention, "compute_capability", lambda device: arch):
        for epilogue, how in epilogues():
            yield f"forward {epilogue}", triton_attention.forward_launch(q, k, v, o, lse, work, score, **how)
        operands = (do, q, k, v, lse, lse, grads, work, score)
        numbers, dkdv, dq = triton_attention.backward_launch(*operands, accumulate=(True, True))
        yield "backward numbers", numbers
        yield "backward dkdv", dkdv
        yield "backward dq", dq
        cut = work.dkdv._replace(sums=torch.zeros(1, 3, dtype=torch.int32), slots=2)
        yield "backward sums", sums_launch(scratch_of_parts(*grads[1:], cut, tiles.dkdv), *grads[1:], cut, True)
        if (dtype, dim, modifiers) == (torch.bfloat16, 128, False):
            _, dkdv, dq = triton_attention.backward_launch(*operands)
            yield "backward dkdv, written", dkdv
            yield "backward dq, written", dq
            final = finished(grads[0], dtype)
            *_, dq = triton_attention.backward_launch(*operands, accumulate=(True, True), final=final)
            yield "backward dq, finished", dq
            how = dict(merge=True, final=finished(o, dtype))
            yield "forward finish", triton_attention.forward_launch(q, k, v, o, lse, work, score, **how)
        if dtype == torch.float32 and dim == 128:
            yield "forward write tf32", triton_attention.forward_launch(q, k, v, o, lse, work, score, precision="tf32")
            _, dkdv, dq = triton_attention.backward_launch(*operands, precision="tf32")
            yield "backward dkdv tf32", dkdv
            yield "backward dq tf32", dq


def gluon_launches(dtype: torch.dtype, dim: int, modifiers: bool) -> Iterator[tuple[str, TritonLaunch]]:
    """Yield (name, launch) for each kernel of the Gluon tier, which is for Hopper."""
    (q, k, v, do), (o, lse, grads), score = tensors(dtype, dim, dim, modifiers)
    cells = LaunchMask.from_mask(Mask.causal(TOKENS), HEADS, KV_HEADS)
    work = gluon_attention.prepare(cells, KernelRequirements(dtype, dim, dim, CPU))
    for epilogue, how in epilogues():
        yield f"gluon forward {epilogue}", gluon_attention.forward_launch(q, k, v, o, lse, work, score, **how)
    yield (
        "gluon backward",
        gluon_attention.backward_launch(do, q, k, v, lse, lse, grads, work, score, accumulate=True)[1],
    )


def recurrence_launches(dtype: torch.dtype, dim: int) -> Iterator[tuple[str, TritonLaunch]]:
    """Yield (name, launch) once for each kernel that Gated DeltaNet launches, forward or backward."""

    def tensor(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(TOKENS, *shape, dtype=of)

    q, k, v = tensor(KV_HEADS, dim), tensor(KV_HEADS, dim), tensor(HEADS, dim)
    tokens = RecurrenceTokens(q, k, v, tensor(HEADS, of=torch.float32), tensor(HEADS))
    state = torch.empty(1, HEADS, dim, dim)
    needed = KernelRequirements(dtype, dim, dim, CPU, op=OPS["gated_delta_rule"])
    chunks = triton_recurrence.prepare([(0, TOKENS)], needed)
    launches_: list[TritonLaunch] = []
    with mock.patch.object(triton_recurrence, "run_launch", launches_.append):
        triton_recurrence.forward(tokens, chunks, state)
        triton_recurrence.backward(tokens, chunks, state, v, state)
    yield from {launch.kernel.__name__.removesuffix("_kernel"): launch for launch in launches_}.items()


def epilogues() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, arguments of `forward_launch`) for each way in which a forward kernel can store its result."""
    yield "write", {}
    yield "merge", dict(merge=True)


def finished(sums: torch.Tensor, dtype: torch.dtype) -> FinalRows:
    """Return `FinalRows` for a result that several launches accumulate in `sums`."""
    return FinalRows(torch.empty_like(sums, dtype=dtype), torch.empty(TOKENS, dtype=torch.int32), 1)


def tensors(dtype: torch.dtype, dim: int, v_dim: int, modifiers: bool) -> tuple[Any, Any, ScoreMod]:
    """Return (operands, results, score) for a call. The tensors are uninitialized, because nothing is computed."""

    def tensor(heads: int, width: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(TOKENS, heads, width, dtype=of)

    q, k, v, do = tensor(HEADS, dim), tensor(KV_HEADS, dim), tensor(KV_HEADS, v_dim), tensor(HEADS, v_dim)
    results = tensor(HEADS, v_dim, torch.float32), torch.empty(TOKENS, HEADS)
    grads = tuple(torch.empty_like(x, dtype=torch.float32) for x in (q, k, v))
    return (q, k, v, do), (*results, grads), ScoreMod(0.1, 30.0, torch.empty(HEADS)) if modifiers else ScoreMod(0.1)


def digest(launch: TritonLaunch, arch: int) -> str:
    """Return a digest of the compiler's entire input: the kernel and its callees, argument types, and options."""
    compiler_input: list[Any] = []

    def skip(*, key: Any, **others: Any) -> bool:
        compiler_input.append(key)
        return True

    with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", skip):
        compiled(launch, arch)
    return hashlib.sha256(repr((arch, launch.kernel.cache_key, compiler_input)).encode()).hexdigest()[:16]


def compiled(launch: TritonLaunch, arch: int) -> Any:
    """Compile a launch's kernel for an architecture and return it."""
    triton.runtime.driver.set_active(StandIn(arch))
    return launch.kernel.warmup(**launch.arguments, **launch.options, grid=(1,))


def facts(kernel: Any, arch: int) -> dict[str, int]:
    """Return the metrics that budgets limit, read from a kernel's machine code."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = output(tools / "cuobjdump", "-res-usage", file.name)
        # skip data-flow analysis (-ndf), which takes a quarter of the time and affects none of these metrics
        code = output(tools / "nvdisasm", "-ndf", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    operations, loops = parse(code)
    counts = Counter(operation.split(".")[0] for operation in operations)
    product = PRODUCTS[arch]
    # find the innermost loops by taking loops in order of length and skipping those that overlap a loop already taken,
    # because outer loops are rotated and may start anywhere
    innermost: list[tuple[int, int]] = []
    for a, b in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        multiplies = any(name.startswith(product) for name in operations[a:b])
        if multiplies and not any(a < d and c < b for c, d in innermost):
            innermost.append((a, b))
    hot = [name for a, b in innermost for name in operations[a:b]]
    bodies = [operations[a:b] for a, b in innermost]
    main = max(bodies, key=lambda body: (sum(name.startswith("MUFU") for name in body), -len(body)), default=[])
    dots = kernel.asm["ttgir"].count("warp_group_dot ")
    arrivals = sum(name == "WARPGROUP.ARRIVE" for name in operations)
    products = sum(count for name, count in counts.items() if name.startswith(product))
    return {
        "registers": int(registers),
        "stack": int(stack),
        "hot_spills": sum(name.split(".")[0] in ("LDL", "STL") for name in hot),
        "shared": kernel.metadata.shared,
        "products": products,
        "serialized": int(is_serialized(arrivals, dots, products)) if arch == 90 else 0,
        # waits that leave a product in flight, which then overlaps with the work until the next wait
        "overlapped": len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x[1-9]", code)),
        "narrow_loads": sum(name.startswith("LDGSTS") and not name.endswith(("128", "64")) for name in operations),
        "loop": len(main),
        **{pipe: sum(name.startswith(begins) for name in main) for pipe, begins in PIPES.items()},
    }


def is_serialized(arrivals: int, dots: int, products: int) -> bool:
    """Return whether ptxas waits around every matrix instruction, as it does if it cannot prove them independent.

    arrivals: the number of WARPGROUP.ARRIVE instructions. dots: the number of tile products in Triton's code. products:
    the number of matrix instructions generated for them. A loop that is merely unrolled also has more arrivals than dots,
    but still only one arrival for all instructions of a tile product.
    """
    return arrivals > 2 * dots and 2 * arrivals > products


def parse(code: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the operations in order, and each loop as the range (first, last + 1) of its operations."""
    operations: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(operations)
        elif operation := re.match(r"\s*/\*[0-9a-f]{4,5}\*/\s+(?:@!?\w+\s+)?([A-Z0-9_]+(?:\.[A-Z0-9_]+)*)", line):
            operations.append(operation[1])
            target = re.search(r"\((\.L_x_\d+)\)", line)
            # a backward branch ends a loop
            if operation[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(operations)))
    return operations, loops


def broken_rules(measured: dict[str, int], arch: int, name: str) -> Iterator[str]:
    """Yield a message for each rule that a kernel breaks. These rules do not depend on the budget."""
    if measured["shared"] > SHARED[arch]:
        yield f"{measured['shared']:,} bytes of shared memory; the chip has {SHARED[arch]:,}"
    multiplies = not WITHOUT_PRODUCTS.intersection(name.split())
    if multiplies and not measured["products"]:
        yield f"no {PRODUCTS[arch]}: matrices are not multiplied by matrix units"
    if "spin" in name and measured["registers"] < HELD_BY_SPIN:
        yield f"{measured['registers']} registers a thread; it holds a multiprocessor with at least {HELD_BY_SPIN}"
    if "gluon" in name and not measured["overlapped"]:
        yield "no product runs while another is used"
    if measured["serialized"]:
        yield "ptxas makes every product wait for the one before"


def worse(measured: dict[str, int], allowed: dict[str, Any] | None) -> Iterator[str]:
    """Yield a message for each metric that exceeds the kernel's budget."""
    if allowed is None:
        yield "has no budget"
        return
    for key in WORSE_IF_MORE:
        if measured[key] > allowed.get(key, measured[key]):
            yield f"{key} {measured[key]}, the budget is {allowed[key]}"
    if measured["overlapped"] < allowed["overlapped"]:
        yield f"only {measured['overlapped']} products run under other work, the budget is {allowed['overlapped']}"


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    guard_processes()
    sys.exit(main())
