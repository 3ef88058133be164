"""`recurrence`: the core of a recurrent layer (Gated DeltaNet, KDA, GLA, Mamba-2, ...) by a plan, differentiable."""

# T tokens on this rank, H heads of values, G heads of queries and keys, K key dim, V value dim, M documents

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.ir.arguments import checked
from distattn.ir.errors import DistattnError
from distattn.ir.plan import Plan
from distattn.kernels.recurrence.tokens import RecurrenceTokens
from distattn.kernels.spec import ScoreMod
from distattn.ops.attention import autocast_inputs, interleaved_batch
from distattn.ops.executable import Executable, prepare
from distattn.parallel.runtime import execute_recurrence
from distattn.parallel.runtime.execute import run_to_completion
from distattn.parallel.runtime.execute_recurrence import KeptTensors, RecurrenceKernel

# the score of attention has no meaning for a recurrence
_NO_SCORE = ScoreMod(1.0)


@checked
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
    """A recurrence over this rank's tokens, differentiable; a collective call of all ranks of the plan.

        S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_(t-1) + beta_t k_t v_t^T,    o_t = scale S_t^T q_t

    without beta the first factor is I and the last beta is 1. Every document of the plan begins with its initial state.
    q_TGK, k_TGK (T, G, K) and v_THV (T, H, V) hold this rank's T tokens in the layout's local order; H is a multiple of G, and
    consecutive heads share queries and keys. The result o_THV has q's dtype. scale defaults to K ** -0.5.

    g: logarithms of decays, at most 0, in fp32 (fp64 for fp64): (T, H) for ops "ssd" and "gated_delta_rule", (T, H, K) for "gla"
    and "kda", (H,) without gradient for "retention". beta: (T, H) in q's dtype, for "delta_rule", "gated_delta_rule" and "kda".

    Under autocast q, k, v and beta are cast first; g never is.

    initial_state: (M, H, K, V) of all M documents, on every rank; 0 by default. Its gradient is this rank's share, to be summed
    over ranks like any parameter's. With return_final_state also the states after all documents, (M, H, K, V) in fp32 (fp64):
    those of documents that end on this rank, 0 for others.

    plan: a Plan of that op, which ranks compare at every call, or what `prepare` made of one. Raises PlanError when the plan
    cannot be proven or ranks have different ones, DistattnError when the tensors do not fit it.
    """
    if isinstance(plan, Executable):
        if group is not None or kernel is not None:
            raise DistattnError("an executable knows its group and kernel; give them to prepare instead.")
        executable = plan
    else:
        executable = prepare(plan, group, kernel=kernel, device=q_TGK.device)
    if interleaved_batch() is not None:
        raise DistattnError("recurrences cannot take turns with other micro-batches yet; leave OverlapSchedule out.")
    q_TGK, k_TGK, v_THV = autocast_inputs(q_TGK, k_TGK, v_THV)
    beta = None if beta is None else autocast_inputs(beta)[0]
    x = RecurrenceTokens(q_TGK, k_TGK, v_THV, g, beta)
    _check_inputs(executable, x, initial_state)
    scale = 1.0 / math.sqrt(q_TGK.shape[-1]) if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise DistattnError(f"scale is a positive number, not {scale}.")
    # o is linear in q
    o_THV, final = _Recurrence.apply(
        executable, return_final_state, q_TGK * scale, k_TGK, v_THV, g, beta, initial_state
    )
    return (o_THV, final) if return_final_state else o_THV


def _check_inputs(executable: Executable, x: RecurrenceTokens, initial: Tensor | None) -> None:
    program, op = executable.program, executable.program.call.op
    call, tokens = program.call, program.tokens
    if not op.is_recurrent:
        raise DistattnError(f"the plan is of {op.name}, which is no recurrence; make_plan takes op=.")
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
                what = "takes no" if shape is None else "needs"
                raise DistattnError(f"{op.name} {what} {name}{'' if shape is None else f' of shape {shape}'}.")
            continue
        if tuple(tensor.shape) != shape:
            raise DistattnError(
                f"{name} has shape {tuple(tensor.shape)}; the plan of {op.name} wants {shape} on rank {program.rank}."
            )
        if str(tensor.dtype) != f"torch.{dtype}":
            why = ": a product of thousands of rounded decays would be wrong" if name == "g" else ""
            raise DistattnError(f"{name} is {str(tensor.dtype)[6:]}, the plan of {op.name} wants {dtype}{why}.")
        if tensor.device.type != executable.key.device.type:
            raise DistattnError(f"{name} is on {tensor.device}, the plan was prepared for {executable.key.device}.")
    states = (len(call.documents), call.heads, call.head_dim, call.v_head_dim)
    if initial is not None and tuple(initial.shape) != states:
        raise DistattnError(f"initial_state has shape {tuple(initial.shape)}; wanted is {states}, of all documents.")
    if initial is not None and not initial.is_floating_point():
        raise DistattnError(f"initial_state is {str(initial.dtype)[6:]}; floating point is needed.")
    if op.decay == "head" and x.g is not None and x.g.requires_grad:
        raise DistattnError("g of a head wants a gradient, which is not computed; pass g.detach().")


class _Recurrence(torch.autograd.Function):
    """What the forward keeps: its inputs, tokens that came from others, and the state that each task began with."""

    @staticmethod
    def forward(
        ctx: Any,
        executable: Executable,
        final_states: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        beta: Tensor | None,
        initial: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        x = RecurrenceTokens(*(None if y is None else y.contiguous() for y in (q, k, v, g, beta)))  # type: ignore[arg-type]
        executable.begin_pass("forward", _NO_SCORE)
        given = executable.program, executable.transport, _kernel(executable), x, initial, final_states
        run = execute_recurrence.forward(*given)
        o_THV, final, kept = run_to_completion(run)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*x, initial, *kept.tokens, *kept.states)
        ctx.executable, ctx.kept_tokens = executable, len(kept.tokens)
        return o_THV, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        # once: a checkpoint recomputes them then
        q, k, v, g, beta, initial, *rest = ctx.saved_tensors
        x = RecurrenceTokens(q, k, v, g, beta)
        kept = KeptTensors(list(rest[: ctx.kept_tokens]), list(rest[ctx.kept_tokens :]))
        executable = ctx.executable
        do_THV = torch.zeros_like(x.v) if do is None else do.contiguous()
        executable.begin_pass("backward", _NO_SCORE)
        run = execute_recurrence.backward(
            executable.program, executable.transport, _kernel(executable), do_THV, dfinal, x, initial, kept
        )
        dx, dinitial = run_to_completion(run)
        of_gates = dx.g if x.decays_by_token else None
        of_initial = None if dinitial is None else dinitial.to(initial.dtype)
        return None, None, dx.q, dx.k, dx.v, of_gates, dx.beta, of_initial


def _kernel(executable: Executable) -> RecurrenceKernel:
    return cast(RecurrenceKernel, executable.kernel)
