"""The executor of prefix maxima. It resembles that of recurrences, but has only values and only a forward pass."""

# T tokens on this rank, H heads, V value dim, N segments in a launch, M documents

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from distattn.ir.plan import Payload
from distattn.kernels.recurrence.tokens import Segments
from distattn.kernels.spec import KernelRequirements
from distattn.parallel.runtime.arenas import ARENAS
from distattn.parallel.runtime.communication.transport import Transport
from distattn.parallel.runtime.execution.buffers import Fields
from distattn.parallel.runtime.execution.execute import PausableRun, Target, run_steps
from distattn.parallel.runtime.execution.state_pass import StatePass
from distattn.parallel.runtime.execution.state_tensors import State
from distattn.parallel.runtime.lowering.segment_launches import SegmentKind
from distattn.parallel.runtime.program import KernelLaunch, Program


class PrefixMaxKernel(Protocol):
    """The functions of a kernel module for prefix maxima. See `distattn.kernels.recurrence.cummax`."""

    def prepare(self, segments: Segments, requirements: KernelRequirements) -> Any: ...

    def forward(self, x_THV: Tensor, segments: Any, state_NHV: Tensor) -> tuple[Tensor, Tensor]: ...

    def states(self, x_THV: Tensor, segments: Any, state_NHV: Tensor) -> Tensor: ...


class PrefixMaxResult(NamedTuple):
    """The maximum before each token, in x's dtype, and, if requested, the final maximum of each document that ends on this
    rank (0 for others)."""

    before_THV: Tensor
    final_MHV: Tensor | None


def forward(
    program: Program,
    transport: Transport,
    kernel: PrefixMaxKernel,
    x_THV: Tensor,
    initial_MHV: Tensor | None,
    final_states: bool = True,
) -> PausableRun[PrefixMaxResult]:
    """Compute the maximum over the tokens before each of this rank's tokens. The first token of a document gets the document's
    initial state, or -inf if there are no initial states."""
    # states of a maximum have one row
    initial = None if initial_MHV is None else initial_MHV[:, :, None]

    def compute(
        launch: KernelLaunch, operands: dict[Payload, Fields], targets: dict[Payload, Target]
    ) -> dict[Payload, Fields]:
        (x,), tasks, segments = operands[Payload.KV], run.tasks(launch), launch.schedule.segments
        entering = run.side_by_side(launch, [run.entering(launch, task) for task in tasks])[:, :, 0]
        if launch.schedule.kind is SegmentKind.STATE:
            for task, leaving in zip(tasks, kernel.states(x, segments, entering), strict=True):
                run.leave(launch, task, State(None, leaving[:, None]))
            return {}
        before, leaving_NHV = kernel.forward(x, segments, entering)
        run.leave_final(launch, tasks, leaving_NHV[:, :, None])
        return {Payload.O: (before,)}

    with ARENAS.borrowed(program.forward_bytes, x_THV.device) as arena:
        run = StatePass(program, "forward", arena, initial)
        if final_states:
            run.make_edge_states()
        run.buffers.bind_own({Payload.Q: (), Payload.KV: (x_THV,)})
        (before_THV,) = run.buffers.new_own(Payload.O)
        yield from run_steps("forward", program.forward, transport, run.buffers, compute, False, run.states)
        run.buffers.close()
    final = None if run.edge_states is None else run.edge_states[:, :, 0]
    return PrefixMaxResult(before_THV.to(x_THV.dtype), final)
