"""`latent_attention`: multi-head latent attention (DeepSeek's MLA) with a plan that moves latents, or keys and values."""

# T tokens on this rank, H query heads, N key dim without the rotary part, R rotary dim, D = N + R, L latent dim, E value head dim

from __future__ import annotations

import math
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.ir.arguments import checked
from distattn.ir.errors import DistattnError
from distattn.ir.op import ATTENTION, latent_op
from distattn.ir.plan import Call, Plan
from distattn.kernels.glue import row_products
from distattn.kernels.latent import LatentKernel, LatentScore, expand_latents
from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.registry import Kernel, choose_kernel
from distattn.kernels.spec import ScoreMod
from distattn.ops.attention import attention, autocast_inputs
from distattn.ops.executable import Executable, kernel_requirements
from distattn.ops.plan_argument import executable_of
from distattn.ops.planned_op import PlannedPass, register_planned_op
from distattn.parallel.runtime.execution import execute


@checked
def latent_attention(
    q_THD: Tensor,
    rope_TR: Tensor,
    latent_TL: Tensor,
    up_HEL: Tensor,
    plan: Plan | Executable,
    group: dist.ProcessGroup | None = None,
    *,
    scale: float | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Compute latent attention for this rank's tokens; differentiable. A collective call of all ranks of the plan.

    For a latent c, head h has the key [up_h[:N] c | rope] and the value up_h[N:] c. q_THD (T, H, N + R) has its rotary part last.
    rope_TR (T, R) is the rotary key that all heads share, and latent_TL (T, L) the latent after its norm. up_HEL (H, N + E, L) is
    the weight of the up-projection (`kv_b_proj.weight.view(H, N + E, L)`), the same on all ranks; its gradient is this rank's
    share, to be summed over ranks like any parameter's. The result o_THE has q's dtype. scale defaults to (N + R) ** -0.5.

    plan: a result of `make_latent_plan`. With op `distattn.latent_op(R, L)`, kv_heads=1, head_dim=N + R and v_head_dim=E, latents
    move. With op attention and kv_heads=H, each rank expands its own latents, and keys and values move. Raise PlanError if the
    plan cannot be proven or differs between ranks, DistattnError if the tensors do not fit it.
    """
    q_THD, rope_TR, latent_TL, up_HEL = autocast_inputs(q_THD, rope_TR, latent_TL, up_HEL)
    if kernel is None and isinstance(plan, Plan):
        kernel = latent_kernel(plan.call, q_THD.device)
    executable = executable_of(plan, group, "latent_attention", q_THD.device, kernel=kernel)
    _check_inputs(executable, q_THD, rope_TR, latent_TL, up_HEL)
    if executable.program.call.op == ATTENTION:
        key_dim = q_THD.shape[2] - rope_TR.shape[1]
        return cast(
            Tensor, attention(q_THD, *expand_latents(rope_TR, latent_TL, up_HEL, key_dim), executable, scale=scale)
        )
    scale = 1.0 / math.sqrt(q_THD.shape[-1]) if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise DistattnError(f"scale must be a positive number, not {scale}.")
    inputs = q_THD, rope_TR[:, None], latent_TL[:, None], up_HEL
    o_THE, _, _ = torch.ops.distattn.latent_forward(*inputs, executable.handle, executable.kept_elements, scale)
    return cast(Tensor, o_THE)


def latent_kernel(call: Call, device: torch.device) -> str:
    """Return the default kernel for a latent plan of either kind: one that supports keys that are wider than values."""
    return choose_kernel(None, kernel_requirements(call, device)._replace(op=latent_op(1, 1)))


def _check_inputs(executable: Executable, q: Tensor, rope: Tensor, latent: Tensor, up: Tensor) -> None:
    program = executable.program
    call, op, tokens = program.call, program.call.op, program.tokens
    rotary, width = op.rotary_dim, op.latent_dim
    if op == ATTENTION and call.kv_heads == call.heads:
        # with op attention, keys and values are expanded before the call, so accept any consistent sizes
        rotary, width = min(rope.shape[-1], call.head_dim - 1), latent.shape[-1]
    elif op.kind != "latent_attention":
        raise DistattnError(
            f"the plan is of {op.name}, not of latent attention; make_plan takes op=latent_op(R, L), or see make_latent_plan."
        )
    wanted = {
        "q": (q, (tokens, call.heads, call.head_dim)),
        "rope": (rope, (tokens, rotary)),
        "latent": (latent, (tokens, width)),
        "up": (up, (call.heads, call.head_dim - rotary + call.v_head_dim, width)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise DistattnError(
                f"{name} has shape {tuple(tensor.shape)}; the plan needs {shape} on rank {program.rank}."
            )
        if str(tensor.dtype) != f"torch.{call.dtype}":
            raise DistattnError(f"{name} is {str(tensor.dtype)[6:]}, the plan was made for {call.dtype}.")


def _forward(executable, q, rope, latent, up, scale):  # noqa: ANN001, ANN202
    q, rope, latent = (x.contiguous() for x in (q, rope, latent))
    score = _score(executable, scale, up)
    executable.begin_pass("forward", score.score)
    arguments = executable.program, executable.transport, _kernel(executable), q, rope, latent, cast(ScoreMod, score)
    o, lse_TH, kept = yield from execute.forward(*arguments)
    return o.to(q.dtype), lse_TH, kept


def _forward_fake(q, rope, latent, up, plan, kept_elements, scale):  # noqa: ANN001, ANN202
    values = up.shape[1] - q.shape[2] + rope.shape[2]
    lse = q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))
    return q.new_empty((*q.shape[:2], values)), lse, q.new_empty(kept_elements)


def _backward(executable, do, q, rope, latent, up, o, lse, kept, scale):  # noqa: ANN001, ANN202
    do, q, rope, latent = (x.contiguous() for x in (do, q, rope, latent))
    dup = torch.zeros_like(up, dtype=getattr(torch, executable.program.call.accumulation_dtype))
    score = _score(executable, scale, up, dup)
    executable.begin_pass("backward", score.score)
    inputs = do, q, rope, latent, lse, row_products(do, o), kept, cast(ScoreMod, score)
    gradients = yield from execute.backward(executable.program, executable.transport, _kernel(executable), *inputs)
    return *gradients, dup.to(up.dtype)


def _backward_fake(do, q, rope, latent, up, o, lse, kept, plan, scale):  # noqa: ANN001, ANN202
    return tuple(x.new_empty(x.shape) for x in (q, rope, latent, up))


def _gradients(ctx, saved, do, dlse, dkept):  # noqa: ANN001, ANN202
    do = torch.zeros_like(saved[4]) if do is None else do
    return torch.ops.distattn.latent_backward(do, *saved, ctx.plan, *ctx.numbers)


def _score(executable: Executable, scale: float, up: Tensor, dup: Tensor | None = None) -> LatentScore:
    call = executable.program.call
    return LatentScore(ScoreMod(scale), up, call.head_dim - call.op.rotary_dim, dup)


def _kernel(executable: Executable) -> Kernel:
    return cast(Kernel, LatentKernel(executable.kernel))


_TENSORS = ("Tensor q", "Tensor rope", "Tensor latent", "Tensor up")
_OUTPUTS = ("Tensor o", "Tensor lse", "Tensor kept")
_NUMBERS = ("float scale",)
_RESULTS = "Tensor dq, Tensor drope, Tensor dlatent, Tensor dup"
register_planned_op(
    "latent_",
    "latent attention",
    PlannedPass(_TENSORS, _NUMBERS, ", ".join(_OUTPUTS), _forward, _forward_fake),
    PlannedPass(("Tensor do", *_TENSORS, *_OUTPUTS), _NUMBERS, _RESULTS, _backward, _backward_fake),
    _gradients,
    saved_outputs=slice(None),
    fixed_outputs=slice(1, None),
)
