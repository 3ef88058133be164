"""`attention`: core attention of a planned call, as a pair of torch library operators.

The plan enters the operators as a whole number, a handle. A plan is proven and lowered
at its first use on a rank and kernel; layers that share the plan share the program.
"""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.errors import DistattnError
from distattn.kernels.dispatch import Kernel, choose_kernel, load_kernel
from distattn.kernels.merge import accumulation_dtype
from distattn.parallel import execute
from distattn.parallel.program import Program, lower
from distattn.parallel.transport import Alone, GroupTransport, Transport
from distattn.plan import Plan


class Lowered:
    """A program with the kernel and the transport it runs on, known to the operators by its handle."""

    def __init__(self, program: Program, kernel: Kernel, transport: Transport):
        self.program, self.kernel, self.transport = program, kernel, transport
        self.handle = next(_HANDLES)
        _BY_HANDLE[self.handle] = self


class Use(NamedTuple):
    """Where a plan runs: rank, kernel and process group."""

    rank: int
    kernel: str
    group: dist.ProcessGroup | None


_HANDLES = itertools.count()
_BY_HANDLE: weakref.WeakValueDictionary[int, Lowered] = weakref.WeakValueDictionary()
# programs live as long as their plan
_BY_PLAN: weakref.WeakKeyDictionary[Plan, dict[Use, Lowered]] = weakref.WeakKeyDictionary()


def attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    plan: Plan,
    group: dist.ProcessGroup | None = None,
    *,
    scale: float | None = None,
    kernel: str | None = None,
    return_lse: bool = False,
) -> Any:
    """Core attention of this rank's tokens, differentiable; a collective call of all ranks of the plan.

    q_THD (T, H, D), k_TKD (T, K, D), v_TKE (T, K, E) hold this rank's T tokens in the layout's local order; the result
    o_THE (T, H, E) has q's dtype. scale defaults to D ** -0.5. With return_lse also lse_HT,
    natural log, fp32 (fp64 for fp64), -inf where a row has no allowed key; gradients through it need kernel="reference".
    group defaults to the default process group; a plan for one rank needs none.

    Raises PlanError when the plan cannot be proven, DistattnError when the tensors do not fit it.
    """
    scale = 1.0 / math.sqrt(plan.call.head_dim) if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise DistattnError(f"scale is a positive number, not {scale}.")
    rank, group = _membership(plan, group)
    _check_inputs(plan, rank, q_THD, k_TKD, v_TKE)
    call = plan.call
    name = choose_kernel(kernel, q_THD.dtype, call.head_dim, call.v_head_dim, q_THD.device)
    lowered = lower_once(plan, Use(rank, name, group))
    o_THE, lse_HT, _ = torch.ops.distattn.forward(q_THD, k_TKD, v_TKE, lowered.handle, scale)
    return (o_THE, lse_HT) if return_lse else o_THE


def lower_once(plan: Plan, use: Use) -> Lowered:
    """The program of a plan for one use, made at first call."""
    uses = _BY_PLAN.setdefault(plan, {})
    if use not in uses:
        proof = next((other.program.proof for other in uses.values()), None)
        chosen = load_kernel(use.kernel)
        transport = Alone() if use.group is None else GroupTransport(use.group)
        uses[use] = Lowered(lower(plan, use.rank, chosen.prepare, proof), chosen, transport)
    return uses[use]


def _lowered(handle: int) -> Lowered:
    if handle not in _BY_HANDLE:
        raise DistattnError(f"handle {handle} belongs to no plan that is still alive.")
    return _BY_HANDLE[handle]


def _membership(plan: Plan, group: dist.ProcessGroup | None) -> tuple[int, dist.ProcessGroup | None]:
    ranks = plan.call.ranks
    if group is None and not (dist.is_available() and dist.is_initialized()):
        if ranks > 1:
            raise DistattnError(f"a plan for {ranks} ranks needs torch.distributed; call init_process_group first.")
        return 0, None
    if group is None and ranks == 1:
        return 0, None
    group = dist.group.WORLD if group is None else group
    size = dist.get_world_size(group)
    if size != ranks:
        raise DistattnError(
            f"the plan is for {ranks} ranks, the process group has {size}; pass the group it was made for."
        )
    return dist.get_rank(group), group


def _check_inputs(plan: Plan, rank: int, q: Tensor, k: Tensor, v: Tensor) -> None:
    call = plan.call
    tokens = int(call.layout.shard_sizes()[rank])
    wanted = {
        "q": (q, (tokens, call.heads, call.head_dim)),
        "k": (k, (tokens, call.kv_heads, call.head_dim)),
        "v": (v, (tokens, call.kv_heads, call.v_head_dim)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise DistattnError(
                f"{name} has shape {tuple(tensor.shape)}; the plan wants {shape} (tokens, heads, dim) on rank {rank}."
            )
        if str(tensor.dtype) != f"torch.{call.dtype}":
            raise DistattnError(f"{name} is {str(tensor.dtype)[6:]}, the plan was made for {call.dtype}.")
        if tensor.device != q.device:
            raise DistattnError(f"{name} is on {tensor.device}, q on {q.device}; they share one device.")


torch.library.define(
    "distattn::forward", "(Tensor q, Tensor k, Tensor v, int plan, float scale) -> (Tensor o, Tensor lse, Tensor kept)"
)
torch.library.define(
    "distattn::backward",
    "(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor kept, int plan, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
)


@torch.library.impl("distattn::forward", "CompositeExplicitAutograd")
def _forward(q: Tensor, k: Tensor, v: Tensor, plan: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    lowered = _lowered(plan)
    run = execute.forward(lowered.program, lowered.transport, lowered.kernel, q, k, v, scale)
    o, lse_TH, kept, _ = execute.finish(run)
    return o, lse_TH.t().contiguous(), kept


@torch.library.register_fake("distattn::forward")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, plan: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    o = q.new_empty((*q.shape[:2], v.shape[2]))
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=accumulation_dtype(q.dtype))
    return o, lse, q.new_empty(execute.kept_elements(_lowered(plan).program))


@torch.library.impl("distattn::backward", "CompositeExplicitAutograd")
def _backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    kept: Tensor,
    plan: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    lowered = _lowered(plan)
    lse_TH = lse.t().contiguous()
    # the gradient of the log-sum-exp enters where delta does: ds = p * (dp - (delta - dlse))
    delta_TH = (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta_TH -= dlse.t()
    inputs = (do.contiguous(), q, k, v, lse_TH, delta_TH, kept, scale)
    dq, dk, dv, _ = execute.finish(execute.backward(lowered.program, lowered.transport, lowered.kernel, *inputs))
    return dq, dk, dv


@torch.library.register_fake("distattn::backward")
def _backward_fake(do, dlse, q, k, v, o, lse, kept, plan, scale):  # noqa: ANN001
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, plan, scale = inputs
    o, lse, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, o, lse, kept)
    # the program outlives its plan until the backward has run
    ctx.plan, ctx.scale, ctx.lowered = plan, scale, _lowered(plan)


def _differentiate(ctx, do, dlse, dkept):
    q, k, v, o, lse, kept = ctx.saved_tensors
    if dlse is not None and not ctx.lowered.kernel.DIFFERENTIABLE_LSE:
        raise DistattnError('this kernel has no gradient for the log-sum-exp; use kernel="reference", or lse.detach().')
    do = torch.zeros_like(o) if do is None else do
    return *torch.ops.distattn.backward(do, dlse, q, k, v, o, lse, kept, ctx.plan, ctx.scale), None, None


def _refuse_second_derivative(ctx, *grads):
    raise DistattnError("attention has no second derivative: a gradient of its gradients was asked for.")


torch.library.register_autograd("distattn::backward", _refuse_second_derivative)
torch.library.register_autograd("distattn::forward", _differentiate, setup_context=_save)
