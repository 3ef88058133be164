"""The dense fp64 oracle, with gradients by autograd, and a function that runs all ranks of a plan in one process."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.ir.mask import Mask
from distattn.ir.plan import REDUCED_PAYLOADS, Call, Payload, Plan
from distattn.kernels.registry import kernel_preparer, load_kernel
from distattn.kernels.spec import ScoreMod
from distattn.ops.executable import kernel_requirements
from distattn.parallel.analysis.verify import verify
from distattn.parallel.runtime.communication.transport import InProcessNetwork, Packet, Transport
from distattn.parallel.runtime.execution import execute
from distattn.parallel.runtime.lowering.lower import lower
from distattn.parallel.runtime.lowering.views import BufferKey, View
from distattn.parallel.runtime.program import Program, ProgramStep


class Result(NamedTuple):
    o: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor


def random_inputs(
    n: int, heads: int, kv_heads: int, head_dim: int, v_head_dim: int | None = None, seed: int = 0
) -> Inputs:
    """Return random fp64 tensors (n, heads, dim)."""
    generator = torch.Generator().manual_seed(seed)
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    shapes = [(n, heads, head_dim), (n, kv_heads, head_dim), (n, kv_heads, v_head_dim), (n, heads, v_head_dim)]
    return Inputs(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


def dense(mask: Mask, inputs: Inputs, scale: float | None = None) -> Result:
    """Compute softmax(QK^T)V by its definition, and its gradients by autograd. lse is (n, heads)."""
    q, k, v = (x.detach().double().requires_grad_() for x in inputs[:3])
    group = q.shape[1] // k.shape[1]
    # (n, n), or (heads, n, n) if the mask differs by head
    allowed = torch.from_numpy(mask.dense()).expand(q.shape[1], -1, -1)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = scores.masked_fill(~allowed, -torch.inf)
    empty = ~allowed.any(-1)
    # the softmax of a row without keys would be NaN, but its output is defined as 0
    weights = torch.softmax(scores.masked_fill(empty[..., None], 0.0), -1) * ~empty[..., None]
    o = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))
    lse = torch.logsumexp(scores, -1).t()
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), inputs.do.double())
    return Result(o.detach(), lse.detach(), dq, dk, dv)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return max|a-b| / max|b|, or 0 if both tensors are zero. Infinities must match exactly."""
    a, b = a.double(), b.double()
    infinite = torch.isinf(b)
    if not torch.equal(torch.isinf(a), infinite):
        return math.inf
    if infinite.any():
        a, b = a[~infinite], b[~infinite]
    if not b.numel():
        return 0.0
    off, largest = float((a - b).abs().max()), float(b.abs().max())
    if math.isnan(off):
        return math.inf
    return off / largest if largest else math.inf if off else 0.0


def assert_close(got: Result, wanted: Result, tolerance: float) -> None:
    for name, a, b in zip(Result._fields, got, wanted, strict=True):
        error = relative_error(a, b)
        assert error <= tolerance, f"{name} is off by {error:.2e}, more than {tolerance:.0e}"


@dataclass
class Record:
    """A record of a run: bytes sent, keyed by (src, dst, payload); (rank, event) pairs in order; and all ranks'
    programs.
    """

    bytes: Counter = field(default_factory=Counter)
    events: list[tuple[int, str]] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)


class RecordingTransport:
    """A transport that records the bytes of the packets it sends."""

    def __init__(self, inner, rank: int, record: Record):
        self.inner, self.rank, self.record = inner, rank, record

    def exchange(self, sends: list[Packet], receives: list[Packet], collective: bool, where: str = ""):
        for packet in sends:
            # several payloads may share a packet's rows, so count each payload's bytes separately
            per_row = packet.tensor.nbytes // max(len(packet.tensor), 1)
            shares = packet.row_bytes or ((packet.payload, per_row),)
            padding = per_row - sum(bytes for _, bytes in shares)
            # padding makes the row stride a multiple of 16 elements
            assert 0 <= padding <= (per_row / 9 if packet.row_format else 0)
            for payload, bytes in shares:
                self.record.bytes[self.rank, packet.peer, int(payload)] += bytes * len(packet.tensor)
        if sends or receives:
            self.record.events.append((self.rank, "post"))
        return RecordingWork(
            self.inner.exchange(sends, receives, collective), self.rank, self.record, bool(sends or receives)
        )


class RecordingWork(NamedTuple):
    inner: object
    rank: int
    record: Record
    real: bool

    def wait(self) -> None:
        if self.real:
            self.record.events.append((self.rank, "wait"))
        self.inner.wait()


class RecordingKernel:
    """A kernel that records its calls."""

    def __init__(self, inner, rank: int, record: Record):
        self.inner, self.rank, self.record = inner, rank, record
        self.ACCUMULATES = inner.ACCUMULATES

    def forward(self, *args, **into):
        self.record.events.append((self.rank, "compute"))
        return self.inner.forward(*args, **into)

    def backward(self, *args, **into):
        self.record.events.append((self.rank, "compute"))
        return self.inner.backward(*args, **into)


def run_all_ranks(
    plan: Plan,
    inputs: Inputs,
    kernel: str = "reference",
    record: Record | None = None,
    network: Callable[[], Callable[[int], Transport]] = lambda: InProcessNetwork().transport,
    together: Callable[..., list] = execute.run_in_lock_step,
) -> Result:
    """Run the forward and backward passes of all ranks of a plan. Return the gathered results.

    network: returns a new network, which is a function from a rank to its transport. together: runs the passes of all
    ranks, by default in lock step.
    """
    record = Record() if record is None else record
    layout, ranks = plan.call.layout, range(plan.call.ranks)
    proof = verify(plan)
    make = kernel_preparer(kernel, kernel_requirements(plan.call, torch.device("cpu")))
    finishes = getattr(load_kernel(kernel), "FINISHES", ())
    programs = [lower(plan, rank, make, proof, finishes=finishes) for rank in ranks]
    record.programs = programs
    kernels = [RecordingKernel(load_kernel(kernel), rank, record) for rank in ranks]
    dtype = getattr(torch, plan.call.dtype)
    score = ScoreMod(1 / math.sqrt(plan.call.head_dim))
    local = [[layout.shard(x.to(dtype), rank) for x in inputs] for rank in ranks]

    def transports():
        transport = network()
        return [RecordingTransport(transport(rank), rank, record) for rank in ranks]

    forward = together(
        execute.forward(program, transport, kernel_, *local[program.rank][:3], score)
        for program, transport, kernel_ in zip(programs, transports(), kernels, strict=True)
    )
    o, lse, kept = (list(column) for column in zip(*forward, strict=True))
    o = [part.to(dtype) for part in o]
    # this mirrors `backward_pass`
    delta = [
        None if program.sums_where_copied else (local[r][3].to(lse[r].dtype) * o[r].to(lse[r].dtype)).sum(-1)
        for r, program in enumerate(programs)
    ]
    backward_inputs = [(local[r][3], *local[r][:3], lse[r], delta[r], kept[r], score, o[r]) for r in ranks]
    backward = together(
        execute.backward(program, transport, kernel_, *backward_inputs[program.rank])
        for program, transport, kernel_ in zip(programs, transports(), kernels, strict=True)
    )
    dq, dk, dv = (list(column) for column in zip(*backward, strict=True))
    return Result(*(layout.unshard(parts) for parts in (o, lse, dq, dk, dv)))


def alive_bytes(call: Call, steps: list[ProgramStep], payloads: Container[Payload] = tuple(Payload)) -> int:
    """Return the peak bytes of a pass's buffers and arriving partial results, without the rank's own rows."""
    alive = peak = 0
    sizes: dict[BufferKey, int] = {}
    for step in steps:
        own_rows = Counter({key: _rows(view) for key, view in (*step.own_copies, *step.own_results)})
        for key, rows in step.allocate.items():
            sizes[key] = (rows - own_rows[key]) * (key.h1 - key.h0) * call.token_head_bytes(key.payload, in_memory=True)
            alive += sizes[key] if key.payload in payloads else 0
        arriving = sum(
            message.view.rows * message.view.heads * call.token_head_bytes(payload)
            for payload, message in step.receives
            if payload in REDUCED_PAYLOADS and payload in payloads
        )
        peak = max(peak, alive + arriving)
        alive -= sum(sizes[key] for key in step.release if key.payload in payloads)
    return peak


def _rows(view: View) -> int:
    return sum(
        len(range(view.rows)[p.view_rows]) if isinstance(p.view_rows, slice) else len(p.view_rows) for p in view.slices
    )


def planned_bytes(plan: Plan) -> Counter:
    rows = plan.bytes()
    return Counter({(int(s), int(d), int(p)): int(b) for s, d, p, b in zip(*rows.values(), strict=True)})
