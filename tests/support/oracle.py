"""The dense oracle: attention of the whole axis in fp64 by autograd, and every rank of a plan in one process."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.ir.mask import Mask
from distattn.ir.plan import HELD_PAYLOADS, Call, Plan
from distattn.kernels.registry import kernel_preparer, load_kernel
from distattn.kernels.spec import ScoreMod
from distattn.ops.executable import kernel_requirements
from distattn.parallel.analysis.verify import verify
from distattn.parallel.runtime import execute
from distattn.parallel.runtime.program import ProgramStep, lower
from distattn.parallel.runtime.transport import InProcessNetwork, Packet, Transport


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
    """fp64 tensors (n, heads, dim)."""
    generator = torch.Generator().manual_seed(seed)
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    shapes = [(n, heads, head_dim), (n, kv_heads, head_dim), (n, kv_heads, v_head_dim), (n, heads, v_head_dim)]
    return Inputs(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


def dense(mask: Mask, inputs: Inputs, scale: float | None = None) -> Result:
    """softmax(QK^T)V by its definition, gradients by autograd. lse is (n, heads)."""
    q, k, v = (x.detach().double().requires_grad_() for x in inputs[:3])
    group = q.shape[1] // k.shape[1]
    # (n, n), or (heads, n, n) where it differs by head
    allowed = torch.from_numpy(mask.dense()).expand(q.shape[1], -1, -1)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = scores.masked_fill(~allowed, -torch.inf)
    empty = ~allowed.any(-1)
    # a row without keys: softmax is not a number, o is 0 by definition
    weights = torch.softmax(scores.masked_fill(empty[..., None], 0.0), -1) * ~empty[..., None]
    o = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))
    lse = torch.logsumexp(scores, -1).t()
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), inputs.do.double())
    return Result(o.detach(), lse.detach(), dq, dk, dv)


def relative_error(a: Tensor, b: Tensor) -> float:
    """max|a-b| / max|b|, 0 if both are zero; infinities must match exactly."""
    a, b = a.double(), b.double()
    if not torch.equal(torch.isinf(a), torch.isinf(b)) or torch.isnan(a).any():
        return math.inf
    finite = ~torch.isinf(b)
    a, b = a[finite], b[finite]
    if not b.numel() or (not a.any() and not b.any()):
        return 0.0
    return float((a - b).abs().max() / b.abs().max())


def assert_close(got: Result, wanted: Result, tolerance: float) -> None:
    for name, a, b in zip(Result._fields, got, wanted, strict=True):
        error = relative_error(a, b)
        assert error <= tolerance, f"{name} is off by {error:.2e}, more than {tolerance:.0e}"


@dataclass
class Record:
    """What really happened: bytes per (src, dst, payload), events per rank in order, peak bytes per direction and rank."""

    bytes: Counter = field(default_factory=Counter)
    # most bytes of received tensors that were really alive, by (direction, rank, payload), payload None for all
    received: Counter = field(default_factory=Counter)
    # bytes of a rank's own rows beside what arrives, of a pass
    own_rows: Counter = field(default_factory=Counter)
    direction: str = "forward"
    events: list[tuple[int, str]] = field(default_factory=list)
    peak: dict[str, list[int]] = field(default_factory=dict)


class RecordingTransport:
    """Counts what the real transport is given."""

    def __init__(self, inner, rank: int, record: Record):
        self.inner, self.rank, self.record = inner, rank, record
        self.direction = record.direction
        self.live: Counter = Counter()
        self.storages: set[int] = set()

    def exchange(self, sends: list[Packet], receives: list[Packet], collective: bool, where: str = ""):
        for packet in sends:
            self.record.bytes[self.rank, packet.peer, int(packet.payload)] += packet.tensor.nbytes
        for packet in receives:
            self._watch(packet)
        if sends or receives:
            self.record.events.append((self.rank, "post"))
        return RecordingWork(
            self.inner.exchange(sends, receives, collective), self.rank, self.record, bool(sends or receives)
        )

    def _watch(self, packet: Packet) -> None:
        """Count the storage a packet arrives in until PyTorch frees it."""
        storage = packet.tensor.untyped_storage()
        if not storage.nbytes() or storage.data_ptr() in self.storages:
            return
        self.storages.add(storage.data_ptr())
        weakref.finalize(storage, self._change, packet.payload, -storage.nbytes(), storage.data_ptr())
        self._change(packet.payload, storage.nbytes(), storage.data_ptr())

    def _change(self, payload: int, size: int, pointer: int) -> None:
        if size < 0:
            self.storages.discard(pointer)
        for kind in (payload, None):
            self.live[kind] += size
            key = (self.direction, self.rank, kind)
            self.record.received[key] = max(self.record.received[key], self.live[kind])


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
    """Notes when the real kernel runs."""

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
    """Forward and backward of every rank of a plan, put together again: in lock step, or as `together` runs them.

    network: makes what joins the ranks of a pass, a function from a rank to its transport.
    """
    record = Record() if record is None else record
    layout, ranks = plan.call.layout, range(plan.call.ranks)
    proof = verify(plan)
    make = kernel_preparer(kernel, kernel_requirements(plan.call, torch.device("cpu")))
    programs = [lower(plan, rank, make, proof) for rank in ranks]
    for program in programs:
        for direction, steps in (("forward", program.forward), ("backward", program.backward)):
            record.own_rows[direction, program.rank] = _own_bytes(plan.call, steps)
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
    o, lse, kept, peaks = (list(column) for column in zip(*forward, strict=True))
    o = [part.to(dtype) for part in o]
    record.peak["forward"] = peaks
    record.direction = "backward"
    delta = [(local[r][3].to(lse[r].dtype) * o[r].to(lse[r].dtype)).sum(-1) for r in ranks]
    backward = together(
        execute.backward(p, t, k, local[p.rank][3], *local[p.rank][:3], lse[p.rank], delta[p.rank], kept[p.rank], score)
        for p, t, k in zip(programs, transports(), kernels, strict=True)
    )
    dq, dk, dv, peaks = (list(column) for column in zip(*backward, strict=True))
    record.peak["backward"] = peaks
    return Result(*(layout.unshard(parts) for parts in (o, lse, dq, dk, dv)))


def _own_bytes(call: Call, steps: list[ProgramStep]) -> int:
    width = {
        payload: sum((dim or 1) * getattr(torch, dtype).itemsize for dim, dtype in call.payload_fields(payload))
        for payload in HELD_PAYLOADS
    }
    return sum(
        own_rows * (key.h1 - key.h0) * width[key.payload]
        for step in steps
        for key, (_, own_rows) in step.allocate.items()
        if key.payload in HELD_PAYLOADS
    )


def planned_bytes(plan: Plan) -> Counter:
    rows = plan.bytes()
    return Counter({(int(s), int(d), int(p)): int(b) for s, d, p, b in zip(*rows.values(), strict=True)})
