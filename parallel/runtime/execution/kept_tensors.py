"""Tensors that a recurrence keeps from the forward to the backward pass, in one flat tensor that a checkpoint can save."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from distattn.parallel.runtime.lowering.memory import PlacedTensor, place_fields
from distattn.parallel.runtime.lowering.views import BufferKey
from distattn.parallel.runtime.program import Program


class KeptPlaces(NamedTuple):
    """Places in a flat tensor: those of received tokens, keyed by forward buffer, and those of the states that tasks started
    from.

    bytes: the size of the flat tensor.
    """

    tokens: dict[BufferKey, list[PlacedTensor]]
    states: list[PlacedTensor]
    bytes: int

    @staticmethod
    def of(program: Program) -> KeptPlaces:
        """Compute the places for a program."""
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
        """Return the tensors of received tokens, keyed by buffer, as views of `flat`."""
        return {key: tuple(_part(flat, place) for place in places) for key, places in self.tokens.items()}

    def states_in(self, flat: Tensor) -> list[Tensor]:
        """Return the states as views of `flat`, each (H, K, V)."""
        return [_part(flat, place) for place in self.states]


def kept_size(program: Program) -> int:
    """Return the size in bytes of a program's flat tensor, or 0 if the program is not a recurrence."""
    return KeptPlaces.of(program).bytes if program.forward_states is not None else 0


def _part(flat: Tensor, place: PlacedTensor) -> Tensor:
    # saved-tensor hooks may return the flat tensor as part of another tensor
    numbers = flat.view(place.dtype)
    return numbers.as_strided(place.shape, place.strides, numbers.storage_offset() + place.offset)
