"""`prefix_max`: the maximum over a document's earlier tokens, computed with a plan. It keeps running softmaxes finite."""

# T tokens on this rank, H heads, V numbers per head, M documents

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.ir.errors import DistattnError
from distattn.ir.plan import Plan
from distattn.kernels.devices import current_device
from distattn.kernels.spec import ScoreMod
from distattn.ops.executable import Executable
from distattn.ops.plan_argument import check_flag, executable_of
from distattn.parallel.runtime.execution import execute_prefix_max
from distattn.parallel.runtime.execution.execute import run_to_completion
from distattn.parallel.runtime.execution.execute_prefix_max import PrefixMaxKernel

_NO_SCORE = ScoreMod(1.0)


# excluded from torch.compile, because ranks compare plans and combine states one at a time in Python
@torch.compiler.disable
def prefix_max(
    x_THV: Tensor,
    plan: Plan | Executable,
    group: dist.ProcessGroup | None = None,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """Compute the elementwise maximum over the tokens before each of this rank's tokens. A collective call of the plan's ranks.

    before_t = max(initial, x_s for all earlier tokens s of t's document). By default, it is -inf for a document's first token.
    The maximum including t is torch.maximum(before, x). x_THV (T, H, V) holds this rank's T tokens in the layout's local order;
    the result has its shape and dtype. It has no gradient, because a maximum subtracted inside a softmax cancels.

    initial_state: (M, H, V), for all M documents, on every rank; -inf by default. With return_final_state also return the
    maxima over entire documents, (M, H, V) in fp32 (fp64 for fp64): those of documents that end on this rank, 0 for others.

    plan: a plan of op "prefix_max" with head_dim 1, which ranks compare at every call, or its executable from `prepare`. Each
    segment sends H x V values. Raise PlanError if the plan cannot be proven or differs between ranks, DistattnError if the
    tensors do not fit it.
    """
    for name, tensor in (("x", x_THV), ("initial_state", initial_state)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "x"):
            raise DistattnError(f"{name} is a {type(tensor).__name__}; a tensor is needed.")
    check_flag("return_final_state", return_final_state)
    executable = executable_of(plan, group, "prefix_max", x_THV.device)
    _check_inputs(executable, x_THV, initial_state)
    kernel = cast(PrefixMaxKernel, executable.kernel)
    with torch.no_grad(), current_device(x_THV.device):
        executable.begin_pass("forward", _NO_SCORE)
        before_THV, final_MHV = run_to_completion(
            execute_prefix_max.forward(
                executable.program, executable.transport, kernel, x_THV.contiguous(), initial_state, return_final_state
            )
        )
    return (before_THV, final_MHV) if return_final_state else before_THV


def _check_inputs(executable: Executable, x_THV: Tensor, initial_MHV: Tensor | None) -> None:
    program, call = executable.program, executable.program.call
    if not call.op.is_maximum:
        raise DistattnError(f'the plan is of {call.op.name}, not of a prefix maximum; make_plan takes op="prefix_max".')
    shapes = {
        "x": (x_THV, (program.tokens, call.heads, call.v_head_dim)),
        "initial_state": (initial_MHV, (len(call.documents), call.heads, call.v_head_dim)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise DistattnError(
                f"{name} has shape {tuple(tensor.shape)}; the plan needs {shape} on rank {program.rank}."
            )
        if tensor.device.type != executable.key.device.type:
            raise DistattnError(f"{name} is on {tensor.device}, the plan was prepared for {executable.key.device}.")
    if str(x_THV.dtype) != f"torch.{call.dtype}":
        raise DistattnError(f"x is {str(x_THV.dtype)[6:]}, the plan was made for {call.dtype}.")
    if initial_MHV is not None and not initial_MHV.is_floating_point():
        raise DistattnError(f"initial_state is {str(initial_MHV.dtype)[6:]}; floating point is needed.")
