"""The executor: runs a program on one rank, forward and backward, over any transport and kernel.

One loop serves both directions. In each step messages are posted first, then kernels run on what was there when the step
began, then messages are awaited and the partial results that arrived are merged: own tasks first, then arrivals in order.
The functions are generators that pause while messages are in flight, so that the ranks of one process can run in lock step.
"""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from distattn.ir.plan import REDUCED_PAYLOADS, Payload
from distattn.kernels.registry import Kernel
from distattn.kernels.spec import ScoreMod
from distattn.parallel.runtime.buffers import Buffers, Fields
from distattn.parallel.runtime.program import KernelLaunch, Message, Program, ProgramStep, kept_key
from distattn.parallel.runtime.transport import Packet, Transport

Compute = Callable[[KernelLaunch, dict[Payload, Fields]], dict[Payload, Fields]]
Result = TypeVar("Result")
# a generator that pauses while messages are in flight, and returns its result
PausableRun = Generator[None, None, Result]


def forward(
    program: Program,
    transport: Transport,
    kernel: Kernel,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    score: ScoreMod,
) -> PausableRun[tuple[Tensor, Tensor, Tensor, int]]:
    """Core attention of this rank's tokens: (o_THE, lse_TH, kept, peak).

    lse is in the accumulation dtype, and so is o, or in the inputs' where nothing is added to it.

    `kept` is one flat tensor of everything the backward will find again (empty unless the policy is "keep"); `peak` is the
    most bytes of buffers, beside the rank's own tensors and `kept`, that were alive at once.
    """
    call = program.call
    buffers = Buffers(call, q_THD, program.blank, program.unadded)
    buffers.bind_own(Payload.Q, (q_THD,))
    buffers.bind_own(Payload.KV, (k_TKD, v_TKE))
    o_THE, lse_TH = buffers.new_own(Payload.O, program.tokens)
    kept = q_THD.new_empty(kept_elements(program))
    buffers.bind_flat(program.kept, kept)

    def compute(launch: KernelLaunch, operands: dict[Payload, Fields]) -> dict[Payload, Fields]:
        (q,), (k, v) = operands[Payload.Q], operands[Payload.KV]
        inputs = (q, k, v, launch.schedule, score.for_heads(launch.heads))
        view = launch.results[Payload.O]
        into = buffers.without_copy(view) if kernel.ACCUMULATES else None
        if into is None:
            return {Payload.O: kernel.forward(*inputs)}
        kernel.forward(*inputs, into=into, merge=not view.slices[0].is_first)
        return {}

    yield from _run("forward", program.forward, transport, buffers, compute)
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
    buffers = Buffers(call, q_THD, program.blank, program.unadded)
    buffers.bind_own(Payload.Q, (q_THD,))
    buffers.bind_own(Payload.KV, (k_TKD, v_TKE))
    buffers.bind_own(Payload.dO, (do_THE, lse_TH, delta_TH))
    (dq_THD,) = buffers.new_own(Payload.dQ, program.tokens)
    dk_TKD, dv_TKE = buffers.new_own(Payload.dKV, program.tokens)
    buffers.bind_flat({kept_key(key): rows for key, rows in program.kept.items()}, kept)

    def compute(launch: KernelLaunch, operands: dict[Payload, Fields]) -> dict[Payload, Fields]:
        (q,), (k, v), (do, lse, delta) = operands[Payload.Q], operands[Payload.KV], operands[Payload.dO]
        inputs = (do, q, k, v, lse, delta, launch.schedule, score.for_heads(launch.heads))
        if not kernel.ACCUMULATES:
            dq, dk, dv = kernel.backward(*inputs)
            return {Payload.dQ: (dq,), Payload.dKV: (dk, dv)}
        into = {payload: buffers.without_copy(view) for payload, view in launch.results.items()}
        into_dq, into_dkv = into[Payload.dQ], into[Payload.dKV]
        # what has no place of its own is new, and is added to buffers afterwards
        add = tuple(
            into[payload] is not None and not launch.results[payload].slices[0].is_first
            for payload in (Payload.dQ, Payload.dKV)
        )
        dq, dk, dv = kernel.backward(*inputs, into=(None if into_dq is None else into_dq[0], into_dkv), add=add)
        made = {Payload.dQ: (dq,), Payload.dKV: (dk, dv)}
        return {payload: fields for payload, fields in made.items() if into[payload] is None}

    yield from _run("backward", program.backward, transport, buffers, compute)
    return dq_THD.to(q_THD.dtype), dk_TKD.to(k_TKD.dtype), dv_TKE.to(v_TKE.dtype), buffers.peak


def kept_elements(program: Program) -> int:
    """How many numbers the forward keeps for the backward on this rank."""
    call = program.call
    width = {Payload.Q: call.head_dim, Payload.KV: call.head_dim + call.v_head_dim}
    return sum(rows * (key.h1 - key.h0) * width[key.payload] for key, rows in program.kept.items())


def run_to_completion(run: PausableRun[Result]) -> Result:
    """Run one rank to its end; it blocks while it waits for messages."""
    return run_in_lock_step([run])[0]


def run_in_lock_step(runs: Iterable[PausableRun[Result]]) -> list[Result]:
    """Run all ranks of a plan in one thread: every rank posts the messages of a step before any rank waits for them."""
    waiting = list(enumerate(runs))
    results: dict[int, Result] = {}
    while waiting:
        unfinished = []
        for rank, run in waiting:
            try:
                next(run)
                unfinished.append((rank, run))
            except StopIteration as stop:
                results[rank] = stop.value
        waiting = unfinished
    return [results[rank] for rank in sorted(results)]


def _run(
    direction: str, steps: list[ProgramStep], transport: Transport, buffers: Buffers, compute: Compute
) -> PausableRun[None]:
    for number, step in enumerate(steps):
        # a call of its own: nothing may hold on to a step's tensors when the next one allocates
        where = f"in step {number + 1} of {len(steps)} of the {direction} pass"
        yield from _run_step(step, transport, buffers, compute, where)


def _run_step(
    step: ProgramStep, transport: Transport, buffers: Buffers, compute: Compute, where: str
) -> PausableRun[None]:
    for key, (rows, own_rows) in step.allocate.items():
        buffers.allocate(key, rows, own_rows)
    for key, view in step.own_copies:
        buffers.copy_own(key, view)
    sends = [packet for payload, message in step.sends for packet in _outgoing(buffers, payload, message)]
    incoming, receives = [], []
    for payload, message in step.receives:
        fields, places = buffers.receive_buffer(payload, message.view, message.stretches)
        incoming.append((payload, message, fields))
        receives += [Packet(message.peer, payload, tensor) for place in places for tensor in place]
    pending = transport.exchange(sends, receives, step.collective, where)
    for launch in step.launches:
        _launch(launch, buffers, compute)
    for key, view in step.own_results:
        buffers.accumulate(key.payload, view, buffers.fields[key])
    yield
    pending.wait()
    for payload, message, fields in incoming:
        if payload in REDUCED_PAYLOADS:
            buffers.accumulate(payload, message.view, fields)
            buffers.uncount(fields)
    for key in step.release:
        buffers.release(key)


def _launch(launch: KernelLaunch, buffers: Buffers, compute: Compute) -> None:
    # a call of its own, again: the next launch's tensors take the place of these
    operands = {payload: buffers.gather(payload, view) for payload, view in launch.operands.items()}
    for payload, fields in compute(launch, operands).items():
        buffers.accumulate(payload, launch.results[payload], fields)


def _outgoing(buffers: Buffers, payload: Payload, message: Message) -> list[Packet]:
    dtypes = [getattr(torch, dtype) for _, dtype in buffers.call.comm_fields(payload)]
    return [
        Packet(message.peer, payload, tensor.to(dtype))
        for fields in buffers.message_parts(payload, message.view, message.stretches)
        for tensor, dtype in zip(fields, dtypes, strict=True)
    ]
