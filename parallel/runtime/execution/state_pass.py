"""The part of a pass that all recurrent ops share: states that enter and leave segments, and states at document edges."""

# T tokens on this rank, H heads, K key dim, V value dim, M documents

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distattn.parallel.runtime.arenas import ArenaAllocator
from distattn.parallel.runtime.execution.buffers import Buffers
from distattn.parallel.runtime.execution.state_tensors import HeldStateTensors, State
from distattn.parallel.runtime.lowering.state_program import SegmentStates, StateProgram
from distattn.parallel.runtime.program import KernelLaunch, Program


class StatePass:
    """One pass on one rank.

    initial: the states that documents start from, (M, H, K, V), or None. edge_states: the final states of documents in a
    forward pass, or the gradients of initial states in a backward pass, if requested.
    """

    def __init__(
        self,
        program: Program,
        direction: str,
        arena: Tensor,
        initial_MHKV: Tensor | None,
        g_H: Tensor | None = None,
    ):
        """Prepare a pass. arena: see `arenas`. g_H: the logarithm of each head's decay, if it is the same for all tokens."""
        is_forward = direction == "forward"
        states = program.forward_states if is_forward else program.backward_states
        assert states is not None, "a program of a recurrence has states"
        self.call, self.initial = program.call, initial_MHKV
        self.program_states: StateProgram = states
        nbytes = program.forward_bytes if is_forward else program.backward_bytes
        self.buffers = Buffers(program, arena)
        self.dtype, self._device = getattr(torch, self.call.accumulation_dtype), arena.device
        allocator = ArenaAllocator(arena[nbytes - states.message_bytes : nbytes])
        self.states = HeldStateTensors(self.call, g_H, arena.device, allocator)
        # one state per document, allocated on request
        self.edge_states: Tensor | None = None

    def make_edge_states(self) -> None:
        """Allocate a state for every document. States that this rank does not compute stay 0."""
        shape = (len(self.call.documents), self.call.heads, self.call.head_dim, self.call.v_head_dim)
        self.edge_states = torch.zeros(shape, dtype=self.dtype, device=self._device)

    def tasks(self, launch: KernelLaunch) -> list[SegmentStates]:
        """Return the `SegmentStates` of a launch's tasks, in order."""
        return [self.program_states.tasks[number] for number in launch.schedule.tasks]

    def entering(self, launch: KernelLaunch, task: SegmentStates) -> State | None:
        """Return the state that enters a segment: from earlier segments, else its document's initial state, else None."""
        if task.before:
            return self.states.put_together(task.before)
        return self.edge(launch, self.initial, task.initial)

    def edge(self, launch: KernelLaunch, states_MHKV: Tensor | None, document: int) -> State | None:
        """Return a document's state from `states_MHKV`, or None (the state of no tokens) if that state does not exist."""
        if states_MHKV is None or document < 0:
            return None
        return State(None, states_MHKV[document, launch.heads].to(self.dtype))

    def side_by_side(self, launch: KernelLaunch, states: Sequence[State | None]) -> Tensor:
        """Copy the states B of a launch's segments into one tensor (N, H, K, V). None stands for the state of no tokens."""
        present = [(number, state.b) for number, state in enumerate(states) if state is not None]
        if len(present) == len(states):
            return torch.stack([b for _, b in present])
        # fill all segments without a state in one operation: packs of short documents have many of them
        out = self.states.of_no_tokens(len(states), launch.heads.stop - launch.heads.start)
        for number, b in present:
            out[number].copy_(b)
        return out

    def leave(self, launch: KernelLaunch, task: SegmentStates, state: State) -> None:
        """Store the state that a segment leaves behind, if it is needed."""
        if task.leaves is not None:
            # copy it, so that the launch's stacked results can be freed
            a = None if state.a is None else state.a.clone()
            self.states.put(task.leaves, launch.heads.start, State(a, state.b.clone()))

    def leave_final(self, launch: KernelLaunch, tasks: Sequence[SegmentStates], leaving_NHKV: Tensor) -> None:
        """Store the states that segments leave behind in the forward pass, and the final states of documents that end with
        these segments."""
        for task, ends in zip(tasks, leaving_NHKV, strict=True):
            if task.final >= 0 and self.edge_states is not None:
                self.edge_states[task.final, launch.heads] = ends
            self.leave(launch, task, State(None, ends))
