"""A plan lowered for one rank: buffers, messages, kernel launches and index lists, made once and shared by all layers.

Nothing after `lower` reads the plan's tables: a layer runs one loop over steps and messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from distattn.ir.plan import Call, Payload
from distattn.parallel.analysis.verify import Proof
from distattn.parallel.runtime.communication.streams import Handover
from distattn.parallel.runtime.lowering.memory import FlatPlaces, OwnTensors, PlacedTensor, PlaceKey
from distattn.parallel.runtime.lowering.packed_messages import PackedMessages
from distattn.parallel.runtime.lowering.row_bundles import Bundle, RowFormat
from distattn.parallel.runtime.lowering.state_program import StateProgram, StateStep
from distattn.parallel.runtime.lowering.views import OWN, BufferKey, View


class Message(NamedTuple):
    """The rows of one payload and head range that one peer sends or receives: the same, in the same order, at both ends.

    segments: the rows of the view, cut where tokens are not contiguous; each travels separately. If there are too many of them,
    all rows are one segment. bundle: the buffers whose rows travel in one message with this one's, see `row_bundles`; empty if
    each tensor travels separately. row_bytes: the bytes of each payload in such a row; row_format: the row's layout.
    """

    peer: int
    view: View
    segments: tuple[slice, ...]
    bundle: Bundle = ()
    row_bytes: tuple[tuple[Payload, int], ...] = ()
    row_format: RowFormat | None = None


class KernelLaunch(NamedTuple):
    """A kernel launch: its query heads, operands to gather, the kernel's own schedule, and where results are accumulated."""

    heads: slice
    operands: dict[Payload, View]
    schedule: Any
    results: dict[Payload, View]
    # counted over all steps of the pass
    number: int = 0


@dataclass
class ProgramStep:
    """What this rank does in one step of a table."""

    # rows of each new buffer; own rows that are copied into it (see `landing` and `staging`)
    allocate: dict[BufferKey, int] = field(default_factory=dict)
    own_copies: list[tuple[BufferKey, View]] = field(default_factory=list)
    sends: list[tuple[Payload, Message]] = field(default_factory=list)
    receives: list[tuple[Payload, Message]] = field(default_factory=list)
    # indices of the sends, and of the receives, that travel as one message
    joined_sends: list[tuple[int, ...]] = field(default_factory=list)
    joined_receives: list[tuple[int, ...]] = field(default_factory=list)
    # those of them that are packed from, or unpacked to, own tensors together
    packed_sends: tuple[PackedMessages, ...] = ()
    packed_receives: tuple[PackedMessages, ...] = ()
    # one launch, unless head groups need such different tokens that most of a tensor with all of them would be unused
    launches: list[KernelLaunch] = field(default_factory=list)
    # own rows of buffers that the launches have written; they are accumulated from these buffers
    own_results: list[tuple[BufferKey, View]] = field(default_factory=list)
    # whether all ranks exchange the messages of this step in one all-to-all
    collective: bool = False
    release: list[BufferKey] = field(default_factory=list)
    # which states of a recurrence are sent, received and released
    states: StateStep | None = None
    # the arena offsets of the step's tensors (see `memory`)
    places: dict[PlaceKey, list[PlacedTensor]] = field(default_factory=dict)

    @property
    def has_messages(self) -> bool:
        """Return whether this rank sends or receives rows of tokens in the step, so that kernels run while messages travel."""
        return bool(self.sends or self.receives)

    def views(self) -> Iterator[View]:
        """Yield all views of the step."""
        for _, message in (*self.sends, *self.receives):
            yield message.view
        for launch in self.launches:
            yield from (*launch.operands.values(), *launch.results.values())
        yield from (view for _, view in self.own_results)


@dataclass(frozen=True)
class Program:
    """One rank's share of a plan.

    tokens: rows of the rank's own tensors. kept: rows of each buffer that stays from the forward to the backward pass, by its key
    in the forward pass. kept_places: their offsets in one flat tensor. proof: None for a plan that has not been proven. blank:
    buffers of results that first writes do not fill completely, in both passes. unadded: own results to which this rank adds
    nothing, and which need no wider numbers than the inputs. turns: of own results that launches sum up and return in the inputs'
    dtype, for each row the first and the last launch that write it (see `final_rows`). own_tensors: of each payload.
    forward_bytes, backward_bytes: size of each pass's arena (see `memory`). uploaded: the index lists, if they are on a GPU.
    forward_states, backward_states: of a recurrence, the states with which each task begins and ends.
    """

    # not the plan itself: programs are cached for as long as their plan exists
    call: Call
    proof: Proof | None
    rank: int
    tokens: int
    forward: list[ProgramStep]
    backward: list[ProgramStep]
    kept: dict[BufferKey, int]
    kept_places: FlatPlaces
    blank: frozenset[BufferKey]
    unadded: frozenset[Payload]
    turns: dict[Payload, Tensor]
    own_tensors: dict[Payload, OwnTensors]
    forward_bytes: int
    backward_bytes: int
    # whether a rank's own dO is only copied to messages and buffers, so that these copies can compute rowsum(dO * O)
    sums_where_copied: bool = False
    uploaded: Handover | None = None
    forward_states: StateProgram | None = None
    backward_states: StateProgram | None = None


def kept_key(key: BufferKey) -> BufferKey:
    """Return the backward pass's key of a kept buffer, or the reverse. No buffer that arrives in that pass has the same key."""
    return key._replace(step=OWN - 1 - key.step)
