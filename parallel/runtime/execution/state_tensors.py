"""The states that one rank holds during a pass of a recurrence, and how it combines, sends, receives and frees them."""

# N segments, H heads, K key dim, V value dim; a state's A is (H, K), (H, 1) or (H, K, K), B is (H, K, V); maxima have only B

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.ir.plan import Call, Payload
from distattn.kernels.recurrence.transitions import constant_transition
from distattn.parallel.runtime.arenas import ArenaAllocator
from distattn.parallel.runtime.communication.transport import Packet
from distattn.parallel.runtime.lowering.state_program import StateKey, StateMessage, StatePart, StateStep


class State(NamedTuple):
    """The effect of some tokens on an entering state S, which becomes A S + B. For dS, A is transposed.

    a: None if the tokens begin (for dS: end) their document, so that no state enters. For maxima, a is None: S becomes max(S, B).
    """

    a: Tensor | None
    b: Tensor


class HeldStateTensors:
    """The tensors of all states that a rank holds, keyed by state."""

    def __init__(self, call: Call, g_H: Tensor | None, device: torch.device, allocator: ArenaAllocator):
        """Start without states.

        g_H: the logarithm of each head's decay, if all tokens share it. allocator: memory for a step's messages.
        """
        self._allocator = allocator
        # for each tensor received in a step: the tensor to keep, and the tensor in the arena that the message arrives in
        self._arriving: list[tuple[Tensor, Tensor]] = []
        self.call, self._g_H, self._device = call, g_H, device
        self._dtype = getattr(torch, call.accumulation_dtype)
        self._held: dict[StateKey, tuple[int, State]] = {}
        # states kept by the forward pass, whose memory is counted elsewhere
        self._kept: set[StateKey] = set()
        self.bytes = self.peak_bytes = 0

    def put(self, key: StateKey, h0: int, state: State) -> None:
        """Store a state whose first head is h0."""
        self._held[key] = h0, state
        self.bytes += _nbytes(state)
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def put_kept(self, key: StateKey, h0: int, state: State) -> None:
        """Register a state kept by the forward pass."""
        self._held[key] = h0, state
        self._kept.add(key)

    def end_step(self, step: StateStep) -> None:
        """Store the states that have arrived, and free the states not used after this step."""
        for there, tensor in self._arriving:
            there.copy_(tensor)
        self._arriving.clear()
        self._allocator.clear()
        for key in step.release:
            _, state = self._held.pop(key)
            self.bytes -= 0 if key in self._kept else _nbytes(state)

    def put_together(self, parts: tuple[StatePart, ...]) -> State:
        """Combine the states of `parts`, which cover consecutive heads, into one state."""
        states = [self._of(part) for part in parts]
        if len(states) == 1:
            return states[0]
        a = None if states[0].a is None else torch.cat([_present(state.a) for state in states])
        return State(a, torch.cat([state.b for state in states]))

    def packets(self, message: StateMessage) -> list[Packet]:
        """Return the packets of an outgoing state."""
        a, b = self.put_together(message.parts)
        tensors = [b] if message.is_prefix or not self.call.op.transition_travels else [b, _present(a)]
        return [Packet(message.peer, message.key.payload, self._allocator.copy_of(tensor)) for tensor in tensors]

    def receive(self, message: StateMessage) -> list[Packet]:
        """Allocate tensors for an incoming state and return their packets. The state is available from the end of the step on."""
        heads, op = message.h1 - message.h0, self.call.op
        b = self._empty(heads, self.call.head_dim, self.call.v_head_dim)
        if message.is_prefix or op.is_maximum:
            state, tensors = State(None, b), [b]
        elif op.transition_travels:
            a = self._empty(heads, *op.transition_shape(self.call.head_dim))
            state, tensors = State(a, b), [b, a]
        else:
            g = None if self._g_H is None else self._g_H[message.h0 : message.h1]
            # do not use torch.tensor([...]), which would make the host wait for the device
            length = torch.full((1,), message.tokens, device=self._device)
            state, tensors = State(constant_transition(g, heads, length)[0].to(self._dtype), b), [b]
        self.put(message.key, message.h0, state)
        arriving = [(tensor, self._allocator.tensor(tensor.shape, tensor.dtype)) for tensor in tensors]
        self._arriving += arriving
        return [Packet(message.peer, message.key.payload, tensor) for _, tensor in arriving]

    def of_no_tokens(self, segments: int, heads: int) -> Tensor:
        """Return the B of an empty range of tokens for each of N segments, (N, H, K, V): 0, or -inf for maxima."""
        b = self._empty(segments, heads, self.call.head_dim, self.call.v_head_dim)
        return b.fill_(-torch.inf if self.call.op.is_maximum else 0.0)

    def _of(self, part: StatePart) -> State:
        first, *rest = (self._heads(key, part) for key in part.tiles)
        a, b = first
        if self.call.op.is_maximum:
            return State(None, reduce(torch.maximum, (state.b for state in rest), b))
        mirrored = part.tiles[0].payload == Payload.dS
        for state in rest:
            later = _present(state.a)
            b = apply_transition(later, b, mirrored) + state.b
            a = None if a is None else compose_transitions(later, a) if mirrored else compose_transitions(a, later)
        return State(a, b)

    def _heads(self, key: StateKey, part: StatePart) -> State:
        h0, (a, b) = self._held[key]
        heads = slice(part.h0 - h0, part.h1 - h0)
        return State(None if a is None else a[heads], b[heads])

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)


def apply_transition(a: Tensor, b: Tensor, transposed: bool = False) -> Tensor:
    """Compute A B, or A^T B if transposed. b: (..., K, V). a: a matrix if it has as many dims as b, otherwise a diagonal."""
    if a.dim() < b.dim():
        return a[..., None] * b
    return (a.transpose(-1, -2) if transposed else a) @ b


def compose_transitions(a: Tensor, later: Tensor) -> Tensor:
    """Return the transition of two consecutive segments, `a` and then `later`: a diagonal (H, K) or a matrix (H, K, K)."""
    return a * later if a.dim() == 2 else later @ a


def _present(a: Tensor | None) -> Tensor:
    assert a is not None, "a state that begins with its document comes before all others"
    return a


def _nbytes(state: State) -> int:
    return sum(tensor.nbytes for tensor in state if tensor is not None)
