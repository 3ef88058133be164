"""Programs: a plan lowered for one rank to buffers, messages, kernel launches and index lists, created once for all
layers.

Only `lower` reads the plan's tables. After that, a layer runs one loop over steps and messages.
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
    """The rows of one payload and head range sent to or received from one peer. Both ends have the same rows in the same
    order.

    segments: the rows of the view, cut where tokens are not contiguous. Each segment travels separately. If there would be too
    many segments, all rows form a single segment. bundle: the buffers whose rows travel in one message with this buffer's (see
    `row_bundles`), empty if each tensor travels separately. row_bytes: the bytes per payload in a bundle's row. row_format: the
    layout of that row.
    """

    peer: int
    view: View
    segments: tuple[slice, ...]
    bundle: Bundle = ()
    row_bytes: tuple[tuple[Payload, int], ...] = ()
    row_format: RowFormat | None = None


class KernelLaunch(NamedTuple):
    """A kernel launch: its query heads, the operands to gather, the kernel's own schedule, and the views that receive its
    results."""

    heads: slice
    operands: dict[Payload, View]
    schedule: Any
    results: dict[Payload, View]
    # the launch's number, counted over all steps of the pass
    number: int = 0


@dataclass
class ProgramStep:
    """One rank's work in one step of a table."""

    # for each new buffer: its number of rows, and this rank's own rows copied into it (see `landing` and `staging`)
    allocate: dict[BufferKey, int] = field(default_factory=dict)
    own_copies: list[tuple[BufferKey, View]] = field(default_factory=list)
    sends: list[tuple[Payload, Message]] = field(default_factory=list)
    receives: list[tuple[Payload, Message]] = field(default_factory=list)
    # groups of sends, and of receives, by index: each group travels as one message
    joined_sends: list[tuple[int, ...]] = field(default_factory=list)
    joined_receives: list[tuple[int, ...]] = field(default_factory=list)
    # the joined messages that are packed from, or unpacked into, this rank's own tensors in one copy
    packed_sends: tuple[PackedMessages, ...] = ()
    packed_receives: tuple[PackedMessages, ...] = ()
    # usually one launch; several if a single tensor with the tokens of all head groups would be mostly padding
    launches: list[KernelLaunch] = field(default_factory=list)
    # this rank's own result rows that launches write to buffers, later accumulated into its tensors
    own_results: list[tuple[BufferKey, View]] = field(default_factory=list)
    # True if all ranks exchange the messages of this step in one all-to-all
    collective: bool = False
    release: list[BufferKey] = field(default_factory=list)
    # the states of a recurrence to send, receive and release
    states: StateStep | None = None
    # places of the step's tensors in the arena (see `memory`)
    places: dict[PlaceKey, list[PlacedTensor]] = field(default_factory=dict)

    @property
    def has_messages(self) -> bool:
        """True if this rank sends or receives rows of tokens in the step, so that kernels overlap with messages."""
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

    tokens: the number of rows of the rank's own tensors. kept: the number of rows of each buffer kept for the backward pass,
    keyed by its forward key. kept_places: the places of these buffers in one flat tensor. proof: None for an unproven plan.
    blank: result buffers of both passes that first writes do not fill completely. unadded: the rank's own results that nothing
    is added to, so that they need no wider dtype than the inputs. turns: for each row of a result that launches finish, the
    first and the last launch that write it (see `final_rows`). own_tensors: dtypes and shapes of the rank's own tensors.
    forward_bytes, backward_bytes: the size of each pass's arena (see `memory`). uploaded: the index lists, if they are on a
    GPU. forward_states, backward_states: the states that each task of a recurrence starts from and ends with.
    """

    # the call, not the plan: programs are cached for as long as their plan exists, so they must not keep it alive
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
    # True if the rank's own dO is only copied to messages and buffers, so that these copies can compute rowsum(dO * O)
    sums_where_copied: bool = False
    uploaded: Handover | None = None
    forward_states: StateProgram | None = None
    backward_states: StateProgram | None = None


def kept_key(key: BufferKey) -> BufferKey:
    """Translate a kept buffer's key from the forward to the backward pass, or back. No other buffer of that pass has the
    resulting key."""
    return key._replace(step=OWN - 1 - key.step)
