"""The executor, which runs a program on one rank, forward and backward, with any transport and kernel.

One loop serves both directions. Each step first posts its messages, then runs kernels on the tensors available when the step
started, then waits for messages and merges received partial results. Results of the rank's own tasks are merged first, then
arrivals in order. The functions are generators that pause while messages are in flight, so that the ranks of one process can
run in lockstep.
"""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple, TypeVar

from torch import Tensor

from distattn.ir.plan import REDUCED_PAYLOADS, Payload
from distattn.kernels.registry import Kernel
from distattn.kernels.spec import FinalRows, ScoreMod
from distattn.parallel.runtime.arenas import ARENAS
from distattn.parallel.runtime.communication.transport import Packet, Transport
from distattn.parallel.runtime.execution.buffers import Buffers, Fields, Places, convert_sums
from distattn.parallel.runtime.execution.state_tensors import HeldStateTensors
from distattn.parallel.runtime.lowering.memory import forward_arena_bytes
from distattn.parallel.runtime.lowering.packed_messages import PackedMessages
from distattn.parallel.runtime.program import KernelLaunch, Message, Program, ProgramStep, kept_key

Result = TypeVar("Result")
# a generator that pauses while messages are in flight, and returns its result
PausableRun = Generator[None, None, Result]


class Target(NamedTuple):
    """The tensors that a kernel writes a result to. adds: True to add or merge the result. is_part: True if the tensors are
    part of a buffer.

    final: where to write the rows that this launch finishes, if the result is returned in a different dtype than it is summed in.
    """

    fields: Fields
    adds: bool
    is_part: bool
    final: FinalRows | None = None

    @property
    def final_argument(self) -> dict[str, FinalRows]:
        """The keyword argument `final` of a kernel, or nothing, since not all kernels accept `final`."""
        return {} if self.final is None else {"final": self.final}


# (launch, operands, targets of results) -> results; there are no targets if the kernel allocates its own tensors
Compute = Callable[[KernelLaunch, dict[Payload, Fields], dict[Payload, Target]], dict[Payload, Fields]]


def forward(
    program: Program,
    transport: Transport,
    kernel: Kernel,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    score: ScoreMod,
) -> PausableRun[tuple[Tensor, Tensor, Tensor]]:
    """Compute core attention for this rank's tokens: (o_THE, lse_TH, kept).

    lse is in the accumulation dtype. So is o, unless nothing is added to it or launches finish its rows; in that case it is in
    the inputs' dtype. `kept` is one flat tensor of the received tensors that the backward pass needs (empty unless the policy
    is "keep").
    """

    def compute(
        launch: KernelLaunch, operands: dict[Payload, Fields], targets: dict[Payload, Target]
    ) -> dict[Payload, Fields]:
        (q,), (k, v) = operands[Payload.Q], operands[Payload.KV]
        inputs = (q, k, v, launch.schedule, score.for_heads(launch.heads))
        if not targets:
            return {Payload.O: kernel.forward(*inputs)}
        target = targets[Payload.O]
        return {Payload.O: kernel.forward(*inputs, into=target.fields, merge=target.adds, **target.final_argument)}

    with (
        ARENAS.kept(program.kept_places.numbers, q_THD.dtype, q_THD.device) as kept,
        ARENAS.borrowed(forward_arena_bytes(program, q_THD, k_TKD, v_TKE), q_THD.device) as arena,
    ):
        buffers = Buffers(program, arena)
        buffers.bind_own({Payload.Q: (q_THD,), Payload.KV: (k_TKD, v_TKE)})
        if program.kept_places.places:
            buffers.bind_flat(program.kept_places, kept)
        o_THE, lse_TH = buffers.new_own(Payload.O)
        final_THE = buffers.new_final(Payload.O, q_THD.dtype) if Payload.O in program.turns else None
        yield from run_steps("forward", program.forward, transport, buffers, compute, kernel.ACCUMULATES)
        buffers.close()
    return o_THE if final_THE is None else final_THE, lse_TH, kept


def backward(
    program: Program,
    transport: Transport,
    kernel: Kernel,
    do_THE: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor | None,
    kept: Tensor,
    score: ScoreMod,
    o_THE: Tensor | None = None,
) -> PausableRun[tuple[Tensor, Tensor, Tensor]]:
    """Compute gradients (dq_THD, dk_TKD, dv_TKE) in the inputs' dtype.

    delta_TH: rowsum(dO * O), minus the gradient of the log-sum-exp if it has one. If None, `program.sums_where_copied` must be
    True, and the row sums are computed from o_THE while dO is copied.
    """

    def compute(
        launch: KernelLaunch, operands: dict[Payload, Fields], targets: dict[Payload, Target]
    ) -> dict[Payload, Fields]:
        (q,), (k, v), (do, lse, delta) = operands[Payload.Q], operands[Payload.KV], operands[Payload.dO]
        inputs = (do, q, k, v, lse, delta, launch.schedule, score.for_heads(launch.heads))
        if not targets:
            dq, dk, dv = kernel.backward(*inputs)
        else:
            of_q, of_kv = targets[Payload.dQ], targets[Payload.dKV]
            into = of_q.fields[0], of_kv.fields
            dq, dk, dv = kernel.backward(*inputs, into=into, add=(of_q.adds, of_kv.adds), **of_q.final_argument)
        return {Payload.dQ: (dq,), Payload.dKV: (dk, dv)}

    with ARENAS.borrowed(program.backward_bytes, q_THD.device) as arena:
        buffers = Buffers(program, arena)
        buffers.bind_own({Payload.Q: (q_THD,), Payload.KV: (k_TKD, v_TKE)})
        if delta_TH is None:
            assert program.sums_where_copied and o_THE is not None, "sums are made where dO is copied, or before"
            buffers.bind_outputs(do_THE, lse_TH, o_THE)
        else:
            buffers.bind_own({Payload.dO: (do_THE, lse_TH, delta_TH)})
        buffers.bind_flat(program.kept_places, kept, kept_key)
        sums = [*buffers.new_own(Payload.dQ), *buffers.new_own(Payload.dKV)]
        final_THD = buffers.new_final(Payload.dQ, q_THD.dtype) if Payload.dQ in program.turns else None
        yield from run_steps("backward", program.backward, transport, buffers, compute, kernel.ACCUMULATES)
        buffers.close()
        if final_THD is not None:
            sums[0] = final_THD
    dq_THD, dk_TKD, dv_TKE = convert_sums(sums, (q_THD.dtype, k_TKD.dtype, v_TKE.dtype))
    return dq_THD, dk_TKD, dv_TKE


def run_to_completion(run: PausableRun[Result]) -> Result:
    """Run one rank to completion, blocking while it waits for messages."""
    while True:
        try:
            next(run)
        except StopIteration as stop:
            # the type checker does not know the type of a generator's return value
            return stop.value  # type: ignore[no-any-return]


def run_in_lock_step(runs: Iterable[PausableRun[Result]]) -> list[Result]:
    """Run all ranks of a plan in one thread. Every rank posts the messages of a step before any rank waits for them."""
    waiting = list(enumerate(runs))
    results: dict[int, Result] = {}
    while waiting:
        unfinished = []
        for rank, run in waiting:
            try:
                next(run)
                unfinished.append((rank, run))
            except StopIteration as stop:
                results[rank] = stop.value
        waiting = unfinished
    return [results[rank] for rank in sorted(results)]


def run_steps(
    direction: str,
    steps: list[ProgramStep],
    transport: Transport,
    buffers: Buffers,
    compute: Compute,
    accumulates: bool,
    states: HeldStateTensors | None = None,
) -> PausableRun[None]:
    """Run the steps of a pass. states: the states of a recurrence, or None for other ops."""
    for number, step in enumerate(steps):
        where = f"in step {number + 1} of {len(steps)} of the {direction} pass"
        messages = _begin_step(step, buffers, states)
        pending = transport.exchange(messages.sends, messages.receives, step.collective, where)
        for launch_number, launch in enumerate(step.launches):
            operands = _operands(step, launch_number, buffers)
            targets = _targets(step, launch_number, buffers) if accumulates else {}
            _accumulate(step, launch_number, buffers, compute(launch, operands, targets), targets)
        for key, view in step.own_results:
            buffers.accumulate(key.payload, view, buffers.fields[key])
        yield
        pending.wait()
        _end_step(step, buffers, messages, states)


class _StepMessages(NamedTuple):
    """The messages of a step. arrived: the tensors that receive packed messages. incoming: the tensors that receive other
    results, keyed by message index."""

    sends: list[Packet]
    receives: list[Packet]
    arrived: list[list[Fields]]
    incoming: dict[int, Fields]


def _begin_step(step: ProgramStep, buffers: Buffers, states: HeldStateTensors | None) -> _StepMessages:
    """Create the buffers of a step. Return its messages, with the tensors that they are sent from or received into."""
    messages = _StepMessages([], [], [], {})
    for key in step.allocate:
        buffers.allocate(key, step.places[key], step.places.get(("rows", key), ()))
    for key, view in step.own_copies:
        buffers.copy_own(key, view)
    for packed in step.packed_sends:
        buffers.pack(packed, _places_of(step, "send", packed))
    for numbers in step.joined_sends:
        messages.sends.extend(_outgoing(buffers, step, numbers))
    for packed in step.packed_receives:
        messages.arrived.append([buffers.place(places) for places in _places_of(step, "receive", packed)])
    for numbers in step.joined_receives:
        messages.receives.extend(_incoming(buffers, step, numbers, messages.incoming))
    if states is not None and step.states is not None:
        # send only states of earlier steps: no step reads its own results
        for state in step.states.sends:
            messages.sends.extend(states.packets(state))
        for state in step.states.receives:
            messages.receives.extend(states.receive(state))
    return messages


def _end_step(step: ProgramStep, buffers: Buffers, messages: _StepMessages, states: HeldStateTensors | None) -> None:
    """Accumulate the received tensors, and release the buffers last used in this step."""
    for packed, parts in zip(step.packed_receives, messages.arrived, strict=True):
        # write the packed results first: they overwrite their rows, which hold no results yet
        buffers.unpack(packed, parts)
    for number, fields in messages.incoming.items():
        payload, message = step.receives[number]
        buffers.accumulate(payload, message.view, fields)
    for key in step.release:
        buffers.release(key)
    if states is not None and step.states is not None:
        states.end_step(step.states)


def _operands(step: ProgramStep, number: int, buffers: Buffers) -> dict[Payload, Fields]:
    """Return the tensors that a launch reads: parts of buffers, or copies."""
    operands = {}
    for payload, view in step.launches[number].operands.items():
        places = step.places.get(("operand", number, payload))
        operands[payload] = buffers.part(view) if places is None else buffers.gathered(view, places)
    return operands


def _targets(step: ProgramStep, number: int, buffers: Buffers) -> dict[Payload, Target]:
    """Return the tensors that a kernel writes its results to."""
    targets = {}
    for payload, view in step.launches[number].results.items():
        if view.is_part:
            final = buffers.final_rows(payload, view, step.launches[number].number)
            targets[payload] = Target(buffers.part(view), not view.slices[0].is_first, True, final)
        else:
            targets[payload] = Target(buffers.place(step.places["result", number, payload]), False, False)
    return targets


def _accumulate(
    step: ProgramStep, number: int, buffers: Buffers, results: dict[Payload, Fields], targets: dict[Payload, Target]
) -> None:
    """Accumulate the results of a launch, except those that the kernel wrote directly to their buffers."""
    for payload, fields in results.items():
        if payload not in targets or not targets[payload].is_part:
            buffers.accumulate(payload, step.launches[number].results[payload], fields)


def _places_of(step: ProgramStep, name: str, packed: PackedMessages) -> list[Places]:
    """Return the places of each part of the packed messages' rows."""
    return [step.places[name, number] for number in packed.first]


def _packed_with(numbers: tuple[int, ...], packed: tuple[PackedMessages, ...]) -> PackedMessages | None:
    """Return the packed messages that contain the messages `numbers`, or None if these are not packed."""
    for some in packed:
        if numbers in some.begins:
            return some
    return None


def _outgoing(buffers: Buffers, step: ProgramStep, numbers: tuple[int, ...]) -> list[Packet]:
    """Return the packets for messages sent together, taken from their buffer, or from a copy if the arena has a place for it."""
    payload, message = step.sends[numbers[0]]
    packed = _packed_with(numbers, step.packed_sends)
    if packed:
        places = step.places["rows of send" if message.bundle else "send", packed.first[0]]
        return _packets(payload, message, buffers.place_rows(places, message.segments, packed.begins[numbers]))
    if ("send", numbers[0]) not in step.places:
        return _packets(payload, message, buffers.message_parts(message.view, message.segments, bool(message.bundle)))
    copies = [buffers.gathered(step.sends[number][1].view, step.places["send", number]) for number in numbers]
    if message.bundle:
        return _packets(payload, message, buffers.place_rows(step.places["rows of send", numbers[0]], message.segments))
    return _packets(payload, message, _cut(copies[0], message))


def _incoming(
    buffers: Buffers, step: ProgramStep, numbers: tuple[int, ...], results: dict[int, Fields]
) -> list[Packet]:
    """Return the packets for messages that arrive together: copies are received into their buffers, partial results into new
    tensors, stored in `results`."""
    payload, message = step.receives[numbers[0]]
    packed = _packed_with(numbers, step.packed_receives)
    if packed:
        places = step.places["rows of receive" if message.bundle else "receive", packed.first[0]]
        return _packets(payload, message, buffers.place_rows(places, message.segments, packed.begins[numbers]))
    if payload not in REDUCED_PAYLOADS:
        return _packets(payload, message, buffers.message_parts(message.view, message.segments, bool(message.bundle)))
    for number in numbers:
        results[number] = buffers.place(step.places["receive", number])
    if message.bundle:
        return _packets(
            payload, message, buffers.place_rows(step.places["rows of receive", numbers[0]], message.segments)
        )
    return _packets(payload, message, _cut(results[numbers[0]], message))


def _cut(fields: Fields, message: Message) -> list[Fields]:
    """Cut the tensors of a message into its segments."""
    return [tuple(tensor[segment] for tensor in fields) for segment in message.segments]


def _packets(payload: Payload, message: Message, parts: list[Fields]) -> list[Packet]:
    return [
        Packet(message.peer, payload, tensor, message.row_bytes, message.row_format)
        for part in parts
        for tensor in part
    ]
