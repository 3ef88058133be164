"""`recurrence`: the core of a recurrent layer (Gated DeltaNet, KDA, GLA, Mamba-2, ...), computed with a plan; differentiable."""

# T tokens on this rank, H heads of values, G heads of queries and keys, K key dim, V value dim, M documents

from __future__ import annotations

import math
from numbers import Real
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.ir.errors import DistattnError
from distattn.ir.plan import Plan
from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.recurrence.tokens import RecurrenceTokens
from distattn.kernels.spec import ScoreMod
from distattn.ops.attention import autocast_inputs
from distattn.ops.executable import Executable
from distattn.ops.plan_argument import check_flag, executable_of
from distattn.ops.planned_op import PlannedPass, register_planned_op
from distattn.parallel.runtime.execution import execute_recurrence
from distattn.parallel.runtime.execution.execute_recurrence import RecurrenceKernel

# executables expect a score, which recurrences do not use
_NO_SCORE = ScoreMod(1.0)


def recurrence(
    q_TGK: Tensor,
    k_TGK: Tensor,
    v_THV: Tensor,
    plan: Plan | Executable,
    group: dist.ProcessGroup | None = None,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    kernel: str | None = None,
    return_final_state: bool = False,
) -> Any:
    """Compute a recurrence over this rank's tokens; differentiable. A collective call of all ranks of the plan.

        S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_(t-1) + beta_t k_t v_t^T,    o_t = scale S_t^T q_t

    Without beta, the first factor is I and beta_t in the last term is 1. Every document of the plan starts from its initial
    state. q_TGK, k_TGK (T, G, K) and v_THV (T, H, V) hold this rank's T tokens in the layout's local order; H is a multiple of
    G, and consecutive heads share queries and keys. The result o_THV has q's dtype. scale defaults to K ** -0.5.

    g: log decays, at most 0, in fp32 (fp64 for fp64): (T, H) for ops "ssd" and "gated_delta_rule", (T, H, K) for
    "gla" and "kda", (H,) without gradient for "retention". beta: (T, H) in q's dtype, for "delta_rule", "gated_delta_rule"
    and "kda".

    Under autocast q, k, v and beta are cast first; g never is.

    initial_state: (M, H, K, V), for all M documents, on every rank; 0 by default. Its gradient is this rank's share, to be
    summed over ranks like any parameter's. With return_final_state also return the states after all documents, (M, H, K, V)
    in fp32 (fp64 for fp64): those of documents that end on this rank, 0 for others.

    plan: a plan of one of these ops, which ranks compare at every call, or its executable from `prepare`. Raise PlanError if the
    plan cannot be proven or differs between ranks, DistattnError if the tensors do not fit it.
    """
    # `arguments.checked` would cause a graph break in torch.compile
    for name, tensor in (
        ("q", q_TGK),
        ("k", k_TGK),
        ("v", v_THV),
        ("g", g),
        ("beta", beta),
        ("initial_state", initial_state),
    ):
        if not isinstance(tensor, Tensor) and (tensor is not None or name in "qkv"):
            raise DistattnError(f"{name} is a {type(tensor).__name__}; a tensor is needed.")
    check_flag("return_final_state", return_final_state)
    if not isinstance(scale, (Real, type(None))) or isinstance(scale, bool):
        raise DistattnError(f"scale must be a number, not a {type(scale).__name__}.")
    executable = executable_of(plan, group, "recurrence", q_TGK.device, kernel=kernel)
    q_TGK, k_TGK, v_THV = autocast_inputs(q_TGK, k_TGK, v_THV)
    beta = None if beta is None else autocast_inputs(beta)[0]
    x = RecurrenceTokens(q_TGK, k_TGK, v_THV, g, beta)
    _check_inputs(executable, x, initial_state)
    scale = 1.0 / math.sqrt(q_TGK.shape[-1]) if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise DistattnError(f"scale must be a positive number, not {scale}.")
    documents = len(executable.program.call.documents) if return_final_state else 0
    # scale q instead of o, because o is linear in q
    o_THV, final, _ = torch.ops.distattn.recurrence_forward(
        q_TGK * scale, k_TGK, v_THV, g, beta, initial_state, executable.handle, executable.kept_elements, documents
    )
    return (o_THV, final) if return_final_state else o_THV


def _check_inputs(executable: Executable, x: RecurrenceTokens, initial: Tensor | None) -> None:
    program, op = executable.program, executable.program.call.op
    call, tokens = program.call, program.tokens
    if op.kind != "recurrence":
        raise DistattnError(f"the plan is of {op.name}, which is not a recurrence; pass op= to make_plan.")
    wide = call.accumulation_dtype
    shapes_of_g = {
        "none": None,
        "head": (call.heads,),
        "token": (tokens, call.heads),
        "channel": (tokens, call.heads, call.head_dim),
    }
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...] | None, str]] = {
        "q": (x.q, (tokens, call.kv_heads, call.head_dim), call.dtype),
        "k": (x.k, (tokens, call.kv_heads, call.head_dim), call.dtype),
        "v": (x.v, (tokens, call.heads, call.v_head_dim), call.dtype),
        "g": (x.g, shapes_of_g[op.decay], wide),
        "beta": (x.beta, (tokens, call.heads) if op.delta else None, call.dtype),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is None or shape is None:
            if (tensor is None) != (shape is None):
                verb = "takes no" if shape is None else "needs"
                raise DistattnError(f"{op.name} {verb} {name}{'' if shape is None else f' of shape {shape}'}.")
            continue
        if tuple(tensor.shape) != shape:
            raise DistattnError(
                f"{name} has shape {tuple(tensor.shape)}; the plan of {op.name} needs {shape} on rank {program.rank}."
            )
        if str(tensor.dtype) != f"torch.{dtype}":
            why = ": a product of thousands of rounded decays would be wrong" if name == "g" else ""
            raise DistattnError(f"{name} is {str(tensor.dtype)[6:]}, the plan of {op.name} needs {dtype}{why}.")
        if tensor.device.type != executable.key.device.type:
            raise DistattnError(f"{name} is on {tensor.device}, the plan was prepared for {executable.key.device}.")
    states = (len(call.documents), call.heads, call.head_dim, call.v_head_dim)
    if initial is not None and tuple(initial.shape) != states:
        raise DistattnError(f"initial_state has shape {tuple(initial.shape)}; expected is {states}, of all documents.")
    if initial is not None and not initial.is_floating_point():
        raise DistattnError(f"initial_state is {str(initial.dtype)[6:]}; floating point is needed.")
    if op.decay == "head" and x.g is not None and x.g.requires_grad:
        raise DistattnError("g of a head requires a gradient, which is not computed; pass g.detach().")


def _forward(executable, q, k, v, g, beta, initial, final_states):  # noqa: ANN001, ANN202
    x = _contiguous(q, k, v, g, beta)
    executable.begin_pass("forward", _NO_SCORE)
    arguments = executable.program, executable.transport, _kernel(executable), x, initial, final_states > 0
    o, final, kept = yield from execute_recurrence.forward(*arguments)
    return o, q.new_empty(0, dtype=accumulation_dtype(q.dtype)) if final is None else final, kept


def _forward_fake(q, k, v, g, beta, initial, plan, kept_bytes, final_states):  # noqa: ANN001, ANN202
    # final_states: the number of documents whose final states are returned
    shape = (final_states, v.shape[1], q.shape[2], v.shape[2]) if final_states else (0,)
    wide = accumulation_dtype(q.dtype)
    return v.new_empty(v.shape), v.new_empty(shape, dtype=wide), v.new_empty(kept_bytes, dtype=torch.uint8)


def _backward(executable, do, dfinal, q, k, v, g, beta, initial, kept):  # noqa: ANN001, ANN202
    x = _contiguous(q, k, v, g, beta)
    executable.begin_pass("backward", _NO_SCORE)
    arguments = executable.program, executable.transport, _kernel(executable), do.contiguous(), dfinal, x, initial, kept
    dx, dinitial = yield from execute_recurrence.backward(*arguments)
    of_gates = dx.g if x.decays_by_token else None
    of_initial = None if dinitial is None else dinitial.to(initial.dtype)
    return tuple(q.new_empty(0) if y is None else y for y in (dx.q, dx.k, dx.v, of_gates, dx.beta, of_initial))


def _backward_fake(do, dfinal, q, k, v, g, beta, initial, kept, plan):  # noqa: ANN001, ANN202
    inputs = (q, k, v, g if g is not None and g.dim() > 1 else None, beta, initial)
    return tuple(q.new_empty(0) if y is None else y.new_empty(y.shape) for y in inputs)


def _gradients(ctx, saved, do, dfinal, dkept):  # noqa: ANN001, ANN202
    _, _, v, g, beta, initial, _ = saved
    do = torch.zeros_like(v) if do is None else do
    dfinal = None if dfinal is None or dfinal.dim() == 1 else dfinal
    gradients = torch.ops.distattn.recurrence_backward(do, dfinal, *saved, ctx.plan)
    # a decay per head has no gradient
    has = (True, True, True, g is not None and g.dim() > 1, beta is not None, initial is not None)
    return tuple(y if is_there else None for y, is_there in zip(gradients, has, strict=True))


def _contiguous(*tensors: Tensor | None) -> RecurrenceTokens:
    return RecurrenceTokens(*(None if y is None else y.contiguous() for y in tensors))  # type: ignore[arg-type]


def _kernel(executable: Executable) -> RecurrenceKernel:
    return cast(RecurrenceKernel, executable.kernel)


_TENSORS = ("Tensor q", "Tensor k", "Tensor v", "Tensor? g", "Tensor? beta", "Tensor? initial")
_RESULTS = "Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dinitial"
register_planned_op(
    "recurrence_",
    "a recurrence",
    PlannedPass(_TENSORS, ("SymInt final_states",), "Tensor o, Tensor final, Tensor kept", _forward, _forward_fake),
    PlannedPass(("Tensor do", "Tensor? dfinal", *_TENSORS, "Tensor kept"), (), _RESULTS, _backward, _backward_fake),
    _gradients,
)
