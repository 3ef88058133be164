"""Memory layout of a pass: all of its tensors get a place in one arena when a plan is lowered.

The sizes and lifetimes of all tensors that a pass allocates besides its results are known beforehand: buffers, packed messages,
gathered operands and kernel results. A pass therefore requests memory once, and its need is known to the byte. The largest
tensors are placed first, each at the lowest offset that is free during its lifetime (greedy by size,
https://arxiv.org/abs/2001.03288).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from distattn.ir.plan import BACKWARD_PAYLOADS, FORWARD_PAYLOADS, REDUCED_PAYLOADS, Call, Payload
from distattn.kernels.spec import LaunchShape, Workspace
from distattn.parallel.runtime.lowering.packed_messages import PackedMessages
from distattn.parallel.runtime.lowering.row_bundles import Bundle, RowFormat, Widths
from distattn.parallel.runtime.lowering.views import OWN, BufferKey, View, travels_from_its_buffer

if TYPE_CHECKING:
    from distattn.parallel.runtime.program import KernelLaunch, Message, Program, ProgramStep

# alignment of every tensor in the arena, in bytes: that of torch's allocator, and more than kernels need
ALIGNMENT = 512
# number of arena sizes between one power of two and the next
_SIZES = 32

# identifies a tensor of a step: a buffer; a packed message, by its index in the step; an operand or result, by the index of
# its launch and its payload; or the rows of a bundle, by its first buffer or message
PlaceKey = BufferKey | tuple[str, int] | tuple[str, int, Payload] | tuple[str, BufferKey]


class PlacedTensor(NamedTuple):
    """A tensor in the arena. offset: its distance from the start of the arena, in elements of the tensor's dtype."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class BundleKey(NamedTuple):
    """The key of a bundle's matrix among the tensors of a step: the matrix's own key, the keys of its parts, and the row
    format."""

    rows: PlaceKey
    parts: tuple[PlaceKey, ...]
    format: RowFormat


class FlatPlaces(NamedTuple):
    """Places of tensors in one flat tensor. numbers, bytes: the size of the flat tensor, in elements and in bytes."""

    places: dict[PlaceKey, list[PlacedTensor]]
    numbers: int
    bytes: int


class Request(NamedTuple):
    """A request for memory from moment `begin` to moment `end`, inclusive."""

    bytes: int
    begin: int
    end: int


def place_fields(widths: Widths, rows: int, heads: int, offset: int) -> tuple[list[PlacedTensor], int]:
    """Place tensors one after another from byte `offset` on. Return the tensors and the byte at which the last of them ends."""
    tensors = []
    for width, name in widths:
        dtype = getattr(torch, name)
        shape = (rows, heads) if width is None else (rows, heads, width)
        strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        tensors.append(PlacedTensor(dtype, shape, strides, offset // dtype.itemsize))
        offset += -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return tensors, offset


def result_fields(call: Call, payload: Payload) -> Widths:
    """Return the fields of a payload as kernels compute them, in the accumulation dtype."""
    return tuple((width, call.accumulation_dtype) for width, _ in call.payload_fields(payload))


class PassMemory(NamedTuple):
    """The bytes that a pass needs on the device besides q, k, v and a contiguous dO, by component.

    arena: buffers, messages, gathered operands and partial results. The arena is kept between passes. Passes on one stream
    share the largest of their arenas; a forward pass requests the size of the backward pass if one will follow (see `arenas`).
    results: the rank's own results while they are accumulated. A forward pass adds the tensors kept for the backward pass, a
    backward pass adds delta and, for latent attention, the gradient of the weights. Kept tensors are received directly into
    their final place; layers recomputed by a checkpoint share one place for them, which is also kept between passes. workspace:
    the largest workspace that the kernel needs for a launch. For a kernel that cannot count its workspace, it includes only
    expanded latents and their gradients. returned: extra memory while results are converted from the accumulation dtype to the
    inputs' dtype, one by one, smallest first. states: the states of a recurrence that live across steps. The few values per row
    that a sink needs are not counted.
    """

    arena: int
    results: int
    workspace: int
    returned: int
    states: int = 0

    @property
    def peak(self) -> int:
        """The peak in bytes."""
        return self.arena + self.beside_arena

    @property
    def beside_arena(self) -> int:
        """The peak in bytes, not counting the arena."""
        return self.results + self.states + max(self.workspace, self.returned)


def forward_memory(program: Program, workspace: Workspace | None) -> PassMemory:
    """Return the memory that a program's forward pass needs on its rank."""
    results, returned = _result_bytes(program, (Payload.O,))
    workspace_bytes = _workspace(program, "forward", program.forward, workspace)
    states = 0
    if program.forward_states is not None:
        results += program.forward_states.kept_bytes
        states = program.forward_states.peak_bytes
    kept = program.kept_places.bytes
    return PassMemory(program.forward_bytes, results + kept, workspace_bytes, returned, states)


def backward_memory(program: Program, workspace: Workspace | None) -> PassMemory:
    """Return the memory that a program's backward pass needs on its rank, not counting tensors kept by the forward pass."""
    call = program.call
    if not call.op.has_gradient:
        return PassMemory(0, 0, 0, 0)
    results, returned = _result_bytes(program, (Payload.dQ, Payload.dKV))
    delta = program.tokens * call.heads * getattr(torch, call.accumulation_dtype).itemsize
    if program.sums_where_copied:
        delta = 0
    workspace_bytes = _workspace(program, "backward", program.backward, workspace)
    if program.backward_states is not None:
        # a recurrence has no delta
        return PassMemory(
            program.backward_bytes, results, workspace_bytes, returned, program.backward_states.peak_bytes
        )
    if call.op.kind == "latent_attention":
        wide, narrow = (getattr(torch, name).itemsize for name in (call.accumulation_dtype, call.dtype))
        weights = call.heads * (call.head_dim - call.op.rotary_dim + call.v_head_dim) * call.op.latent_dim
        if wide > narrow:
            # the weights' gradients are converted last, when the other sums have been freed
            sums = _sums(program, (Payload.dQ, Payload.dKV))
            returned = max(returned, weights * narrow - sum(summed - final for summed, final in sums))
        results += weights * wide
    return PassMemory(program.backward_bytes, results + delta, workspace_bytes, returned)


def forward_arena_bytes(program: Program, *inputs: Tensor | None) -> int:
    """Return the arena size to request in a forward pass: enough for both passes if any input requires a gradient.

    The arena then grows early, before much has been saved for backward passes, and no smaller arena is left unused.
    """
    for x in inputs:
        if x is not None and x.requires_grad:
            return max(program.forward_bytes, program.backward_bytes)
    return program.forward_bytes


def place_kept(call: Call, kept: Mapping[BufferKey, int], bundles: Mapping[BufferKey, Bundle]) -> FlatPlaces:
    """Place the buffers kept for the backward pass in one flat tensor of the inputs' dtype. kept: each buffer's row count."""
    places: dict[PlaceKey, list[PlacedTensor]] = {}
    begin = size = 0
    for key, rows in kept.items():
        if key in places:
            continue
        bundle = bundles.get(key, ())
        if bundle:
            of_rows = _rows_key(call, bundle)
            matrix = PlacedTensor(
                getattr(torch, call.dtype), (rows, of_rows.format.numbers), (of_rows.format.numbers, 1), begin
            )
            places |= _places_in_rows(of_rows, matrix)
            begin += prod(matrix.shape)
            size += prod(matrix.shape) * matrix.dtype.itemsize
            continue
        places[key] = []
        for width, name in call.payload_fields(key.payload):
            shape = (rows, key.h1 - key.h0, width or 1)
            places[key].append(PlacedTensor(getattr(torch, name), shape, (shape[1] * shape[2], shape[2], 1), begin))
            begin += prod(shape)
            size += prod(shape) * places[key][-1].dtype.itemsize
    return FlatPlaces(places, begin, size)


def own_result_fields(call: Call, payload: Payload, unadded: Container[Payload]) -> Widths:
    """Return the fields of the rank's own results: in the inputs' dtype if nothing is added to them, except for LSEs."""
    return call.payload_fields(payload, narrow=payload in unadded)


class OwnTensors(NamedTuple):
    """The rank's own tensors of a payload: their buffer key, and each tensor's dtype and shape."""

    key: BufferKey
    tensors: tuple[tuple[torch.dtype, tuple[int, ...]], ...]


def describe_own_tensors(call: Call, tokens: int, unadded: Container[Payload]) -> dict[Payload, OwnTensors]:
    """Return the buffer key, dtypes and shapes of the rank's own tensors for each payload that consists of tokens."""
    out = {}
    for payload in dict.fromkeys((*FORWARD_PAYLOADS, *BACKWARD_PAYLOADS)):
        heads = call.payload_heads(payload)
        tensors = tuple(
            (getattr(torch, name), (tokens, heads) if width is None else (tokens, heads, width))
            for width, name in own_result_fields(call, payload, unadded)
        )
        out[payload] = OwnTensors(BufferKey(payload, OWN, 0, heads), tensors)
    return out


def assign_places(call: Call, steps: list[ProgramStep], bundles: Mapping[BufferKey, Bundle]) -> int:
    """Assign a place to every tensor of a pass (`ProgramStep.places`). Return the arena's size in bytes.

    bundles: maps each of the rank's buffers that is in a bundle to that bundle.
    """
    tensors, requests = [], []
    for step, key, widths, rows, heads, begin, end in _tensors(call, steps, bundles):
        tensors.append((step, key, widths, rows, heads))
        requests.append(Request(place_fields(widths, rows, heads, 0)[1], begin, end))
    offsets, size = find_places(requests)
    for (step, key, widths, rows, heads), offset in zip(tensors, offsets, strict=True):
        places = place_fields(widths, rows, heads, offset)[0]
        if isinstance(key, BundleKey):
            step.places |= _places_in_rows(
                key, places[0]._replace(shape=(rows, key.format.numbers), strides=(key.format.numbers, 1))
            )
        else:
            step.places[key] = places
    return rounded_arena_bytes(size)


def _rows_key(call: Call, bundle: Bundle) -> BundleKey:
    """Return the key of the matrix whose rows the buffers of a bundle share."""
    parts = [(key.h1 - key.h0, call.payload_fields(key.payload)) for key in bundle]
    return BundleKey(("rows", bundle[0]), bundle, RowFormat.of(parts))


def _places_in_rows(key: BundleKey, matrix: PlacedTensor) -> dict[PlaceKey, list[PlacedTensor]]:
    """Return the places of a bundle: that of its matrix, and those of its parts' tensors, which are views of the matrix."""
    places: dict[PlaceKey, list[PlacedTensor]] = {key.rows: [matrix]}
    begin, row_bytes = (size * matrix.dtype.itemsize for size in (matrix.offset, matrix.strides[0]))
    for part, tensors in zip(key.parts, key.format.tensors, strict=True):
        places[part] = []
        for dtype, heads, width, first in tensors:
            shape = (matrix.shape[0], heads) if width is None else (matrix.shape[0], heads, width)
            strides = (row_bytes // dtype.itemsize, *((1,) if width is None else (width, 1)))
            places[part].append(PlacedTensor(dtype, shape, strides, begin // dtype.itemsize + first))
    return places


def rounded_arena_bytes(size: int) -> int:
    """Round an arena's size up by at most 1/32, so that batches of similar size have arenas of the same size."""
    unit = max(1 << max(size.bit_length() - 1, 0), _SIZES * ALIGNMENT) // _SIZES
    return -(-size // unit) * unit


def find_places(requests: Iterable[Request]) -> tuple[list[int], int]:
    """Return an offset for each request, such that requests alive at the same moment do not overlap, and the total size."""
    requests = list(requests)
    offsets = [0] * len(requests)
    # for each moment, the placed requests that are alive at that moment
    placed: list[set[int]] = [set() for _ in range(max((request.end for request in requests), default=-1) + 1)]
    for i in sorted(range(len(requests)), key=lambda i: (-requests[i].bytes, i)):
        request = requests[i]
        if not request.bytes:
            continue
        beside = set().union(*placed[request.begin : request.end + 1])
        low = 0
        for offset, end in sorted((offsets[j], offsets[j] + requests[j].bytes) for j in beside):
            if low + request.bytes <= offset:
                break
            low = max(low, end)
        offsets[i] = low
        for moment in placed[request.begin : request.end + 1]:
            moment.add(i)
    return offsets, max((offset + request.bytes for offset, request in zip(offsets, requests, strict=True)), default=0)


def _tensors(
    call: Call, steps: list[ProgramStep], bundles: Mapping[BufferKey, Bundle]
) -> Iterator[tuple[ProgramStep, PlaceKey | BundleKey, Widths, int, int, int, int]]:
    """Yield (step, key, fields, rows, heads, first moment, last moment) for every tensor of a pass.

    A step has one moment for its start and one for each launch. A bundle counts as one tensor with one head.
    """
    begins, moment = [], 0
    for step in steps:
        begins.append(moment)
        moment += 1 + len(step.launches)
    ends = [begin - 1 for begin in [*begins, moment][1:]]
    released = {key: end for step, end in zip(steps, ends, strict=True) for key in step.release}
    for step, begin, end in zip(steps, begins, ends, strict=True):
        for key, rows in step.allocate.items():
            bundle = bundles.get(key, ())
            if not bundle:
                yield step, key, call.payload_fields(key.payload), rows, key.h1 - key.h0, begin, released[key]
            elif key == bundle[0]:
                of_rows = _rows_key(call, bundle)
                yield step, of_rows, of_rows.format.widths, rows, 1, begin, released[key]
        for name, packed_messages in (("send", step.packed_sends), ("receive", step.packed_receives)):
            for packed in packed_messages:
                yield from _packed(call, step, name, packed.first, packed.rows, begin, end)
        for numbers in _others(step.joined_sends, step.packed_sends):
            if not _travels_from_its_buffer(call, [step.sends[number] for number in numbers], bundles):
                yield from _packed(call, step, "send", numbers, None, begin, end)
        for numbers in _others(step.joined_receives, step.packed_receives):
            if step.receives[numbers[0]][0] in REDUCED_PAYLOADS:
                yield from _packed(call, step, "receive", numbers, None, begin, end)
        for number, launch in enumerate(step.launches):
            now = begin + 1 + number
            for payload, view in launch.operands.items():
                if not view.is_part:
                    yield step, ("operand", number, payload), call.payload_fields(payload), *_shape(view), now, now
            for payload, view in launch.results.items():
                if not view.is_part:
                    yield step, ("result", number, payload), result_fields(call, payload), *_shape(view), now, now


def _packed(
    call: Call, step: ProgramStep, name: str, numbers: tuple[int, ...], rows: int | None, begin: int, end: int
) -> Iterator[tuple[ProgramStep, PlaceKey | BundleKey, Widths, int, int, int, int]]:
    """Yield the tensors of messages that travel together, in the dtypes they are sent in. name: "send" or "receive".

    rows: the total number of rows if other peers' rows follow, otherwise None.
    """
    messages = step.sends if name == "send" else step.receives
    first = messages[numbers[0]][1]
    if not first.bundle:
        payload, message = messages[numbers[0]]
        count = message.view.rows if rows is None else rows
        yield step, (name, numbers[0]), call.comm_fields(payload), count, message.view.heads, begin, end
        return
    parts = [(message.view.heads, call.comm_fields(payload)) for payload, message in (messages[i] for i in numbers)]
    key = BundleKey((f"rows of {name}", numbers[0]), tuple((name, number) for number in numbers), RowFormat.of(parts))
    yield step, key, key.format.widths, first.view.rows if rows is None else rows, 1, begin, end


def _others(joined: list[tuple[int, ...]], packed: tuple[PackedMessages, ...]) -> list[tuple[int, ...]]:
    """Return the groups of joined messages that are not packed together with other peers' messages."""
    return [numbers for numbers in joined if not any(numbers in some.begins for some in packed)]


def _travels_from_its_buffer(
    call: Call, messages: list[tuple[Payload, Message]], bundles: Mapping[BufferKey, Bundle]
) -> bool:
    """Return whether messages that travel together need no copy because they are sent straight from tensors or from a
    bundle's rows."""
    if not all(travels_from_its_buffer(call, payload, message.view, message.segments) for payload, message in messages):
        return False
    first = messages[0][1]
    if not first.bundle:
        return not any(piece.buffer in bundles for piece in first.view.slices)
    for pieces in zip(*(message.view.slices for _, message in messages), strict=False):
        buffers = tuple(piece.buffer for piece in pieces)
        same_rows = all(piece.rows == pieces[0].rows for piece in pieces)
        if not same_rows or bundles.get(buffers[0]) != buffers:
            return False
    return len({len(message.view.slices) for _, message in messages}) == 1


def _shape(view: View) -> tuple[int, int]:
    return view.rows, view.heads


def _itemsize(program: Program) -> int:
    return int(getattr(torch, program.call.dtype).itemsize)


def _result_bytes(program: Program, payloads: tuple[Payload, ...]) -> tuple[int, int]:
    """Return the bytes of the rank's own results in the accumulation dtype, and the peak extra bytes while they are
    converted."""
    call = program.call
    summed = sum(
        _cells(program, payload, width) * getattr(torch, name).itemsize
        for payload in payloads
        for width, name in own_result_fields(call, payload, program.unadded)
    )
    summed += sum(
        _cells(program, payload, width) * _itemsize(program)
        for payload in payloads
        if payload in program.turns
        for width, _ in call.payload_fields(payload)
        if width
    )
    most = now = 0
    for wide, narrow in sorted(_sums(program, payloads)):
        most = max(most, now + narrow)
        now += narrow - wide
    # sums of finished rows are freed before the other sums are converted
    freed = sum(
        _cells(program, payload, width) * getattr(torch, name).itemsize
        for payload in payloads
        if payload in program.turns
        for width, name in own_result_fields(call, payload, program.unadded)
        if width
    )
    return summed, max(0, most - freed)


def _sums(program: Program, payloads: tuple[Payload, ...]) -> list[tuple[int, int]]:
    """Return (bytes, bytes in the inputs' dtype) of each result that is summed in a dtype other than the inputs'."""
    call = program.call
    return [
        (cells * getattr(torch, name).itemsize, cells * _itemsize(program))
        for payload in payloads
        if payload not in program.turns
        for width, name in own_result_fields(call, payload, program.unadded)
        if (cells := _cells(program, payload, width)) and width and name != call.dtype
    ]


def _cells(program: Program, payload: Payload, width: int | None) -> int:
    return program.tokens * program.call.payload_heads(payload) * (width or 1)


def _workspace(program: Program, direction: str, steps: list[ProgramStep], workspace: Workspace | None) -> int:
    """Return the bytes that the kernel allocates in its most demanding launch."""
    if workspace is None:
        return 0
    call, most = program.call, 0
    for launch in (launch for step in steps for launch in step.launches):
        (rows, heads), (keys, kv_heads) = _shape(launch.operands[Payload.Q]), _shape(launch.operands[Payload.KV])
        dq_bytes = _dq_bytes(program, launch) if direction == "backward" else 4
        shape = LaunchShape(rows, keys, heads, kv_heads, call.head_dim, call.v_head_dim, dq_bytes)
        most = max(most, workspace(direction, shape, launch.schedule))
    return most


def _dq_bytes(program: Program, launch: KernelLaunch) -> int:
    """Return the bytes per element of the tensor that the kernel writes dQ to."""
    call, view = program.call, launch.results[Payload.dQ]
    name = call.accumulation_dtype
    if view.is_part:
        is_own = view.slices[0].buffer.step == OWN
        ((_, name),) = own_result_fields(call, Payload.dQ, program.unadded if is_own else ())
    return int(getattr(torch, name).itemsize)
