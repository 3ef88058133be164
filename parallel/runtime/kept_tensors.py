"""What the forward pass of a recurrence leaves for the backward, in one flat tensor: a checkpoint saves it as one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from distattn.parallel.runtime.memory import PlacedTensor, place_fields
from distattn.parallel.runtime.program import Program
from distattn.parallel.runtime.views import BufferKey


class KeptPlaces(NamedTuple):
    """Where tokens that came from others lie, by buffer of the forward pass, and the states that tasks began with, in order.

    bytes: of the flat tensor that holds all of them.
    """

    tokens: dict[BufferKey, list[PlacedTensor]]
    states: list[PlacedTensor]
    bytes: int

    @staticmethod
    def of(program: Program) -> KeptPlaces:
        """The places of a program's rank."""
        call, offset = program.call, 0
        tokens, states = {}, []
        for key, rows in program.kept.items():
            heads = key.h1 - key.h0
            tokens[key], offset = place_fields(call.payload_fields(key.payload), rows, heads, offset)
        assert program.forward_states is not None, "a program of a recurrence has states"
        for begun in program.forward_states.kept:
            fields = ((call.v_head_dim, call.accumulation_dtype),)
            (place,), offset = place_fields(fields, begun.h1 - begun.h0, call.head_dim, offset)
            states.append(place)
        return KeptPlaces(tokens, states, offset)

    def tokens_in(self, flat: Tensor) -> dict[BufferKey, tuple[Tensor, ...]]:
        """The tensors of the tokens of each buffer."""
        return {key: tuple(_part(flat, place) for place in places) for key, places in self.tokens.items()}

    def states_in(self, flat: Tensor) -> list[Tensor]:
        """The states, (H, K, V) each."""
        return [_part(flat, place) for place in self.states]


def kept_size(program: Program) -> int:
    """Bytes of the flat tensor of a program; 0 where it is not of a recurrence."""
    return KeptPlaces.of(program).bytes if program.forward_states is not None else 0


def _part(flat: Tensor, place: PlacedTensor) -> Tensor:
    return flat.view(place.dtype).as_strided(place.shape, place.strides, place.offset)
