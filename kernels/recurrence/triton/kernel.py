"""Recurrences with one decay per head, in Triton: chunk by chunk, all segments in one launch (kernel "triton_chunked").

The algebra is that of `chunked`. The forward takes three launches: the effect of each chunk on any state, the scan of
states over each segment's chunks, and the outputs. The backward takes five: the first two again, the part of the
gradient that comes from a chunk's own outputs, the backward scan of gradients, and the gradients of tokens. Without the
delta rule there is no first launch. There are no atomics, so results are bitwise reproducible.

Products take operands of the inputs' dtype; float32 operands take three TF32 products. Tensors passed between launches
have the inputs' dtype. Sums and states are float32; sums of log decays are float64.
"""

# N segments, M chunks, C tokens per chunk, T tokens, H heads, G heads of queries and keys, K key dim, V value dim;
# a state is S_NHKV

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from distattn.kernels.meta_bytes import META
from distattn.kernels.recurrence.tokens import RecurrenceTokens, Segments, bounds_of
from distattn.kernels.recurrence.transitions import diagonal_transitions
from distattn.kernels.recurrence.triton.gradients import gradient_kernel
from distattn.kernels.recurrence.triton.local import asked_kernel, output_kernel, triangular_kernel
from distattn.kernels.recurrence.triton.scan import scan_back_kernel, scan_kernel
from distattn.kernels.spec import KernelRequirements
from distattn.kernels.triton.launch import (
    Tile,
    compute_capability,
    make_launch,
    run_launch,
    tensor_arguments,
)
from distattn.kernels.triton.tiles import INTERPRETED

# the functions also accept meta tensors, and allocate as much for them as they would on a device
RUNS_ON_META = True
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_DIM = 256
# maximum and minimum tokens per chunk, and maximum bytes of a chunk's keys, because fewer tokens with wide keys fit into
# registers and shared memory
_CHUNK, _LEAST_CHUNK, _BYTES_OF_KEYS = 64, 16, 1 << 14
# maximum columns of values at a time, maximum bytes of the state's columns that a scan keeps in registers, and minimum
# side of a product
_COLUMNS, _BYTES_OF_STATE, _LEAST_SIDE = 32, 1 << 13, 16
# maximum channels of keys at a time in the last kernel of a backward pass: with 64 it spills registers on A100 and H100
_CHANNELS = 32


class ChunkTable(NamedTuple):
    """The chunks of all segments.

    chunks: rows [begin, end) of each chunk, int32 (M, 2). first: the first chunk of each segment, int32 (N + 1).
    bounds: rows [begin, end) of each segment, int64 (N, 2). size: C. rows: the total number of rows, or 0 if there are
    gaps between segments.
    """

    chunks: Tensor
    first: Tensor
    bounds: Tensor
    size: int
    rows: int


def unsupported_reason(requirements: KernelRequirements) -> str | None:
    """Return why this kernel cannot serve a call with these requirements, or None if it can."""
    device = requirements.device
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"Triton kernels run on NVIDIA GPUs, not on {device.type}"
    if compute_capability(device) < 80:
        return "it needs compute capability 8.0 (A100) or later"
    if requirements.dtype not in _DTYPES:
        return f"it computes bfloat16, float16 and float32, not {str(requirements.dtype)[6:]}"
    if requirements.op.decay == "channel":
        return f"it has one decay for all channels of a head, and {requirements.op.name} has one for each"
    for dim in (requirements.head_dim, requirements.v_head_dim):
        if dim > _MOST_DIM:
            return f"dims of keys and values are at most {_MOST_DIM}, not {dim}"
    return None


def chunk_size(requirements: KernelRequirements) -> int:
    """Return the number of tokens per chunk, C."""
    bytes_of_key = max(triton.next_power_of_2(requirements.head_dim), _LEAST_SIDE) * requirements.dtype.itemsize
    return max(min(_CHUNK, _BYTES_OF_KEYS // bytes_of_key), _LEAST_CHUNK)


def prepare(segments: Segments, requirements: KernelRequirements) -> ChunkTable:
    """Return the chunk table of the segments, on the host."""
    size = chunk_size(requirements)
    chunks: list[tuple[int, int]] = []
    first = [0]
    for begin, end in segments:
        chunks += [(start, min(start + size, end)) for start in range(begin, end, size)]
        first.append(len(chunks))
    ends = [0, *(end for _, end in segments)]
    follow = all(begin == before for (begin, _), before in zip(segments, ends, strict=False))
    table = torch.tensor(chunks, dtype=torch.int32).reshape(-1, 2)
    return ChunkTable(
        table, torch.tensor(first, dtype=torch.int32), bounds_of(segments), size, ends[-1] if follow else 0
    )


def forward(x: RecurrenceTokens, chunks: ChunkTable, state_NHKV: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (o_THV, the state after each segment), in float32. o is 0 outside the segments."""
    call = _Call(x, chunks, state_NHKV)
    leaving = call.passed_on(state_NHKV, keep=True)
    o = call.result(x.heads, x.v.shape[2])
    call.run(output_kernel, call.programs, entering_=call.entering, **tensor_arguments(heard=call.heard, o=o))
    return o, leaving


def states(
    x: RecurrenceTokens, chunks: ChunkTable, state_NHKV: Tensor, transitions: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute (the state after each segment, each segment's A), in float32. See `chunked.states`."""
    key_dim, value_dim = state_NHKV.shape[2:]
    if not transitions or x.beta is None:
        leaving = _Call(x, chunks, state_NHKV).passed_on(state_NHKV, keep=False)
        return leaving, diagonal_transitions(x, chunks.bounds, state_NHKV.dtype) if transitions else None
    # append unit vectors to the state: with values of zero, the recurrence is linear in the state, so these become A
    identity = torch.eye(key_dim, dtype=state_NHKV.dtype, device=state_NHKV.device)
    state = torch.cat([state_NHKV, identity.expand(*state_NHKV.shape[:2], -1, -1)], -1)
    leaving = _Call(x._replace(v=F.pad(x.v, (0, key_dim))), chunks, state).passed_on(state, keep=False)
    return leaving[..., :value_dim].contiguous(), leaving[..., value_dim:].contiguous()


def backward(
    x: RecurrenceTokens, chunks: ChunkTable, state_NHKV: Tensor, do_THV: Tensor, dstate_NHKV: Tensor
) -> tuple[RecurrenceTokens, Tensor]:
    """Compute (gradients of the tokens, gradients of the initial states), in float32. See `chunked.backward`."""
    call = _Call(x, chunks, state_NHKV)
    call.passed_on(state_NHKV, keep=True, inverses=True)
    dentering = call.passed_back(do_THV, dstate_NHKV, keep=True)
    key_dim, value_dim = state_NHKV.shape[2:]
    dq, dk = call.result(x.heads, key_dim), call.result(x.heads, key_dim)
    dv, dg = call.result(x.heads, value_dim), call.result(x.heads) if x.decays_by_token else None
    dbeta = None if x.beta is None else call.result(x.heads)
    results = {"dq": dq, "dk": dk, "dv": dv, "dg": dv if dg is None else dg, "dbeta": dv if dbeta is None else dbeta}
    rows = tensor_arguments(heard=call.heard, do=call.do, du=call.du, **results)
    tensors = {"entering_": call.entering, "dleaving_": call.dleaving, "inverse_": call.inverse}
    call.run(gradient_kernel, call.programs, **rows, **tensors, DG=dg is not None)
    if call.group > 1:
        dq, dk = (dy.unflatten(1, (-1, call.group)).sum(2) for dy in (dq, dk))
    # a decay that all tokens share gets no gradient, so g stands in its place
    return RecurrenceTokens(dq, dk, dv, x.g if dg is None else dg, dbeta), dentering


def gradient_states(
    x: RecurrenceTokens, chunks: ChunkTable, do_THV: Tensor, dstate_NHKV: Tensor, transitions: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute (gradients of the initial states, each segment's A), in float32.

    See `chunked.gradient_states`.
    """
    call = _Call(x, chunks, dstate_NHKV)
    if x.beta is not None:
        call.solve()
    dentering = call.passed_back(do_THV, dstate_NHKV, keep=False)
    return dentering, states(x, chunks, torch.zeros_like(dstate_NHKV), True)[1] if transitions else None


class _Call:
    """A call: its tensors in the form that the kernels take, and the tensors passed between its launches."""

    def __init__(self, x: RecurrenceTokens, chunks: ChunkTable, state_NHKV: Tensor):
        self.chunks, self.tokens, self.heads = chunks, len(x.v), x.heads
        self.group = x.heads // x.q.shape[1]
        self.key_dim, self.value_dim = x.q.shape[2], x.v.shape[2]
        self.is_delta, self.programs = x.beta is not None, len(chunks.chunks) * x.heads
        q, k, self.v = (_with_dense_rows(y) for y in (x.q, x.k, x.v))
        # kernels do not read absent tensors: pass any tensor in their place
        g = q if x.g is None else x.g.expand(self.tokens, -1)
        self.q, self.dtype = q, q.dtype
        tokens = {"q": q, "k": k, "v": self.v, "g": g, "beta": q if x.beta is None else x.beta}
        channels = max(triton.next_power_of_2(self.key_dim), _LEAST_SIDE)
        most = min(_COLUMNS, _BYTES_OF_STATE // (channels * q.dtype.itemsize), triton.next_power_of_2(self.value_dim))
        columns = max(most, _LEAST_SIDE)
        self.arguments: dict[str, Any] = tensor_arguments(**tokens) | {
            "chunks_": chunks.chunks,
            "first_": chunks.first,
            "heads": self.heads,
            "group": self.group,
            "K": self.key_dim,
            "V": self.value_dim,
            "PK": channels,
            "BK": min(channels, _CHANNELS),
            "BV": columns,
            "C": chunks.size,
            "DECAY": x.g is not None,
            "DELTA": self.is_delta,
        }
        # tensors that launches write for later launches; until they are allocated, any other tensor stands in for them
        self.w = self.inverse = self.entering = self.dleaving = self.heard = self.du = self.do = self.v
        self.scans = len(chunks.bounds) * self.heads * triton.cdiv(self.value_dim, columns)

    def solve(self, inverses: bool = False) -> None:
        """Compute u and w of all chunks. With `inverses`, keep the inverses of the triangular systems."""
        size = self.chunks.size
        self.w, self.heard = self._scratch(self.tokens, self.key_dim), self._scratch(self.tokens, self.value_dim)
        if inverses:
            self.inverse = self.q.new_empty(len(self.chunks.chunks), self.heads, size, size)
        self.run(
            triangular_kernel,
            self.programs,
            **tensor_arguments(w=self.w, u=self.heard),
            inverse_=self.inverse,
            KEEP=inverses,
        )

    def passed_on(self, state_NHKV: Tensor, keep: bool, inverses: bool = False) -> Tensor:
        """Return the state after each segment.

        With `keep`, also keep the states that enter chunks and the values that tokens store, for later launches.
        """
        if self.is_delta:
            self.solve(inverses)
        if keep:
            self.entering = self._states()
        leaving = torch.empty_like(state_NHKV, memory_format=torch.contiguous_format)
        places = dict(entering_=self.entering, state_=state_NHKV.contiguous(), leaving_=leaving)
        self.run(scan_kernel, self.scans, **tensor_arguments(w=self.w, u=self.heard), **places, KEEP=keep)
        return leaving

    def passed_back(self, do_THV: Tensor, dstate_NHKV: Tensor, keep: bool) -> Tensor:
        """Return the gradient of each segment's initial state.

        With `keep`, also keep du and the gradients of the states that leave chunks, for later launches.
        """
        self.do = _with_dense_rows(do_THV)
        if keep:
            self.dleaving = self._states()
        if keep or self.is_delta:
            self.du = self._scratch(self.tokens, self.value_dim)
            self.run(asked_kernel, self.programs, **tensor_arguments(do=self.do, du=self.du))
        dentering = torch.empty_like(dstate_NHKV, memory_format=torch.contiguous_format)
        places = dict(dleaving_=self.dleaving, dstate_=dstate_NHKV.contiguous(), dentering_=dentering)
        rows = tensor_arguments(w=self.w, do=self.do, du=self.du)
        self.run(scan_back_kernel, self.scans, **rows, **places, KEEP=keep)
        return dentering

    def result(self, *shape: int) -> Tensor:
        """Return a float32 tensor (T, ...) for results: zeros if there are rows outside the segments, otherwise uninitialized."""
        make = torch.empty if self.chunks.rows == self.tokens else torch.zeros
        return make((self.tokens, *shape), dtype=torch.float32, device=self.q.device)

    def run(self, kernel: Any, programs: int, **arguments: Any) -> None:
        """Launch a kernel with the call's arguments and `arguments`. With meta tensors, launch nothing."""
        # use fewer warps if chunks have few rows, because a product cannot then be shared among many
        warps = 8 if self.chunks.size == _CHUNK else 4
        launch = make_launch(kernel, programs, self.arguments | arguments, Tile(0, 0, warps, 1))
        if self.q.device != META:
            run_launch(launch)

    def _scratch(self, *shape: int) -> Tensor:
        return self.q.new_empty(shape[0], self.heads, *shape[1:])

    def _states(self) -> Tensor:
        return self.q.new_empty(len(self.chunks.chunks), self.heads, self.key_dim, self.value_dim)


def _with_dense_rows(y: Tensor) -> Tensor:
    return y if y.stride(-1) == 1 else y.contiguous()
