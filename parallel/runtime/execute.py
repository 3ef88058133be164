"""The executor: runs a lowered plan on one rank, forward and backward, over any transport and kernel.

One loop serves both directions. In each step messages are posted first, then kernels run on what was there when the step
began, then messages are awaited and partial results that arrived are merged: own tasks first, then arrivals in order.
The functions are generators that pause while messages are in flight, so that ranks of one process can run in lock step.
"""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from distattn.ir.plan import REDUCED_PAYLOADS, Call, Payload
from distattn.kernels.merge import merge_
from distattn.kernels.registry import Kernel
from distattn.kernels.spec import ScoreMod
from distattn.parallel.runtime.program import KernelLaunch, Message, Program, ProgramStep, kept_key
from distattn.parallel.runtime.transport import Packet, Transport
from distattn.parallel.runtime.views import OWN, BufferKey, View

Fields = tuple[Tensor, ...]
Compute = Callable[[KernelLaunch, dict[Payload, Fields]], dict[Payload, Fields]]
Result = TypeVar("Result")
PausableRun = Generator[None, None, Result]


def forward(
    program: Program, transport: Transport, kernel: Kernel, q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, score: ScoreMod
) -> PausableRun[tuple[Tensor, Tensor, Tensor, int]]:
    """Core attention of this rank's tokens: (o_THE and lse_TH in the accumulation dtype, kept, peak).

    `kept` is one flat tensor of everything the backward will find again (empty unless the policy is "keep"); `peak`
    the most bytes of buffers beside the rank's own tensors and `kept` that were alive at once.
    """
    call = program.call
    buffers = _Buffers(call, q_THD)
    buffers.own(Payload.Q, (q_THD,))
    buffers.own(Payload.KV, (k_TKD, v_TKE))
    o_THE, lse_TH = buffers.own(Payload.O, buffers.new(Payload.O, program.tokens, call.heads))
    kept = q_THD.new_empty(kept_elements(program))
    buffers.lay_out(program.kept, kept)

    def compute(launch: KernelLaunch, operands: dict[Payload, Fields]) -> dict[Payload, Fields]:
        (q,), (k, v) = operands[Payload.Q], operands[Payload.KV]
        inputs = (q, k, v, launch.work, score.for_heads(launch.heads))
        view = launch.results[Payload.O]
        into = buffers.part(view) if kernel.ACCUMULATES else None
        if into is None:
            return {Payload.O: kernel.forward(*inputs)}
        kernel.forward(*inputs, into=into, merge=not view.slices[0].fresh)
        return {}

    yield from _run(program.forward, transport, buffers, compute)
    return o_THE, lse_TH, kept, buffers.peak


def backward(
    program: Program,
    transport: Transport,
    kernel: Kernel,
    do_THE: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    kept: Tensor,
    score: ScoreMod,
) -> PausableRun[tuple[Tensor, Tensor, Tensor, int]]:
    """Gradients (dq_THD, dk_TKD, dv_TKE) in the inputs' dtype, and the peak of buffer bytes as in `forward`.

    delta_TH is rowsum(dO * O), minus the gradient of the log-sum-exp where there is one.
    """
    call = program.call
    buffers = _Buffers(call, q_THD)
    buffers.own(Payload.Q, (q_THD,))
    buffers.own(Payload.KV, (k_TKD, v_TKE))
    buffers.own(Payload.dO, (do_THE, lse_TH, delta_TH))
    (dq_THD,) = buffers.own(Payload.dQ, buffers.new(Payload.dQ, program.tokens, call.heads))
    dk_TKD, dv_TKE = buffers.own(Payload.dKV, buffers.new(Payload.dKV, program.tokens, call.kv_heads))
    buffers.lay_out({kept_key(key): rows for key, rows in program.kept.items()}, kept)

    def compute(launch: KernelLaunch, operands: dict[Payload, Fields]) -> dict[Payload, Fields]:
        (q,), (k, v), (do, lse, delta) = operands[Payload.Q], operands[Payload.KV], operands[Payload.dO]
        inputs = (do, q, k, v, lse, delta, launch.work, score.for_heads(launch.heads))
        if not kernel.ACCUMULATES:
            dq, dk, dv = kernel.backward(*inputs)
            return {Payload.dQ: (dq,), Payload.dKV: (dk, dv)}
        parts = {payload: buffers.part(view) for payload, view in launch.results.items()}
        to_dq, to_dkv = parts[Payload.dQ], parts[Payload.dKV]
        dq, dk, dv = kernel.backward(*inputs, into=(None if to_dq is None else to_dq[0], to_dkv))
        made = {Payload.dQ: (dq,), Payload.dKV: (dk, dv)}
        return {payload: fields for payload, fields in made.items() if parts[payload] is None}

    yield from _run(program.backward, transport, buffers, compute)
    return dq_THD.to(q_THD.dtype), dk_TKD.to(k_TKD.dtype), dv_TKE.to(v_TKE.dtype), buffers.peak


def kept_elements(program: Program) -> int:
    """Numbers the forward keeps for the backward on this rank."""
    call = program.call
    width = {Payload.Q: call.head_dim, Payload.KV: call.head_dim + call.v_head_dim}
    return sum(rows * (key.h1 - key.h0) * width[key.payload] for key, rows in program.kept.items())


def run_to_completion(run: PausableRun[Result]) -> Result:
    """Run one rank to its end; waiting blocks."""
    return run_in_lock_step([run])[0]


def run_in_lock_step(runs: Iterable[PausableRun[Result]]) -> list[Result]:
    """Run all ranks of a plan in lock step: every rank posts its messages before any waits."""
    waiting = list(enumerate(runs))
    results: dict[int, Result] = {}
    while waiting:
        still = []
        for rank, run in waiting:
            try:
                next(run)
                still.append((rank, run))
            except StopIteration as stop:
                results[rank] = stop.value
        waiting = still
    return [results[rank] for rank in sorted(results)]


def _run(steps: list[ProgramStep], transport: Transport, buffers: _Buffers, compute: Compute) -> PausableRun[None]:
    for step in steps:
        # a call of its own: nothing may hold on to a step's tensors when the next one allocates
        yield from _run_step(step, transport, buffers, compute)


def _run_step(step: ProgramStep, transport: Transport, buffers: _Buffers, compute: Compute) -> PausableRun[None]:
    for key, rows in step.allocate.items():
        buffers.allocate(key, rows)
    sends = [packet for payload, message in step.sends for packet in _outgoing(buffers, payload, message)]
    incoming = [(payload, message, buffers.landing(payload, message.view)) for payload, message in step.receives]
    receives = [Packet(m.peer, payload, tensor) for payload, m, fields in incoming for tensor in fields]
    work = transport.exchange(sends, receives, step.collective)
    for launch in step.launches:
        operands = {payload: buffers.gather(payload, view) for payload, view in launch.operands.items()}
        for payload, fields in compute(launch, operands).items():
            buffers.deposit(payload, launch.results[payload], fields)
    yield
    work.wait()
    for payload, message, fields in incoming:
        if payload in REDUCED_PAYLOADS:
            buffers.deposit(payload, message.view, fields)
            buffers.discount(fields)
    for key in step.release:
        buffers.release(key)


def _outgoing(buffers: _Buffers, payload: Payload, message: Message) -> list[Packet]:
    fields = zip(buffers.gather(payload, message.view), buffers.call.comm_fields(payload), strict=True)
    return [Packet(message.peer, payload, tensor.to(getattr(torch, dtype))) for tensor, (_, dtype) in fields]


class _Buffers:
    """The tensors of one pass on one rank, by buffer key, with a count of the bytes beside the rank's own."""

    def __init__(self, call: Call, like: Tensor):
        self.call, self.like = call, like
        self.fields: dict[BufferKey, Fields] = {}
        self.fixed: set[BufferKey] = set()
        self.alive = self.peak = 0

    def new(self, payload: Payload, rows: int, heads: int, travelled: bool = False) -> Fields:
        """Fresh tensors (rows, heads, width) of a payload; accumulating ones start as "nothing yet"."""
        out = []
        for width, dtype in self.call.comm_fields(payload) if travelled else self.call.payload_fields(payload):
            shape = (rows, heads) if width is None else (rows, heads, width)
            make = torch.zeros if payload in REDUCED_PAYLOADS else torch.empty
            out.append(make(shape, dtype=getattr(torch, dtype), device=self.like.device))
        if payload == Payload.O:
            out[1].fill_(-torch.inf)
        return tuple(out)

    def own(self, payload: Payload, fields: Fields) -> Fields:
        self.fields[BufferKey(payload, OWN, 0, self.call.payload_heads(payload))] = fields
        return fields

    def lay_out(self, batches: dict[BufferKey, int], flat: Tensor) -> None:
        """Make these batches views of one flat tensor; they are counted by whoever owns it."""
        at = 0
        for key, rows in batches.items():
            fields = []
            for width, _ in self.call.payload_fields(key.payload):
                shape = (rows, key.h1 - key.h0, width or 1)
                size = shape[0] * shape[1] * shape[2]
                fields.append(flat[at : at + size].view(shape))
                at += size
            self.fields[key] = tuple(fields)
            self.fixed.add(key)

    def allocate(self, key: BufferKey, rows: int) -> None:
        if key not in self.fixed:
            self.fields[key] = self._counted(self.new(key.payload, rows, key.h1 - key.h0))

    def release(self, key: BufferKey) -> None:
        self.discount(self.fields.pop(key))

    def discount(self, fields: Fields) -> None:
        """These tensors are done with."""
        self.alive -= sum(tensor.nbytes for tensor in fields)

    def landing(self, payload: Payload, view: View) -> Fields:
        """Where a message is received: straight into its batch, or for partial results into a tensor of its own."""
        if payload in REDUCED_PAYLOADS:
            return self._counted(self.new(payload, view.rows, view.heads, travelled=True))
        (buffer_slice,) = view.slices
        return tuple(tensor[buffer_slice.rows] for tensor in self.fields[buffer_slice.buffer])

    def part(self, view: View) -> Fields | None:
        """The part of a buffer that a view is, if it is one."""
        if not view.whole or len(view.slices) != 1 or not isinstance(view.slices[0].rows, slice):
            return None
        buffer_slice = view.slices[0]
        return tuple(tensor[buffer_slice.rows, buffer_slice.heads] for tensor in self.fields[buffer_slice.buffer])

    def gather(self, payload: Payload, view: View) -> Fields:
        """The working tensors of a view: a view of one buffer where that is all there is to it, else a copy."""
        part = self.part(view)
        if part is not None:
            return part
        out = self.new(payload, view.rows, view.heads)
        if not view.whole:
            # kernels may read whole tiles: what no task uses shall at least be a number
            for tensor in out:
                tensor.zero_()
        for buffer_slice in view.slices:
            for whole, tensor in zip(out, self.fields[buffer_slice.buffer], strict=True):
                whole[:, buffer_slice.view_heads][buffer_slice.view_rows] = tensor[:, buffer_slice.heads][
                    buffer_slice.rows
                ]
        return out

    def deposit(self, payload: Payload, view: View, fields: Fields) -> None:
        """Accumulate working tensors into the buffers they belong to: O by log-sum-exp, gradients by sum."""
        for buffer_slice in view.slices:
            parts = tuple(tensor[buffer_slice.view_rows, buffer_slice.view_heads] for tensor in fields)
            totals = tuple(tensor[:, buffer_slice.heads] for tensor in self.fields[buffer_slice.buffer])
            if buffer_slice.fresh:
                for total, part in zip(totals, parts, strict=True):
                    # what has travelled may be narrower
                    total[buffer_slice.rows] = part.to(total.dtype)
                continue
            held = tuple(total[buffer_slice.rows] for total in totals)
            if payload == Payload.O:
                merge_(*held, *parts)
            else:
                for total, part in zip(held, parts, strict=True):
                    total += part
            # an index gives copies where a slice gives views
            if not isinstance(buffer_slice.rows, slice):
                for total, merged in zip(totals, held, strict=True):
                    total[buffer_slice.rows] = merged

    def _counted(self, fields: Fields) -> Fields:
        self.alive += sum(tensor.nbytes for tensor in fields)
        self.peak = max(self.peak, self.alive)
        return fields
