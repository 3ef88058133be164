"""`causal_conv1d` and `token_shift`: differentiable ops that read a few neighbouring tokens of the same document, with a plan."""

# T tokens on this rank, C channels, H heads of C / H channels each, W taps, G groups of C / G channels each, M documents

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distattn.ir.bands import HI, LO, OK, OQ, Q0, Q1
from distattn.ir.errors import DistattnError
from distattn.ir.intervals import Ints
from distattn.ir.op import CONVOLUTION, TOKEN_SHIFT
from distattn.ir.plan import Call, Plan
from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.registry import load_kernel
from distattn.kernels.spec import ScoreMod
from distattn.ops.attention import autocast_inputs
from distattn.ops.executable import Executable, kernel_requirements
from distattn.ops.plan_argument import check_flag, executable_of
from distattn.ops.planned_op import PlannedPass, register_planned_op
from distattn.parallel.runtime.communication.streams import copy_to_device, has_streams
from distattn.parallel.runtime.execution import execute_convolution
from distattn.parallel.runtime.execution.execute_convolution import ConvolutionKernel

_NO_SCORE = ScoreMod(1.0)
# integers up to this are exact in float64, the dtype in which they are sent
_MOST_WHOLE = 1 << 52
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def causal_conv1d(
    x_TC: Tensor,
    weight: Tensor,
    plan: Plan | Executable,
    group: dist.ProcessGroup | None = None,
    *,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """Compute a causal convolution over this rank's tokens; differentiable. A collective call of all ranks of the plan.

    y_t = activation(sum_i weight[..., i] x_(t - W + 1 + i) + bias), over the tokens of t's document only. x_TC (T, C) holds
    this rank's T tokens in the layout's local order. weight is (C, W), one filter per channel, or (C, C / G, W) with G groups,
    as in `torch.nn.Conv1d(C, C, W, groups=G)`. bias: (C,). activation: "silu" or None. The result has x's dtype.

    initial_state: (M, C, W - 1), the inputs before the first token of each of the M documents, on every rank; 0 by default.
    weight and bias are also the same on all ranks. The gradients of all three are this rank's share, to be summed over ranks
    like any parameter's. With return_final_state also return (M, C, W - 1) in x's dtype: the last W - 1 inputs of each
    document, preceded by its initial state if the document is shorter. Inputs that this rank does not have are 0, so that the
    sum over ranks is complete. Final states are refused inside torch.compile.

    plan: a plan of op "convolution" for the mask `Mask.documents(lengths, (W - 1, 0))` with heads x v_head_dim = C (G heads with
    groups), which ranks compare at every call, or its executable from `prepare`. The W - 1 tokens before each segment are sent.
    Raise PlanError if the plan cannot be proven or differs between ranks, DistattnError if the tensors do not fit it.
    """
    # `arguments.checked` would cause a graph break in torch.compile
    tensors = {"x": x_TC, "weight": weight, "bias": bias, "initial_state": initial_state}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("x", "weight")):
            raise DistattnError(f"{name} is a {type(tensor).__name__}; a tensor is needed.")
    if activation is not None and not (isinstance(activation, str) and activation == "silu"):
        raise DistattnError(f'activation must be "silu" or None, not {activation!r}; apply others to the result.')
    check_flag("return_final_state", return_final_state)
    if return_final_state and torch.compiler.is_compiling():
        raise DistattnError("final states of a convolution are not compiled; leave the call out of torch.compile.")
    executable = executable_of(
        plan, group, "causal_conv1d", x_TC.device, modifiers=["grouped"] if weight.dim() == 3 else []
    )
    (x_TC,) = autocast_inputs(x_TC)
    _check_inputs(executable, x_TC, weight, bias, initial_state)
    if return_final_state and weight.shape[-1] == 1:
        raise DistattnError("a convolution of 1 tap has no final state; leave return_final_state out.")
    call = executable.program.call
    by_heads = x_TC.reshape(-1, call.heads, call.v_head_dim), weight.unflatten(0, (call.heads, call.v_head_dim))
    plan_facts = executable.handle, executable.kept_elements
    y_THD, _ = torch.ops.distattn.convolution_forward(*by_heads, initial_state, *plan_facts)
    y_TC = cast(Tensor, y_THD).reshape(x_TC.shape)
    y_TC = y_TC if bias is None else y_TC + bias.to(y_TC.dtype)
    y_TC = y_TC if activation is None else F.silu(y_TC)
    return (y_TC, _final_state(executable, x_TC, initial_state, weight.shape[-1])) if return_final_state else y_TC


def token_shift(
    x_T: Tensor, plan: Plan | Executable, group: dist.ProcessGroup | None = None, *, fill: int = 0
) -> Tensor:
    """Return an earlier or later token of the same document for each of this rank's tokens: y_t = x_(t - distance).

    x_T (T, ...) holds this rank's T tokens in the layout's local order. y_t is 0 if there is no such token. This is a collective
    call of all ranks of the plan, and differentiable in x. Integers, such as labels, are sent as float64: x may be int64 if the
    plan is for float64, and y_t is `fill` if there is no such token.

    plan: a plan of op "token_shift" for the mask `Mask.token_shift(lengths, distance)` with heads x v_head_dim numbers per token,
    or its executable from `prepare`. Each segment sends `distance` tokens. Raise PlanError if the plan cannot be proven or
    differs between ranks, DistattnError if x does not fit it, or has integers of 2^52 or more. On a GPU such integers cause a
    device-side assertion, after which the process can no longer use the GPU.
    """
    if not isinstance(x_T, Tensor):
        raise DistattnError(f"x is a {type(x_T).__name__}; a tensor is needed.")
    if type(fill) is not int or abs(fill) > _MOST_WHOLE:
        raise DistattnError(f"fill must be a whole number between -2^52 and 2^52, not {fill!r}.")
    executable = executable_of(plan, group, "token_shift", x_T.device)
    whole = x_T.dtype in _WHOLE
    if not x_T.dim() or not (whole or x_T.is_floating_point()):
        raise DistattnError(
            f"x is {tuple(x_T.shape)} of {str(x_T.dtype)[6:]}; tokens of floating point, or whole numbers below 2^52, are needed."
        )
    if x_T.dtype == torch.int64:
        _check_whole(x_T)
    if whole and not torch.iinfo(x_T.dtype).min <= fill <= torch.iinfo(x_T.dtype).max:
        raise DistattnError(f"x is {str(x_T.dtype)[6:]}, which cannot hold fill = {fill}; give int64.")
    if fill and not whole:
        raise DistattnError("fill is for whole numbers; missing tokens of floating point are 0.")
    call, program = executable.program.call, executable.program
    if call.op != TOKEN_SHIFT:
        raise DistattnError(f'the plan is of {call.op.name}, not of a token shift; make_plan takes op="token_shift".')
    # a missing token reads as 0, so send values relative to `fill` and add `fill` to what is read
    x = x_T.double() - fill if whole else x_T
    _check_tokens(executable, x.reshape(len(x), math.prod(x.shape[1:])))
    by_heads = x.reshape(program.tokens, call.heads, call.v_head_dim)
    y, _ = torch.ops.distattn.convolution_forward(by_heads, None, None, executable.handle, executable.kept_elements)
    y_T = cast(Tensor, y).reshape(x_T.shape)
    return (y_T + fill).to(x_T.dtype) if whole else y_T


def _check_whole(x_T: Tensor) -> None:
    """Raise DistattnError if an int64 value is 2^52 or more. On a GPU, a device-side assertion fails later instead."""
    too_large = "x has whole numbers of 2^52 or more; whole numbers below 2^52 are needed."
    fits = ((x_T < _MOST_WHOLE) & (x_T > -_MOST_WHOLE)).all()
    if has_streams(x_T.device):
        torch._assert_async(fits, too_large)
    elif not fits:
        raise DistattnError(too_large)


def _check_inputs(
    executable: Executable, x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None
) -> None:
    call = executable.program.call
    if call.op != CONVOLUTION:
        raise DistattnError(f'the plan is of {call.op.name}, not of a convolution; make_plan takes op="convolution".')
    _check_tokens(executable, x)
    channels = call.heads * call.v_head_dim
    if weight.dim() not in (2, 3) or len(weight) != channels or weight.shape[1:-1] not in ((), (call.v_head_dim,)):
        raise DistattnError(
            f"weight has shape {tuple(weight.shape)}; expected is ({channels}, taps), or for groups that the plan has as heads "
            f"({channels}, {call.v_head_dim}, taps)."
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise DistattnError(f"bias has shape {tuple(bias.shape)}; expected is {(channels,)}.")
    states = len(call.layout.ends), channels, weight.shape[-1] - 1
    if initial is not None and not states[2]:
        raise DistattnError("a convolution of 1 tap has no initial state; leave initial_state out.")
    if initial is not None and tuple(initial.shape) != states:
        raise DistattnError(f"initial_state has shape {tuple(initial.shape)}; expected is {states}, of all documents.")
    for name, tensor in (("weight", weight), ("bias", bias), ("initial_state", initial)):
        if tensor is not None and (not tensor.is_floating_point() or tensor.device != x.device):
            raise DistattnError(
                f"{name} is {str(tensor.dtype)[6:]} on {tensor.device}; floating point on {x.device} is needed."
            )


def _check_tokens(executable: Executable, x: Tensor) -> None:
    program = executable.program
    shape = program.tokens, program.call.heads * program.call.v_head_dim
    if tuple(x.shape) != shape:
        raise DistattnError(f"x has shape {tuple(x.shape)}; the plan needs {shape} on rank {program.rank}.")
    if str(x.dtype) != f"torch.{program.call.dtype}":
        raise DistattnError(f"x is {str(x.dtype)[6:]}, the plan was made for {program.call.dtype}.")


def _check_taps(call: Call, taps: int) -> None:
    """Raise DistattnError if the plan's mask is for a different number of taps.

    Not called while torch.compile traces, because masks are NumPy arrays.
    """
    planned = _taps(call)
    if planned not in (None, taps):
        raise DistattnError(
            f"weight has {taps} taps, the plan's mask lets each token see {planned}: "
            f"plan it on Mask.documents(lengths, ({taps - 1}, 0))."
        )


def _check_kernel(executable: Executable, grouped: bool) -> None:
    """Raise DistattnError if an executable's kernel does not support the filters. grouped: True if they mix channels."""
    key = executable.key
    needed = kernel_requirements(executable.program.call, key.device, ["grouped"] if grouped else [])
    if why := load_kernel(key.kernel).unsupported_reason(needed):
        raise DistattnError(
            f'kernel "{key.kernel}": {why}; prepare(plan, modifiers=["grouped"]) chooses one that does.'
        )


def _check_distance(call: Call) -> None:
    """Raise DistattnError if the mask is not a token shift. Not called while torch.compile traces."""
    pieces = call.mask.pieces
    if len(np.unique(pieces[:, [LO, HI]] + (pieces[:, OK] - pieces[:, OQ])[:, None])) > 1:
        raise DistattnError(
            "a token shift's mask lets each token see one, at one distance: Mask.token_shift(lengths, distance)."
        )


def _taps(call: Call) -> int | None:
    """Return W, the number of tokens that each token sees, including itself; None if no document is long enough to tell.

    Raise DistattnError if W varies, or if a token's range does not end at the token itself.
    """
    pieces = call.mask.pieces
    shift = pieces[:, OK] - pieces[:, OQ]
    reach, length = -(pieces[:, LO] + shift), pieces[:, Q1] - pieces[:, Q0]
    limited = np.unique(reach[reach < length - 1])
    if len(limited) > 1 or (pieces[:, HI] + shift != 0).any():
        raise DistattnError(
            "in a convolution's mask all tokens must see the same number of tokens before them, and none after them."
        )
    return int(limited[0]) + 1 if len(limited) else None


def _forward(executable, x, weight, initial):  # noqa: ANN001, ANN202
    if weight is None:
        _check_distance(executable.program.call)
    else:
        _check_taps(executable.program.call, weight.shape[-1])
        _check_kernel(executable, weight.dim() == 4)
    executable.begin_pass("forward", _NO_SCORE)
    arguments = executable.program, executable.transport, _kernel(executable), x.contiguous(), weight
    y, kept = yield from execute_convolution.forward(*arguments)
    if initial is not None:
        first = _first_tokens(executable, weight.shape[-1], x.device)
        y.index_add_(0, first.rows, _from_initial(initial, weight, first, y.dtype).to(y.dtype))
    return y, kept


def _forward_fake(x, weight, initial, plan, kept_elements):  # noqa: ANN001, ANN202
    return x.new_empty(x.shape), x.new_empty(kept_elements)


def _backward(executable, dy, x, weight, initial, kept):  # noqa: ANN001, ANN202
    executable.begin_pass("backward", _NO_SCORE)
    arguments = (
        executable.program,
        executable.transport,
        _kernel(executable),
        dy.contiguous(),
        x.contiguous(),
        weight,
        kept,
    )
    dx, dweight = yield from execute_convolution.backward(*arguments)
    dinitial = None
    if initial is not None and dweight is not None:
        first = _first_tokens(executable, weight.shape[-1], x.device)
        # use vjp: unlike autograd.grad, it works inside an operator
        pull_back = torch.func.vjp(lambda state, w: _from_initial(state, w, first, x.dtype), initial, weight)[1]
        dinitial, of_first = pull_back(dy[first.rows].to(dweight.dtype))
        dweight = dweight + of_first
    of_weight = None if dweight is None else dweight.to(weight.dtype)
    return tuple(x.new_empty(0) if grad is None else grad for grad in (dx, of_weight, dinitial))


def _backward_fake(dy, x, weight, initial, kept, plan):  # noqa: ANN001, ANN202
    return tuple(x.new_empty(0) if like is None else like.new_empty(like.shape) for like in (x, weight, initial))


class _FirstTokens(NamedTuple):
    """This rank's tokens among the first W - 1 of their documents: their rows, their documents, and their positions in them."""

    rows: Tensor
    documents: Tensor
    positions: Tensor


def _first_tokens(executable: Executable, taps: int, device: torch.device) -> _FirstTokens:
    call = executable.program.call
    _check_documents(call)
    tokens = call.layout.tokens(executable.program.rank)
    document = np.searchsorted(call.layout.ends, tokens, "right")
    position = call.layout.positions_of(tokens)
    (rows,) = np.nonzero(position < taps - 1)
    return _FirstTokens(
        *(copy_to_device(device, torch.from_numpy(numbers)) for numbers in (rows, document[rows], position[rows]))
    )


def _from_initial(initial_MCW: Tensor, weight: Tensor, first: _FirstTokens, dtype: torch.dtype) -> Tensor:
    """Compute the initial state's contribution to first tokens, (rows, H, D), in the accumulation dtype. Differentiable."""
    wide = accumulation_dtype(dtype)
    heads, dim, taps = weight.shape[0], weight.shape[1], weight.shape[-1]
    one_filter_a_channel = weight.dim() == 3
    filters = weight.reshape(heads * dim, -1, taps).to(wide)
    groups = heads * dim if one_filter_a_channel else heads
    heard_MCW = F.conv1d(F.pad(initial_MCW.to(wide), (0, taps - 1)), filters, groups=groups)
    return heard_MCW[first.documents, :, first.positions].reshape(-1, heads, dim)


def _final_state(executable: Executable, x_TC: Tensor, initial_MCW: Tensor | None, taps: int) -> Tensor:
    """Return the last inputs of all documents, (M, C, W - 1), with 0 for inputs on other ranks. Differentiable."""
    call = executable.program.call
    _check_documents(call)
    ends, width, tokens = call.layout.ends, taps - 1, call.layout.tokens(executable.program.rank)
    document = np.searchsorted(ends, tokens, "right")
    # the last column of the state is a document's last token
    column = width - (ends[document] - tokens)
    (rows,) = np.nonzero(column >= 0)

    def on_device(numbers: Ints) -> Tensor:
        return copy_to_device(x_TC.device, torch.from_numpy(numbers))

    states_NC = x_TC.new_zeros(len(ends) * width, x_TC.shape[1])
    states_NC = states_NC.index_copy(0, on_device(document[rows] * width + column[rows]), x_TC[on_device(rows)])
    if initial_MCW is not None:
        # shorter documents also end with part of their initial state, which the rank of their last token adds
        ended, lengths = document[tokens == ends[document] - 1], np.array(call.layout.lengths)
        number, column = np.nonzero(lengths[ended][:, None] + np.arange(width) < width)
        to, short = ended[number] * width + column, lengths[ended[number]]
        before_NC = initial_MCW.to(x_TC.dtype).transpose(1, 2).flatten(0, 1)
        states_NC = states_NC.index_copy(0, on_device(to), before_NC[on_device(to + short)])
    return states_NC.view(len(ends), width, -1).transpose(1, 2)


def _check_documents(call: Call) -> None:
    if not np.array_equal(call.documents[:, 1], call.layout.ends):
        raise DistattnError("states are of the layout's documents; plan the convolution on a mask of the same.")


def _gradients(ctx, saved, dy, dkept):  # noqa: ANN001, ANN202
    x, *others, _ = saved
    dy = torch.zeros_like(x) if dy is None else dy
    dx, *of_others = torch.ops.distattn.convolution_backward(dy, *saved, ctx.plan)
    return dx, *(grad if other is not None else None for grad, other in zip(of_others, others, strict=True))


def _kernel(executable: Executable) -> ConvolutionKernel:
    return cast(ConvolutionKernel, executable.kernel)


_TENSORS = ("Tensor x", "Tensor? weight", "Tensor? initial")
_RESULTS = "Tensor dx, Tensor dweight, Tensor dinitial"
register_planned_op(
    "convolution_",
    "a convolution",
    PlannedPass(_TENSORS, (), "Tensor y, Tensor kept", _forward, _forward_fake),
    PlannedPass(("Tensor dy", *_TENSORS, "Tensor kept"), (), _RESULTS, _backward, _backward_fake),
    _gradients,
)
