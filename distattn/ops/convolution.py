"""`causal_conv1d`: short causal convolutions over documents (Mamba, Gated DeltaNet, Canon layers) by a plan, differentiable."""

# T tokens on this rank, C channels, H heads of C / H channels each, W taps

from __future__ import annotations

from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distattn.ir.bands import HI, LO, OK, OQ, Q0, Q1
from distattn.ir.errors import DistattnError
from distattn.ir.plan import Call, Plan
from distattn.kernels.spec import ScoreMod
from distattn.ops.attention import autocast_inputs, interleaved_batch
from distattn.ops.executable import EXECUTABLES, Executable, prepare
from distattn.parallel.runtime import execute_convolution
from distattn.parallel.runtime.execute import run_to_completion
from distattn.parallel.runtime.execute_convolution import ConvolutionKernel

_NO_SCORE = ScoreMod(1.0)


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
    # `arguments.checked` would break the graph of torch.compile
    for name, tensor in (("x", x_TC), ("weight", weight_CW), ("bias", bias)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name != "bias"):
            raise DistattnError(f"{name} is a {type(tensor).__name__}; a tensor is wanted.")
    if not isinstance(plan, (Plan, Executable)):
        raise DistattnError(f"plan is what make_plan or prepare returned, not a {type(plan).__name__}.")
    if isinstance(plan, Executable) and group is not None:
        raise DistattnError("an executable knows its group; give it to prepare instead.")
    if interleaved_batch() is not None:
        raise DistattnError("convolutions cannot take turns with other micro-batches yet; leave OverlapSchedule out.")
    executable = plan if isinstance(plan, Executable) else prepare(plan, group, device=x_TC.device)
    (x_TC,) = autocast_inputs(x_TC)
    _check_inputs(executable, x_TC, weight_CW, bias)
    call = executable.program.call
    by_heads = x_TC.reshape(-1, call.heads, call.v_head_dim), weight_CW.reshape(call.heads, call.v_head_dim, -1)
    y_THD, _ = torch.ops.distattn.convolution_forward(*by_heads, executable.handle, executable.kept_elements)
    y_TC = cast(Tensor, y_THD).reshape(x_TC.shape)
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


def _check_taps(call: Call, taps: int) -> None:
    """Not where torch.compile traces: masks are NumPy's."""
    planned = _taps(call)
    if planned not in (None, taps):
        raise DistattnError(
            f"weight has {taps} taps, the plan's mask lets each token see {planned}: "
            f"plan it on Mask.documents(lengths, ({taps - 1}, 0))."
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


torch.library.define(
    "distattn::convolution_forward",
    "(Tensor x, Tensor weight, SymInt plan, SymInt kept_elements) -> (Tensor y, Tensor kept)",
)
torch.library.define(
    "distattn::convolution_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor kept, SymInt plan) -> (Tensor dx, Tensor dweight)",
)


def _forward(x, weight, plan, kept_elements):  # noqa: ANN001
    executable = EXECUTABLES.by_handle(plan).for_direction("forward")
    _check_taps(executable.program.call, weight.shape[2])
    executable.begin_pass("forward", _NO_SCORE)
    given = executable.program, executable.transport, _kernel(executable), x.contiguous(), weight
    return run_to_completion(execute_convolution.forward(*given))


torch.library.impl("distattn::convolution_forward", "CompositeExplicitAutograd", _forward)


@torch.library.register_fake("distattn::convolution_forward")
def _forward_fake(x, weight, plan, kept_elements):  # noqa: ANN001
    return x.new_empty(x.shape), x.new_empty(kept_elements)


def _backward(dy, x, weight, kept, plan):  # noqa: ANN001
    executable = EXECUTABLES.by_handle(plan).for_direction("backward")
    executable.begin_pass("backward", _NO_SCORE)
    given = executable.program, executable.transport, _kernel(executable), dy.contiguous(), x.contiguous(), weight, kept
    dx, dweight = run_to_completion(execute_convolution.backward(*given))
    return dx, dweight.to(weight.dtype)


torch.library.impl("distattn::convolution_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("distattn::convolution_backward")
def _backward_fake(dy, x, weight, kept, plan):  # noqa: ANN001
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    x, weight, plan, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])
    ctx.plan = plan
    # the executable outlives its plan until the backward has run; under torch.compile the caller holds it
    ctx.executable = EXECUTABLES.by_handle(plan) if type(plan) is int else None


def _differentiate(ctx, dy, dkept):
    x, weight, kept = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    return *torch.ops.distattn.convolution_backward(dy, x, weight, kept, ctx.plan), None, None


def _refuse_second_derivative(ctx, *grads):
    raise DistattnError("a convolution has no second derivative here: a gradient of its gradients was asked for.")


torch.library.register_autograd("distattn::convolution_backward", _refuse_second_derivative)
torch.library.register_autograd("distattn::convolution_forward", _differentiate, setup_context=_save)


def _kernel(executable: Executable) -> ConvolutionKernel:
    return cast(ConvolutionKernel, executable.kernel)
