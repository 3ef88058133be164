"""`attention`: core attention of a planned call, as a pair of torch library operators with one autograd formula.

The operators receive the plan as an integer, the handle of its executable (see `executable`).
"""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from distattn.ir.errors import DistattnError
from distattn.ir.op import ATTENTION
from distattn.ir.plan import Plan
from distattn.kernels.glue import row_products
from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.registry import choose_kernel
from distattn.kernels.spec import ScoreMod
from distattn.ops.current_micro_batch import current_micro_batch
from distattn.ops.executable import Executable, kernel_requirements
from distattn.ops.plan_argument import executable_of
from distattn.ops.planned_op import PlannedPass, register_planned_op
from distattn.parallel.runtime.communication.transport import Transport
from distattn.parallel.runtime.execution import execute
from distattn.supervision.heartbeats import current_layer, set_layer

_SAVED_BY_CHECKPOINTS = {f"distattn.{name}.default" for name in ("forward", "recurrence_forward", "latent_forward")}


def attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    plan: Plan | Executable,
    group: dist.ProcessGroup | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    gate: Tensor | None = None,
    dropout: float = 0.0,
    kernel: str | None = None,
    return_lse: bool = False,
) -> Any:
    """Compute core attention for this rank's tokens; differentiable. A collective call of all ranks of the plan.

    q_THD (T, H, D), k_TKD (T, K, D), v_TKE (T, K, E) hold this rank's T tokens in the layout's local order;
    the result o_THE (T, H, E) has q's dtype. Under autocast the inputs are cast first, as for PyTorch's own attention.
    scale defaults to D ** -0.5.

    softcap: scores s become softcap * tanh(s / softcap). alibi_slopes (H,): slope * distance in tokens is subtracted
    after the cap, without a gradient. sink (H,): a logit per head that takes part in the softmax but has no value; its
    gradient is this rank's share, to be summed over ranks like any parameter's. gate (T, H) or (T, H, E): multiplies the
    output. dropout: must be 0. With return_lse also return lse_HT, the natural log-sum-exp (including the sink) in fp32 (fp64
    for fp64), -inf for rows without an allowed key. Only some kernels, such as "reference", have gradients through it.

    plan: a Plan, which ranks compare at every call, or its executable from `prepare`, which is created once per batch and
    required inside torch.compile. group: by default the default process group; a plan for one rank needs no group. Raise
    PlanError if the plan cannot be proven or differs between ranks, DistattnError if the tensors do not fit it.
    """
    for name, operand in (("q", q_THD), ("k", k_TKD), ("v", v_TKE)):
        if not isinstance(operand, Tensor):
            raise DistattnError(f"{name} is a {type(operand).__name__}; a tensor (tokens, heads, dim) is needed.")
    if not isinstance(return_lse, bool):
        raise DistattnError(f"return_lse must be True or False, not a {type(return_lse).__name__}.")
    q_THD, k_TKD, v_TKE = autocast_inputs(q_THD, k_TKD, v_TKE)
    # fused projections often return strided tensors, but kernels and messages read entire rows
    q_THD, k_TKD, v_TKE = q_THD.contiguous(), k_TKD.contiguous(), v_TKE.contiguous()
    for name, operand in (("q", q_THD), ("k", k_TKD), ("v", v_TKE)):
        if operand.dim() != 3:
            raise DistattnError(f"{name} has {operand.dim()} dims; three are needed: (tokens, heads, dim).")
    for name, number in (("scale", scale), ("softcap", softcap), ("dropout", dropout)):
        # test for float first, because isinstance with an abstract class is slow
        if type(number) is not float and (not isinstance(number, (Real, type(None))) or isinstance(number, bool)):
            hint = "; a tensor's gradient would be lost" if isinstance(number, Tensor) else ""
            raise DistattnError(f"{name} must be a number, not a {type(number).__name__}{hint}.")
    scale = 1.0 / math.sqrt(q_THD.shape[-1] or 1) if scale is None else float(scale)
    if not 0 < scale < math.inf:
        raise DistattnError(f"scale must be a positive number, not {scale}.")
    softcap = softcap or 0.0
    if not 0 <= softcap < math.inf:
        raise DistattnError(f"softcap must be a positive number, or 0 for none, not {softcap}.")
    if dropout:
        raise DistattnError(f"dropout {dropout} is not computed: the ranks would have to share random bits; use 0.")
    for name, tensor in (("k", k_TKD), ("v", v_TKE), ("sink", sink), ("alibi_slopes", alibi_slopes), ("gate", gate)):
        if tensor is not None and tensor.device != q_THD.device:
            raise DistattnError(f"{name} is on {tensor.device}, q on {q_THD.device}; they share one device.")
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise DistattnError("alibi_slopes require a gradient, which is not computed; pass alibi_slopes.detach().")
    if gate is not None:
        gate = _broadcast_gate(gate, (*q_THD.shape[:2], v_TKE.shape[2]))
    if isinstance(plan, Executable) and group is None and kernel is None:
        ready = plan
    else:
        modifiers = score_modifiers(softcap, alibi_slopes)
        if return_lse and torch.is_grad_enabled() and any(x.requires_grad for x in (q_THD, k_TKD, v_TKE)):
            modifiers = (*modifiers, "lse")
        ready = executable_of(
            plan, group, "attention", q_THD.device, kernel=kernel, modifiers=modifiers, can_interleave=True
        )
    interleaved = current_micro_batch()
    if interleaved is not None:
        # let the micro-batch run the call, so that other micro-batches run while its messages travel
        if return_lse:
            raise DistattnError("return_lse is not possible where micro-batches take turns; leave OverlapSchedule out.")
        o_THE = interleaved.attention(ready, q_THD, k_TKD, v_TKE, sink, alibi_slopes, scale, float(softcap))
        layer = current_layer()
        if o_THE.requires_grad:
            # run this hook right before the call's backward pass
            o_THE.register_hook(lambda _: set_layer(layer))
        return o_THE if gate is None else (o_THE * gate).to(q_THD.dtype)
    o_THE, lse_TH, _ = torch.ops.distattn.forward(
        q_THD, k_TKD, v_TKE, sink, alibi_slopes, ready.handle, ready.kept_elements, scale, float(softcap)
    )
    if gate is not None:
        o_THE = (o_THE * gate).to(q_THD.dtype)
    return (o_THE, lse_TH.t()) if return_lse else o_THE


def score_modifiers(softcap: Any, alibi_slopes: Any) -> tuple[str, ...]:
    """Return the names of a call's score modifiers."""
    return (("softcap",) if softcap else ()) + (("alibi_slopes",) if alibi_slopes is not None else ())


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast inputs to autocast's dtype if autocast is on. After rotary embeddings, for example, q and k are in fp32, but v is not.

    fp64 tensors are not cast, just as PyTorch's operators that autocast to lower precision leave them alone.
    """
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def save_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save outputs of attention and recurrences and recompute the rest: a policy for selective activation checkpointing.

    Recomputation then neither communicates nor repeats calls of attention and recurrences:
    checkpoint(f, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, save_attention))
    """
    # match operators by name, because the modules that define some of them may not be imported
    if str(op) in _SAVED_BY_CHECKPOINTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _broadcast_gate(gate: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(gate.shape) not in (shape, shape[:2]):
        raise DistattnError(f"gate has shape {tuple(gate.shape)}; expected is {shape[:2]} or {shape}.")
    if not gate.dtype.is_floating_point:
        raise DistattnError(f"gate is {str(gate.dtype)[6:]}; floating point is needed.")
    return gate if gate.dim() == 3 else gate[..., None]


def _check_inputs(
    executable: Executable, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, slopes: Tensor | None
) -> None:
    program, key = executable.program, executable.key
    call, tokens = program.call, program.tokens
    if call.op != ATTENTION:
        raise DistattnError(f"the plan is of {call.op.name}, not of attention; use the function of that op.")
    wanted = {
        "q": (q, (tokens, call.heads, call.head_dim)),
        "k": (k, (tokens, call.kv_heads, call.head_dim)),
        "v": (v, (tokens, call.kv_heads, call.v_head_dim)),
        "sink": (sink, (call.heads,)),
        "alibi_slopes": (slopes, (call.heads,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            axes = "(tokens, heads, dim)" if len(shape) == 3 else "(heads,)"
            raise DistattnError(
                f"{name} has shape {tuple(tensor.shape)}; the plan needs {shape} {axes} on rank {program.rank}."
            )
        if name in "qkv" and str(tensor.dtype) != f"torch.{call.dtype}":
            raise DistattnError(f"{name} is {str(tensor.dtype)[6:]}, the plan was made for {call.dtype}.")
        if not tensor.dtype.is_floating_point:
            raise DistattnError(f"{name} is {str(tensor.dtype)[6:]}; floating point is needed.")
        if tensor.device.type != key.device.type:
            raise DistattnError(f"{name} is on {tensor.device}, the plan was prepared for {key.device}.")


def _score(executable: Executable, scale: float, softcap: float, slopes: Tensor | None) -> ScoreMod:
    if softcap or slopes is not None:
        needed = kernel_requirements(executable.program.call, executable.key.device)
        choose_kernel(executable.key.kernel, needed._replace(softcap=softcap > 0, alibi=slopes is not None))
    return ScoreMod(scale, softcap, slopes)


def _finite(lse: Tensor) -> Tensor:
    # a row without keys and a sink of -inf would give -inf - -inf, which is NaN
    return lse.masked_fill(lse == -torch.inf, 0.0)


def forward_pass(
    executable: Executable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    softcap: float,
    transport: Transport | None = None,
) -> execute.PausableRun[tuple[Tensor, Tensor, Tensor]]:
    """Compute (o_THE, lse_TH, kept) like the operator, but pause while messages travel."""
    _check_inputs(executable, q, k, v, sink, slopes)
    score = _score(executable, scale, softcap, slopes)
    executable.begin_pass("forward", score)
    run = execute.forward(executable.program, transport or executable.transport, executable.kernel, q, k, v, score)
    o, lse_TH, kept = yield from run
    if sink is not None:
        # the sink is a key without a value, which only adds to the softmax's denominator
        wider_TH = torch.logaddexp(lse_TH, sink.to(lse_TH.dtype))
        # in place, because no other code has this tensor yet
        o *= torch.exp(lse_TH - _finite(wider_TH))[..., None]
        lse_TH = wider_TH
    return o.to(q.dtype), lse_TH, kept


def backward_pass(
    executable: Executable,
    do: Tensor,
    dlse_TH: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    slopes: Tensor | None,
    o: Tensor,
    lse_TH: Tensor,
    kept: Tensor,
    scale: float,
    softcap: float,
    transport: Transport | None = None,
) -> execute.PausableRun[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Compute (dq, dk, dv, dsink) like the operator, but pause while messages travel. dsink is empty without a sink."""
    if dlse_TH is not None and not executable.kernel.DIFFERENTIABLE_LSE:
        raise DistattnError('this kernel has no gradient for the log-sum-exp; use kernel="reference", or lse.detach().')
    # autograd may pass any strides
    do = do.contiguous()
    is_read = sink is not None or dlse_TH is not None or not executable.program.sums_where_copied
    delta_TH = row_products(do, o) if is_read else None
    # subtract the log-sum-exp's gradient from delta, with which it enters: ds = p * (dp - (delta - dlse))
    if delta_TH is not None and dlse_TH is not None:
        delta_TH -= dlse_TH
    score = _score(executable, scale, softcap, slopes)
    executable.begin_pass("backward", score)
    inputs = (do, q, k, v, lse_TH, delta_TH, kept, score, o)
    run = execute.backward(executable.program, transport or executable.transport, executable.kernel, *inputs)
    dq, dk, dv = yield from run
    if sink is None or delta_TH is None:
        return dq, dk, dv, q.new_empty(0)
    # ds = p * (dp - delta), where dp = 0, as for a key whose value is 0
    weight_TH = torch.exp(sink.to(lse_TH.dtype) - _finite(lse_TH))
    return dq, dk, dv, -(weight_TH * delta_TH).sum(0).to(sink.dtype)


def _forward_fake(q, k, v, sink, slopes, plan, kept_elements, scale, softcap):  # noqa: ANN001, ANN202
    o = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    lse = q.new_empty((q.shape[0], q.shape[1]), dtype=accumulation_dtype(q.dtype))
    return o, lse, q.new_empty(kept_elements)


def _backward_fake(do, dlse, q, k, v, sink, slopes, o, lse, kept, plan, scale, softcap):  # noqa: ANN001, ANN202
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    return *grads, q.new_empty(0) if sink is None else sink.new_empty(sink.shape)


def _gradients(ctx, saved, do, dlse, dkept):  # noqa: ANN001, ANN202
    sink, o = saved[3], saved[5]
    do = torch.zeros_like(o) if do is None else do
    dq, dk, dv, dsink = torch.ops.distattn.backward(do, dlse, *saved, ctx.plan, *ctx.numbers)
    return dq, dk, dv, None if sink is None else dsink, None


_TENSORS = ("Tensor q", "Tensor k", "Tensor v", "Tensor? sink", "Tensor? slopes")
_NUMBERS = ("float scale", "float softcap")
_OF_OUTPUTS = ("Tensor do", "Tensor? dlse")
_OUTPUTS = ("Tensor o", "Tensor lse", "Tensor kept")
register_planned_op(
    "",
    "attention",
    PlannedPass(_TENSORS, _NUMBERS, ", ".join(_OUTPUTS), forward_pass, _forward_fake),
    PlannedPass(
        (*_OF_OUTPUTS, *_TENSORS, *_OUTPUTS),
        _NUMBERS,
        "Tensor dq, Tensor dk, Tensor dv, Tensor dsink",
        backward_pass,
        _backward_fake,
    ),
    _gradients,
    saved_outputs=slice(None),
)
