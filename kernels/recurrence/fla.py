"""Recurrences on GPUs with the chunk kernels from flash-linear-attention (package `fla-core`, our extra `fla`).

Only fla-core's public functions are called; they accept and return states, and each task of a plan is one such call.
To compute the effect (A, B) of a segment on any state, the recurrence runs on values [v | 0] from the state [0 | I]
and ends in [B | A]. Its effect on a gradient is the gradient of its initial state. The backward pass repeats the
forward pass, because fla-core keeps its intermediate tensors only in autograd's graph.

Products use operands of the inputs' dtype. float32 inputs are rejected, because fla-core would use TF32. States are
float32.
"""

# N segments, T tokens, H heads, G heads of queries and keys, K key dim, V value dim; a state is S_NHKV

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from fla.ops.delta_rule import chunk_delta_rule
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.gla import chunk_gla
from fla.ops.kda import chunk_kda
from fla.ops.simple_gla import chunk_simple_gla
from torch import Tensor

from distattn.ir.errors import DistattnError
from distattn.kernels.fla_sequences import sequence_offsets
from distattn.kernels.recurrence.hopper import token_decay_fault
from distattn.kernels.recurrence.tokens import RecurrenceTokens, Segments, bounds_of
from distattn.kernels.recurrence.transitions import diagonal_transitions
from distattn.kernels.spec import KernelRequirements
from distattn.kernels.triton.launch import compute_capability
from distattn.kernels.triton.tiles import INTERPRETED

_DTYPES = (torch.bfloat16, torch.float16)
# smaller log decays are clamped to this: their exp is 0 in fp32, and fla-core's fp32 sums over a chunk must stay accurate
_LEAST_DECAY = -100.0


def unsupported_reason(requirements: KernelRequirements) -> str | None:
    """Return why this kernel cannot serve a call with these requirements, or None if it can."""
    device = requirements.device
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"the kernels of fla-core run on GPUs, not on {device.type}"
    if requirements.dtype not in _DTYPES:
        return f"it computes bfloat16 and float16, not {str(requirements.dtype)[6:]}"
    for dim in (requirements.head_dim, requirements.v_head_dim):
        if not 16 <= dim <= 256 or dim % 16:
            return f"dims of keys and values are multiples of 16 up to 256, not {dim}"
    if device.type != "cuda":
        return None
    capability = compute_capability(device)
    if capability < 80:
        return "it needs compute capability 8.0 (A100) or later"
    op = requirements.op
    fault = token_decay_fault(capability, op.delta) if op.decay == "token" else None
    return None if fault is None else str(fault)


class SequenceEnds(NamedTuple):
    """The ends of consecutive segments, on the host, and their offsets and rows [begin, end), as tensors."""

    ends: tuple[int, ...]
    offsets: Tensor
    bounds: Tensor


def prepare(segments: Segments, requirements: KernelRequirements) -> SequenceEnds:
    """Return the ends of the segments. Raise DistattnError if a segment does not start where the previous one ends."""
    begins, ends = [begin for begin, _ in segments], [end for _, end in segments]
    if begins != [0, *ends[:-1]]:
        raise DistattnError('kernel "fla" takes segments that follow one another; use kernel="chunked".')
    return SequenceEnds(tuple(ends), sequence_offsets(tuple(ends)), bounds_of(segments))


def forward(x: RecurrenceTokens, sequences: SequenceEnds, state_NHKV: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (o_THV in the inputs' dtype, the state after each segment in float32). The segments must cover all rows."""
    # disable autograd: the inputs may require gradients, but `backward` computes the gradients
    with torch.no_grad():
        o, leaving = _called(_prepared(x), sequences, state_NHKV)
    return o[0], leaving


def states(
    x: RecurrenceTokens, sequences: SequenceEnds, state_NHKV: Tensor, transitions: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the state after each segment and, if `transitions` is set, each segment's A, in float32. See `chunked.states`."""
    key_dim, value_dim = state_NHKV.shape[2:]
    if not transitions or x.beta is None:
        _, leaving = forward(x, sequences, state_NHKV)
        return leaving, diagonal_transitions(x, sequences.bounds, state_NHKV.dtype) if transitions else None
    identity = torch.eye(key_dim, dtype=state_NHKV.dtype, device=state_NHKV.device)
    entering = torch.cat([state_NHKV, identity.expand(*state_NHKV.shape[:2], -1, -1)], -1)
    _, leaving = forward(x._replace(v=F.pad(x.v, (0, key_dim))), sequences, entering)
    return leaving[..., :value_dim].contiguous(), leaving[..., value_dim:].contiguous()


def backward(
    x: RecurrenceTokens, sequences: SequenceEnds, state_NHKV: Tensor, do_THV: Tensor, dstate_NHKV: Tensor
) -> tuple[RecurrenceTokens, Tensor]:
    """Compute (gradients of the tokens in their dtypes, gradients of the initial states in float32). See `chunked.backward`."""
    part = _prepared(x)
    leaves = {name: y.detach().requires_grad_() for name, y in part.by_token().items()}
    entering = state_NHKV.detach().requires_grad_()
    # autograd is disabled inside an operator: enable it for this function only
    with torch.enable_grad():
        o, leaving = _called(part._replace(**leaves), sequences, entering)
    gradients = [do_THV.to(o.dtype)[None], dstate_NHKV]
    *grads, dentering = torch.autograd.grad([o, leaving], [*leaves.values(), entering], gradients)
    dx = {name: dy[0] for name, dy in zip(leaves, grads, strict=True)}
    group = part.q.shape[2] // x.q.shape[1]
    for name in ("q", "k"):
        dx[name] = dx[name].unflatten(1, (-1, group)).float().sum(2) if group > 1 else dx[name]
    return x._replace(**dx), dentering


def gradient_states(
    x: RecurrenceTokens, sequences: SequenceEnds, do_THV: Tensor, dstate_NHKV: Tensor, transitions: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients of the initial states and, if `transitions` is set, each segment's A, in float32.

    See `chunked.gradient_states`.
    """
    _, dentering = backward(x, sequences, torch.zeros_like(dstate_NHKV), do_THV, dstate_NHKV)
    return dentering, states(x, sequences, torch.zeros_like(dstate_NHKV), True)[1] if transitions else None


def _prepared(x: RecurrenceTokens) -> RecurrenceTokens:
    """Return the tokens as fla-core expects them: (1, T, ...), with finite decays.

    Queries and keys are repeated for functions that do not support grouped heads.
    """
    q, k, v, g, beta = x
    if beta is None or g is None:
        q, k = (y.repeat_interleave(v.shape[1] // y.shape[1], 1) for y in (q, k))
    g = None if g is None else g.clamp(min=_LEAST_DECAY)
    by_token = {"q": q, "k": k, "v": v, "beta": beta, **({"g": g} if x.decays_by_token else {})}
    return x._replace(g=g)._replace(**{name: y[None].contiguous() for name, y in by_token.items() if y is not None})


def _called(x: RecurrenceTokens, sequences: SequenceEnds, state_NHKV: Tensor) -> tuple[Tensor, Tensor]:
    """Call fla-core's function for the op. Return (o, the state after each segment); o is (1, T, H, V). x: see `_prepared`."""
    q, k, v, g, beta = x
    if sequences.ends[-1:] != (v.shape[1],):
        raise DistattnError('kernel "fla" takes segments that end with the last token; use kernel="chunked".')
    states = {"scale": 1.0, "initial_state": state_NHKV, "output_final_state": True}
    arguments = {**states, "cu_seqlens": sequences.offsets, "cu_seqlens_cpu": sequence_offsets(sequences.ends)}
    if beta is None:
        if g is not None and g.dim() == 4:
            return chunk_gla(q, k, v, g, **arguments)
        of_head = g is not None and g.dim() == 1
        return chunk_simple_gla(q, k, v, g=None if of_head else g, g_gamma=g if of_head else None, **arguments)
    if g is None:
        return chunk_delta_rule(q, k, v, beta, **arguments)
    return (chunk_kda if g.dim() == 4 else chunk_gated_delta_rule)(q, k, v, g, beta, **arguments)
