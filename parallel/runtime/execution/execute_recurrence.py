"""The executor of recurrences: it runs a program's segments and states on one rank, forward and backward.

Steps, messages and token buffers are handled by `execute`. This module runs the launches. It combines the states before a
launch's segments, or the gradients of the states after them, passes them to the kernel as one tensor, and stores the states
that other segments need.
"""

# T tokens on this rank, H value heads, G query and key heads, K key dim, V value dim, N segments in a launch, M documents

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from distattn.ir.op import Op
from distattn.ir.plan import Payload
from distattn.kernels.recurrence.tokens import RecurrenceTokens, Segments
from distattn.kernels.spec import KernelRequirements
from distattn.parallel.runtime.arenas import ARENAS
from distattn.parallel.runtime.communication.transport import Transport
from distattn.parallel.runtime.execution.buffers import Fields, convert_sums
from distattn.parallel.runtime.execution.execute import PausableRun, Target, run_steps
from distattn.parallel.runtime.execution.kept_tensors import KeptPlaces
from distattn.parallel.runtime.execution.state_pass import StatePass
from distattn.parallel.runtime.execution.state_tensors import State, compose_transitions
from distattn.parallel.runtime.lowering.memory import forward_arena_bytes
from distattn.parallel.runtime.lowering.segment_launches import SegmentKind
from distattn.parallel.runtime.lowering.state_program import SegmentStates
from distattn.parallel.runtime.program import KernelLaunch, Program, kept_key


class RecurrenceKernel(Protocol):
    """The functions of a kernel module for recurrences. See `distattn.kernels.recurrence.chunked`."""

    def prepare(self, segments: Segments, requirements: KernelRequirements) -> Any: ...

    def forward(self, x: RecurrenceTokens, segments: Any, state_NHKV: Tensor) -> tuple[Tensor, Tensor]: ...

    def states(
        self, x: RecurrenceTokens, segments: Any, state_NHKV: Tensor, transitions: bool
    ) -> tuple[Tensor, Tensor | None]: ...

    def backward(
        self, x: RecurrenceTokens, segments: Any, state_NHKV: Tensor, do_THV: Tensor, dstate_NHKV: Tensor
    ) -> tuple[RecurrenceTokens, Tensor]: ...

    def gradient_states(
        self, x: RecurrenceTokens, segments: Any, do_THV: Tensor, dstate_NHKV: Tensor, transitions: bool
    ) -> tuple[Tensor, Tensor | None]: ...


class ForwardResult(NamedTuple):
    """Outputs, final states of documents that end on this rank (0 for others) if requested, and tensors kept for the backward
    pass."""

    o: Tensor
    final_MHKV: Tensor | None
    kept: Tensor


class BackwardResult(NamedTuple):
    """Gradients of this rank's tokens, and those of the initial states of documents that start on this rank (0 for others; None
    without initial states)."""

    dx: RecurrenceTokens
    dinitial_MHKV: Tensor | None


def forward(
    program: Program,
    transport: Transport,
    kernel: RecurrenceKernel,
    x: RecurrenceTokens,
    initial_MHKV: Tensor | None,
    final_states: bool = True,
) -> PausableRun[ForwardResult]:
    """Compute the outputs of this rank's tokens in q's dtype and, if requested, the final states in the accumulation dtype."""
    places = KeptPlaces.of(program)
    with (
        ARENAS.kept(places.bytes, torch.uint8, x.v.device) as kept,
        ARENAS.borrowed(forward_arena_bytes(program, *x.by_token().values()), x.v.device) as arena,
    ):
        run = _Pass(program, kernel, x, "forward", arena, initial_MHKV)
        if final_states:
            run.make_edge_states()
        sums = [*run.buffers.new_own(Payload.O)]
        run.buffers.bind(places.tokens_in(kept))
        run.begun = places.states_in(kept)
        yield from run_steps("forward", program.forward, transport, run.buffers, run.forward, False, run.states)
        run.buffers.close()
    (o_THV,) = convert_sums(sums, [x.q.dtype])
    return ForwardResult(o_THV, run.edge_states, kept)


def backward(
    program: Program,
    transport: Transport,
    kernel: RecurrenceKernel,
    do_THV: Tensor,
    dfinal_MHKV: Tensor | None,
    x: RecurrenceTokens,
    initial_MHKV: Tensor | None,
    kept: Tensor,
) -> PausableRun[BackwardResult]:
    """Compute gradients in the dtypes of their tensors, and gradients of initial states in the accumulation dtype."""
    places = KeptPlaces.of(program)
    with ARENAS.borrowed(program.backward_bytes, x.v.device) as arena:
        run = _Pass(program, kernel, x, "backward", arena, initial_MHKV, dfinal_MHKV)
        if initial_MHKV is not None:
            run.make_edge_states()
        run.buffers.bind_own({Payload.dO: (do_THV,)})
        sums = [*run.buffers.new_own(Payload.dQ), *run.buffers.new_own(Payload.dKV)]
        run.buffers.bind({kept_key(key): fields for key, fields in places.tokens_in(kept).items()})
        for state, begun in zip(run.program_states.kept, places.states_in(kept), strict=True):
            run.states.put_kept(state.key, state.h0, State(None, begun))
        yield from run_steps("backward", program.backward, transport, run.buffers, run.backward, False, run.states)
        run.buffers.close()
    inputs = x.by_token()
    gradients = convert_sums(sums, [y.dtype for y in inputs.values()])
    return BackwardResult(x._replace(**dict(zip(inputs, gradients, strict=True))), run.edge_states)


class _Pass(StatePass):
    """One pass on one rank. begun: the tensors, kept for the backward pass, of the states that tasks start from."""

    def __init__(
        self,
        program: Program,
        kernel: RecurrenceKernel,
        x: RecurrenceTokens,
        direction: str,
        arena: Tensor,
        initial_MHKV: Tensor | None,
        dfinal_MHKV: Tensor | None = None,
    ):
        self.g_H = x.g if x.g is not None and not x.decays_by_token else None
        super().__init__(program, direction, arena, initial_MHKV, self.g_H)
        self.kernel, self.dfinal = kernel, dfinal_MHKV
        tensors = tuple(x.by_token().values())
        self.buffers.bind_own({Payload.Q: tensors[:2], Payload.KV: tensors[2:]})
        self.begun: list[Tensor] = []

    def forward(
        self, launch: KernelLaunch, operands: dict[Payload, Fields], targets: dict[Payload, Target]
    ) -> dict[Payload, Fields]:
        """Run one launch of the forward pass."""
        x, tasks = self._tokens(launch, operands), self.tasks(launch)
        if launch.schedule.kind is SegmentKind.STATE:
            self._leave_states(launch, x, tasks)
            return {}
        entering = self.side_by_side(launch, [self.entering(launch, task) for task in tasks])
        o_THV, leaving = self.kernel.forward(x, launch.schedule.segments, entering)
        for task, begins in zip(tasks, entering, strict=True):
            if task.begun >= 0:
                self.begun[task.begun].copy_(begins)
        self.leave_final(launch, tasks, leaving)
        return {Payload.O: (o_THV,)}

    def backward(
        self, launch: KernelLaunch, operands: dict[Payload, Fields], targets: dict[Payload, Target]
    ) -> dict[Payload, Fields]:
        """Run one launch of the backward pass."""
        x, tasks = self._tokens(launch, operands), self.tasks(launch)
        if launch.schedule.kind is SegmentKind.STATE:
            self._leave_states(launch, x, tasks)
            return {}
        (do_THV,) = operands[Payload.dO]
        if launch.schedule.kind is SegmentKind.GRADIENT_STATE:
            self._leave_gradient_states(launch, x, do_THV, tasks)
            return {}
        entering = self.side_by_side(launch, [self.entering(launch, task) for task in tasks])
        dleaving = self.side_by_side(launch, [self._following(launch, task) for task in tasks])
        dx, dentering = self.kernel.backward(x, launch.schedule.segments, entering, do_THV, dleaving)
        for task, begins in zip(tasks, dentering, strict=True):
            if task.initial >= 0 and self.edge_states is not None:
                self.edge_states[task.initial, launch.heads] = begins
            self.leave(launch, task, State(None, begins))
        dq, dk, *rest = dx.by_token().values()
        shared = tuple(self._folded(launch, dy) for dy in (dq, dk))
        return {Payload.dQ: shared, Payload.dKV: tuple(rest)}

    def _leave_states(self, launch: KernelLaunch, x: RecurrenceTokens, tasks: Sequence[SegmentStates]) -> None:
        """Store the states (A, B) that segments leave behind, combined with the states before them."""
        before = [self.entering(launch, task) for task in tasks]
        entering, with_transitions = self.side_by_side(launch, before), _need_transitions(tasks)
        leaving, transitions = self.kernel.states(x, launch.schedule.segments, entering, with_transitions)
        for i, (task, state) in enumerate(zip(tasks, before, strict=True)):
            a = None
            if not task.is_prefix and transitions is not None:
                a = transitions[i] if state is None or state.a is None else compose_transitions(state.a, transitions[i])
            self.leave(launch, task, State(a, leaving[i]))

    def _leave_gradient_states(
        self, launch: KernelLaunch, x: RecurrenceTokens, do_THV: Tensor, tasks: Sequence[SegmentStates]
    ) -> None:
        """Store the gradient states that segments leave behind, combined with the gradient states after them."""
        after = [self._following(launch, task) for task in tasks]
        dleaving, with_transitions = self.side_by_side(launch, after), _need_transitions(tasks)
        dentering, transitions = self.kernel.gradient_states(
            x, launch.schedule.segments, do_THV, dleaving, with_transitions
        )
        for i, (task, state) in enumerate(zip(tasks, after, strict=True)):
            a = None
            if not task.is_prefix and transitions is not None:
                a = transitions[i] if state is None or state.a is None else compose_transitions(transitions[i], state.a)
            self.leave(launch, task, State(a, dentering[i]))

    def _following(self, launch: KernelLaunch, task: SegmentStates) -> State | None:
        """Return the gradient of the state that leaves a segment: from later segments, else of its document's final state."""
        if task.after:
            return self.states.put_together(task.after)
        return self.edge(launch, self.dfinal, task.final)

    def _tokens(self, launch: KernelLaunch, operands: dict[Payload, Fields]) -> RecurrenceTokens:
        (q, k), (v, *gates) = operands[Payload.Q], operands[Payload.KV]
        op: Op = self.call.op
        g = None if self.g_H is None else self.g_H[launch.heads]
        if op.decay in ("token", "channel"):
            g, *gates = gates
        if not self._is_even(launch):
            index = self._group_index(launch, q.device)
            q, k = q[:, index], k[:, index]
        return RecurrenceTokens(q, k, v, g, gates[0] if op.delta else None)

    def _is_even(self, launch: KernelLaunch) -> bool:
        """Return whether a launch covers all value heads of each of its query and key heads."""
        group = self.call.gqa_group_size
        return launch.heads.start % group == 0 and launch.heads.stop % group == 0

    def _group_index(self, launch: KernelLaunch, device: torch.device) -> Tensor:
        """Map each value head of a launch to the index of its query and key head within the launch."""
        group, heads = self.call.gqa_group_size, launch.heads
        return torch.arange(heads.start, heads.stop, device=device) // group - heads.start // group

    def _folded(self, launch: KernelLaunch, dy_THK: Tensor) -> Tensor:
        """Sum gradients of queries or keys over the heads that share them, if `_tokens` repeated the queries and keys."""
        if self._is_even(launch):
            return dy_THK
        index = self._group_index(launch, dy_THK.device)
        group = self.call.gqa_group_size
        shared = (launch.heads.stop - 1) // group - launch.heads.start // group + 1
        out = dy_THK.new_zeros((len(dy_THK), shared, dy_THK.shape[2]))
        return out.index_add_(1, index, dy_THK)


def _need_transitions(tasks: Sequence[SegmentStates]) -> bool:
    """Return whether any task must output a transition A."""
    return not all(task.is_prefix for task in tasks)
