"""`causal_conv1d`: short causal convolutions over documents (Mamba, Gated DeltaNet, Canon layers) by a plan, differentiable."""

# T tokens on this rank, C channels, H heads of C / H channels each, W taps

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distattn.ir.arguments import checked
from distattn.ir.bands import HI, LO, OK, OQ, Q0, Q1
from distattn.ir.errors import DistattnError
from distattn.ir.plan import Call, Plan
from distattn.kernels.spec import ScoreMod
from distattn.ops.attention import autocast_inputs, interleaved_batch
from distattn.ops.executable import Executable, prepare
from distattn.parallel.runtime import execute_convolution
from distattn.parallel.runtime.execute import run_to_completion
from distattn.parallel.runtime.execute_convolution import ConvolutionKernel

_NO_SCORE = ScoreMod(1.0)


@checked
def causal_conv1d(
    x_TC: Tensor,
    weight_CW: Tensor,
    plan: Plan | Executable,
    group: dist.ProcessGroup | None = None,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """A causal depthwise convolution of this rank's tokens, differentiable; a collective call of all ranks of the plan.

    y_t = sum_i weight[:, i] x_(t - W + 1 + i) + bias, over the tokens of t's document alone: what is before its first token is
    0. x_TC (T, C) holds this rank's T tokens in the layout's local order, weight_CW (C, W) and bias (C,) are the same on all
    ranks, and their gradients are this rank's share, to be summed over ranks like any parameter's. The result has x's dtype.

    plan: of op "convolution" on the mask `Mask.documents(lengths, (W - 1, 0))` with heads x v_head_dim = C, which ranks compare
    at every call, or what `prepare` made of one. What moves is each stretch's W - 1 tokens before it. Raises PlanError when the
    plan cannot be proven or ranks have different ones, DistattnError when the tensors do not fit it.
    """
    if isinstance(plan, Executable) and group is not None:
        raise DistattnError("an executable knows its group; give it to prepare instead.")
    if interleaved_batch() is not None:
        raise DistattnError("convolutions cannot take turns with other micro-batches yet; leave OverlapSchedule out.")
    executable = plan if isinstance(plan, Executable) else prepare(plan, group, device=x_TC.device)
    (x_TC,) = autocast_inputs(x_TC)
    _check_inputs(executable, x_TC, weight_CW, bias)
    call = executable.program.call
    by_heads = x_TC.reshape(-1, call.heads, call.v_head_dim), weight_CW.reshape(call.heads, call.v_head_dim, -1)
    y_TC = cast(Tensor, _Convolution.apply(executable, *by_heads)).reshape(x_TC.shape)
    return y_TC if bias is None else y_TC + bias.to(y_TC.dtype)


def _check_inputs(executable: Executable, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    program = executable.program
    call = program.call
    if call.op.kind != "convolution":
        raise DistattnError(f'the plan is of {call.op.name}, not of a convolution; make_plan takes op="convolution".')
    shape = program.tokens, call.heads * call.v_head_dim
    if tuple(x.shape) != shape:
        raise DistattnError(f"x has shape {tuple(x.shape)}; the plan wants {shape} on rank {program.rank}.")
    if str(x.dtype) != f"torch.{call.dtype}":
        raise DistattnError(f"x is {str(x.dtype)[6:]}, the plan was made for {call.dtype}.")
    if weight.dim() != 2 or len(weight) != shape[1]:
        raise DistattnError(f"weight has shape {tuple(weight.shape)}; wanted is ({shape[1]}, taps).")
    if bias is not None and tuple(bias.shape) != shape[1:]:
        raise DistattnError(f"bias has shape {tuple(bias.shape)}; wanted is {shape[1:]}.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (not tensor.is_floating_point() or tensor.device != x.device):
            raise DistattnError(
                f"{name} is {str(tensor.dtype)[6:]} on {tensor.device}; floating point on {x.device} is wanted."
            )
    taps = _taps(call)
    if taps is not None and weight.shape[1] != taps:
        raise DistattnError(
            f"weight has {weight.shape[1]} taps, the plan's mask lets each token see {taps}: "
            f"plan it on Mask.documents(lengths, ({weight.shape[1] - 1}, 0))."
        )


def _taps(call: Call) -> int | None:
    """How many tokens each sees, itself among them; None where every document is shorter. Raises where that differs."""
    pieces = call.mask.pieces
    shift = pieces[:, OK] - pieces[:, OQ]
    reach, length = -(pieces[:, LO] + shift), pieces[:, Q1] - pieces[:, Q0]
    limited = np.unique(reach[reach < length - 1])
    if len(limited) > 1 or (pieces[:, HI] + shift != 0).any():
        raise DistattnError("a convolution's mask lets all tokens see equally many before them and none after them.")
    return int(limited[0]) + 1 if len(limited) else None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, executable: Executable, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous()
        executable.begin_pass("forward", _NO_SCORE)
        run = execute_convolution.forward(
            executable.program, executable.transport, _kernel(executable), x, weight.detach()
        )
        y, kept = run_to_completion(run)
        ctx.save_for_backward(x, weight, kept)
        ctx.executable = executable
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, kept = ctx.saved_tensors
        executable = ctx.executable
        executable.begin_pass("backward", _NO_SCORE)
        run = execute_convolution.backward(
            executable.program, executable.transport, _kernel(executable), dy.contiguous(), x, weight.detach(), kept
        )
        dx, dweight = run_to_completion(run)
        return None, dx, dweight.to(weight.dtype)


def _kernel(executable: Executable) -> ConvolutionKernel:
    return cast(ConvolutionKernel, executable.kernel)
