"""Measure this machine's kernels, matrix products, copies and links, to create a cluster description.

All ranks measure the same thing at the same time, so the figures include the effect of shared cores and memory. Times are medians
of the slowest rank's times.
"""

# T tokens, H heads, D head dim

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.cluster.spec import ClusterSpec, Device, KernelThroughput, Link
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.registry import choose_kernel, load_kernel
from distattn.kernels.spec import KernelRequirements, ScoreMod
from distattn.kernels.triton.launch import schedule_to_device
from distattn.ops.attention import attention
from distattn.ops.executable import prepare
from distattn.parallel.make_plan import make_plan

# the numbers of queries and of keys in the kernel table; GPUs need larger numbers
_SIDES = {"cpu": (128, 512, 2048), "cuda": (512, 2048, 8192, 32768)}
_HEADS = {"cpu": 4, "cuda": 32}
_HEAD_DIMS = (64, 128)
# the target duration of a batch of calls that are timed together
_BATCH_SECONDS = 0.1
_MESSAGES = {"cpu": (1 << 12, 1 << 20, 1 << 23), "cuda": (1 << 12, 1 << 22, 1 << 26)}


def measure_machine(ranks: int, name: str, report_progress: Callable[[str], None]) -> ClusterSpec:
    """Measure this machine with `ranks` ranks working at the same time. Call it on every rank of a process group of that size."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    report_progress("matrix products and copies")
    product, copy = _matmul_tflops(device), _copy_gbs(device)
    report_progress("links")
    link = _measure_link(device, ranks)
    report_progress("the executor's own time per step")
    step = _step_microseconds(device, ranks) - (link.latency_us if ranks > 1 else 0.0)
    rows = []
    for head_dim in _HEAD_DIMS:
        for queries in _SIDES[device.type]:
            for keys in _SIDES[device.type]:
                report_progress(f"attention, head dim {head_dim}, {queries} queries, {keys} keys")
                rows += _attention_speeds(device, head_dim, queries, keys)
    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    described = Device(
        name=properties.name if properties else f"CPU, {torch.get_num_threads()} threads a rank",
        memory_gb=round((properties.total_memory if properties else _memory_bytes()) / 1e9, 3),
        # the peak of this machine is not known; the measured speed of matrix products is a lower bound
        peak_tflops=product,
        gemm_tflops=product,
        copy_gbs=copy,
        num_sms=properties.multi_processor_count if properties else 1,
        tile=(128, 128) if cuda else (1, 1),
        launch_us=5.0 if cuda else max(step, 0.0),
        task_us=0.0,
        host_us=step if cuda else 0.0,
    )
    return ClusterSpec(name, 1, ranks, described, link, link, tuple(rows))


def _seconds_of_call(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Measure the seconds per call: the median over batches of calls, each timed from a common start to the slowest rank's end.

    A batch is long compared with the operating system's time slices, so the result includes the slowdown of ranks that share a
    core.
    """
    work()
    calls = max(1, round(_BATCH_SECONDS / max(_seconds_of_calls(work, 1, device), 1e-9)))
    return statistics.median(_seconds_of_calls(work, calls, device) for _ in range(repeats)) / calls


def _seconds_of_calls(work: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Measure the seconds that `calls` calls take on every rank. All ranks return the slowest rank's time."""
    if dist.is_initialized():
        dist.barrier()
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        work()
    _synchronize(device)
    slowest = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _matmul_tflops(device: torch.device) -> float:
    """Measure the TFLOP/s of a large matrix product, in bf16 on GPUs and fp32 on CPUs."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _seconds_of_call(lambda: a @ b, device) / 1e12


def _copy_gbs(device: torch.device) -> float:
    """Measure the speed of copies in 10^9 bytes per second."""
    source = torch.randn(1 << (28 if device.type == "cuda" else 23), device=device)
    target = torch.empty_like(source)
    return source.nbytes / _seconds_of_call(lambda: target.copy_(source), device) / 1e9


def _measure_link(device: torch.device, ranks: int) -> Link:
    """Measure a rank's link with messages of three sizes, sent by all ranks at the same time: to neighbours, and as all-to-alls.

    The slower of the two patterns counts. On CPUs the link is shared, because all ranks share the memory.
    """
    if ranks == 1:
        return Link(gbs=_copy_gbs(device), latency_us=1.0, shared=device.type == "cpu")
    rank = dist.get_rank()
    points: list[tuple[float, float]] = []
    for size in _MESSAGES[device.type]:
        out, back = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

        def send_around(out: Tensor = out, back: Tensor = back) -> None:
            operations = [
                dist.P2POp(dist.isend, out, (rank + 1) % ranks),
                dist.P2POp(dist.irecv, back, (rank - 1) % ranks),
            ]
            for request in dist.batch_isend_irecv(operations):
                request.wait()

        wide, wide_back = (torch.zeros(size // ranks * ranks, dtype=torch.uint8, device=device) for _ in range(2))

        def send_to_all(out: Tensor = wide, back: Tensor = wide_back) -> None:
            dist.all_to_all_single(back, out)

        slower = max(
            _seconds_of_call(send_around, device) / size,
            _seconds_of_call(send_to_all, device) / (size * (ranks - 1) / ranks),
        )
        points.append((float(size), slower * size))
    (small, quick), (large, slow) = points[0], points[-1]
    per_byte = (slow - quick) / (large - small)
    if slow < 2 * quick:
        # latency dominates even the largest message, so use a lower bound on the link's speed
        per_byte = slow / large
    shared = device.type == "cpu"
    return Link(
        gbs=1e-9 / per_byte * (ranks if shared else 1),
        latency_us=max(quick - per_byte * small, 1e-7) * 1e6,
        shared=shared,
    )


def _step_microseconds(device: torch.device, ranks: int) -> float:
    """Measure the microseconds of a ring step with very few tokens: the overhead besides arithmetic and data transfer."""
    tokens, dtype = 16 * ranks, torch.bfloat16 if device.type == "cuda" else torch.float32
    mask, layout = Mask.full(tokens), Layout.contiguous([tokens], ranks)
    plan = make_plan(mask, layout, strategy="ring", heads=4, kv_heads=4, head_dim=64, dtype=dtype)
    group = dist.group.WORLD if dist.is_initialized() else None
    executable = prepare(plan, group, device=device)
    q, k, v = (torch.randn(16, 4, 64, device=device, dtype=dtype) for _ in range(3))
    return _seconds_of_call(lambda: attention(q, k, v, executable), device) / plan.forward.steps * 1e6


def _attention_speeds(device: torch.device, head_dim: int, queries: int, keys: int) -> list[KernelThroughput]:
    """Measure the forward and backward TFLOP/s of the device's default kernel on a full rectangle of queries x keys."""
    heads, dtype = _HEADS[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    demand = KernelRequirements(dtype, head_dim, head_dim, device)
    kernel = load_kernel(choose_kernel(None, demand))
    # `Mask` is square, so treat the rectangle as one piece of a larger mask
    n = max(queries, keys)
    mask = Mask.from_pieces([[0, queries, 0, keys, -n, n]], n)
    cells = LaunchMask.from_mask(mask, heads, heads)._replace(rows=queries, keys=keys)
    work, score = kernel.prepare(cells, demand), ScoreMod(head_dim**-0.5)
    if device.type == "cuda":
        work = schedule_to_device(work, device)
    q, do = (torch.randn(queries, heads, head_dim, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(keys, heads, head_dim, device=device, dtype=dtype) for _ in range(2))
    o, lse = kernel.forward(q, k, v, work, score)
    delta = (do.to(o.dtype) * o).sum(-1)
    flops = 4.0 * queries * keys * heads * head_dim
    forward = _seconds_of_call(lambda: kernel.forward(q, k, v, work, score), device)
    backward = _seconds_of_call(lambda: kernel.backward(do, q, k, v, lse, delta, work, score), device)
    return [
        KernelThroughput("forward", head_dim, queries, keys, flops / forward / 1e12),
        KernelThroughput("backward", head_dim, queries, keys, 2.5 * flops / backward / 1e12),
    ]


def _memory_bytes() -> int:
    """Read the size of this machine's memory in bytes."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return int(file.readline().split()[1]) * 1024
