"""Recurrences on GPUs by the chunk kernels of flash-linear-attention (package `fla-core`, our extra `fla`).

Only its public functions are called, which take and give states. Every task of a plan is one of them: what a segment does to any
state, (A, B), is what the recurrence leaves of the values [v | 0] after the state [0 | I], namely [B | A]; what it does to a
gradient is the gradient of its initial state. The backward pass makes the forward again, as their functions keep its tensors
with autograd's graph alone.

Products are of the inputs' dtype, or of TF32 for float32, which this kernel does not take; states are float32.
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
# exp of less is 0 in float32; sums of a chunk's decays are float32 here, and lose less where none is infinite
_LEAST_DECAY = -100.0


def unsupported_reason(requirements: KernelRequirements) -> str | None:
    """Why this kernel cannot serve such a call, or None."""
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
    return token_decay_fault(capability, op.delta) if op.decay == "token" else None


class SequenceEnds(NamedTuple):
    """Where segments that follow one another end: on the host, and as tensors."""

    ends: tuple[int, ...]
    offsets: Tensor
    bounds: Tensor


def prepare(segments: Segments, requirements: KernelRequirements) -> SequenceEnds:
    """Return where the segments end. Raise DistattnError where one does not begin with the end of the one before it."""
    begins, ends = [begin for begin, _ in segments], [end for _, end in segments]
    if begins != [0, *ends[:-1]]:
        raise DistattnError('kernel "fla" takes segments that follow one another; use kernel="chunked".')
    return SequenceEnds(tuple(ends), sequence_offsets(tuple(ends)), bounds_of(segments))


def forward(x: RecurrenceTokens, sequences: SequenceEnds, state_NHKV: Tensor) -> tuple[Tensor, Tensor]:
    """(o_THV in the inputs' dtype, the state after each segment in float32); all rows are of a segment, in order."""
    # tensors that want gradients are given here, too
    with torch.no_grad():
        o, leaving = _called(_prepared(x), sequences, state_NHKV)
    return o[0], leaving


def states(
    x: RecurrenceTokens, sequences: SequenceEnds, state_NHKV: Tensor, transitions: bool
) -> tuple[Tensor, Tensor | None]:
    """(the state after each segment, A of each or None), in float32; see `chunked.states`."""
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
    """(gradients of the tokens in their dtypes, those of the states that enter in float32); see `chunked.backward`."""
    part = _prepared(x)
    leaves = {name: y.detach().requires_grad_() for name, y in part.by_token().items()}
    entering = state_NHKV.detach().requires_grad_()
    # one function of autograd's, and nothing else: inside an operator no other graph is recorded
    with torch.enable_grad():
        o, leaving = _called(part._replace(**leaves), sequences, entering)
    gradients = [do_THV.to(o.dtype)[None], dstate_NHKV]
    *found, dentering = torch.autograd.grad([o, leaving], [*leaves.values(), entering], gradients)
    dx = {name: dy[0] for name, dy in zip(leaves, found, strict=True)}
    group = part.q.shape[2] // x.q.shape[1]
    for name in ("q", "k"):
        dx[name] = dx[name].unflatten(1, (-1, group)).float().sum(2) if group > 1 else dx[name]
    return x._replace(**dx), dentering


def gradient_states(
    x: RecurrenceTokens, sequences: SequenceEnds, do_THV: Tensor, dstate_NHKV: Tensor, transitions: bool
) -> tuple[Tensor, Tensor | None]:
    """(the gradient of the state before each segment, A of each or None), in float32; see `chunked.gradient_states`."""
    _, dentering = backward(x, sequences, torch.zeros_like(dstate_NHKV), do_THV, dstate_NHKV)
    return dentering, states(x, sequences, torch.zeros_like(dstate_NHKV), True)[1] if transitions else None


def _prepared(x: RecurrenceTokens) -> RecurrenceTokens:
    """The tokens as fla-core takes them: (1, T, ...), decays finite, and queries and keys of all heads where it shares none."""
    q, k, v, g, beta = x
    if beta is None or g is None:
        q, k = (y.repeat_interleave(v.shape[1] // y.shape[1], 1) for y in (q, k))
    g = None if g is None else g.clamp(min=_LEAST_DECAY)
    by_token = {"q": q, "k": k, "v": v, "beta": beta, **({"g": g} if x.decays_by_token else {})}
    return x._replace(g=g)._replace(**{name: y[None].contiguous() for name, y in by_token.items() if y is not None})


def _called(x: RecurrenceTokens, sequences: SequenceEnds, state_NHKV: Tensor) -> tuple[Tensor, Tensor]:
    """(o (1, T, H, V), the state after each segment), of tokens as `_prepared` returns them. One function of autograd's."""
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
