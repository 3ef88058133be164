"""The executor of convolutions. It resembles attention's, but has only values. If there are weights, every rank holds them.

A weight is (H, D, W), or (H, D, D, W) if the channels of a head are mixed.
"""

# T tokens on this rank, H heads of D channels each, W taps

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from distattn.ir.plan import Payload
from distattn.parallel.runtime.arenas import ARENAS
from distattn.parallel.runtime.communication.transport import Transport
from distattn.parallel.runtime.execution.buffers import Buffers, Fields, convert_sums
from distattn.parallel.runtime.execution.execute import PausableRun, Target, run_steps
from distattn.parallel.runtime.lowering.memory import forward_arena_bytes
from distattn.parallel.runtime.program import KernelLaunch, Program, kept_key


class ConvolutionKernel(Protocol):
    """The functions of a kernel module for convolutions. See `distattn.kernels.convolution.taps`."""

    def forward(self, x_SHD: Tensor, weight: Tensor | None, schedule: Any) -> Tensor: ...

    def backward(
        self, do_THD: Tensor, x_SHD: Tensor, weight: Tensor | None, schedule: Any
    ) -> tuple[Tensor, Tensor | None]: ...


def forward(
    program: Program, transport: Transport, kernel: ConvolutionKernel, x_THD: Tensor, weight: Tensor | None
) -> PausableRun[tuple[Tensor, Tensor]]:
    """Compute (y_THD, kept). y is in x's dtype, and `kept` is one flat tensor of all that the backward pass needs."""

    def compute(
        launch: KernelLaunch, operands: dict[Payload, Fields], targets: dict[Payload, Target]
    ) -> dict[Payload, Fields]:
        (x,) = operands[Payload.KV]
        return {Payload.O: (kernel.forward(x, _of_heads(weight, launch), launch.schedule),)}

    with (
        ARENAS.kept(program.kept_places.numbers, x_THD.dtype, x_THD.device) as kept,
        ARENAS.borrowed(forward_arena_bytes(program, x_THD, weight), x_THD.device) as arena,
    ):
        buffers = _buffers(program, arena, x_THD)
        buffers.bind_flat(program.kept_places, kept)
        sums = [*buffers.new_own(Payload.O)]
        yield from run_steps("forward", program.forward, transport, buffers, compute, False)
        buffers.close()
    (y_THD,) = convert_sums(sums, [x_THD.dtype])
    return y_THD, kept


def backward(
    program: Program,
    transport: Transport,
    kernel: ConvolutionKernel,
    dy_THD: Tensor,
    x_THD: Tensor,
    weight: Tensor | None,
    kept: Tensor,
) -> PausableRun[tuple[Tensor, Tensor | None]]:
    """Compute dx_THD, in x's dtype, and this rank's share of the weight's gradient, in the accumulation dtype, or None."""
    wide = getattr(torch, program.call.accumulation_dtype)
    dweight = None if weight is None else torch.zeros_like(weight, dtype=wide)

    def compute(
        launch: KernelLaunch, operands: dict[Payload, Fields], targets: dict[Payload, Target]
    ) -> dict[Payload, Fields]:
        (x,), (dy,) = operands[Payload.KV], operands[Payload.dO]
        dx, dweight_part = kernel.backward(dy, x, _of_heads(weight, launch), launch.schedule)
        if dweight is not None and dweight_part is not None:
            dweight[launch.heads] += dweight_part
        return {Payload.dQ: (), Payload.dKV: (dx,)}

    with ARENAS.borrowed(program.backward_bytes, x_THD.device) as arena:
        buffers = _buffers(program, arena, x_THD)
        buffers.bind_own({Payload.dO: (dy_THD,)})
        buffers.bind_flat(program.kept_places, kept, kept_key)
        buffers.new_own(Payload.dQ)
        sums = [*buffers.new_own(Payload.dKV)]
        yield from run_steps("backward", program.backward, transport, buffers, compute, False)
        buffers.close()
    (dx_THD,) = convert_sums(sums, [x_THD.dtype])
    return dx_THD, dweight


def _buffers(program: Program, arena: Tensor, x_THD: Tensor) -> Buffers:
    buffers = Buffers(program, arena)
    # a convolution has no queries
    buffers.bind_own({Payload.Q: (), Payload.KV: (x_THD,)})
    return buffers


def _of_heads(weight: Tensor | None, launch: KernelLaunch) -> Tensor | None:
    return None if weight is None else weight[launch.heads]
