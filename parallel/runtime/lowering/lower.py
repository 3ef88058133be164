"""Lowering: translate a plan's tables into one rank's program."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

from distattn.ir.intervals import Ints, lexicographic_argsort, merge_intervals, run_starts, sorted_unique
from distattn.ir.plan import (
    BACKWARD_PAYLOADS,
    FORWARD_PAYLOADS,
    HELD_PAYLOADS,
    REDUCED_PAYLOADS,
    STATE_PAYLOADS,
    Call,
    Columns,
    Payload,
    Plan,
    Table,
    num_rows,
    select_rows,
    task_bands,
)
from distattn.kernels.launch_mask import LaunchMask, WrittenRows
from distattn.parallel.analysis.verify import Proof
from distattn.parallel.runtime.lowering.final_rows import turns_of_rows
from distattn.parallel.runtime.lowering.landing import Landing, land, may_land
from distattn.parallel.runtime.lowering.launches import LaunchTable
from distattn.parallel.runtime.lowering.memory import (
    assign_places,
    describe_own_tensors,
    place_kept,
    rounded_arena_bytes,
)
from distattn.parallel.runtime.lowering.packed_messages import joined_messages, pack, uses_copies_of
from distattn.parallel.runtime.lowering.row_bundles import Bundle, RowFormat, find_bundles, result_parts
from distattn.parallel.runtime.lowering.segment_launches import SegmentLaunches
from distattn.parallel.runtime.lowering.staging import stage
from distattn.parallel.runtime.lowering.state_program import lower_states
from distattn.parallel.runtime.lowering.views import (
    OWN,
    BufferExtent,
    BufferKey,
    BufferSlice,
    View,
    ViewParts,
    resolve_views,
)
from distattn.parallel.runtime.program import KernelLaunch, Message, Program, ProgramStep, kept_key

# a function that derives a kernel's own schedule from a launch's mask or a recurrence's segments
PrepareKernel = Callable[[Any], Any]
# maximum number of segments that a message may be cut into
_MOST_SEGMENTS = 4


def lower(
    plan: Plan,
    rank: int,
    prepare: PrepareKernel,
    proof: Proof | None = None,
    in_larger_job: bool = False,
    finishes: Container[str] = (),
) -> Program:
    """Lower a plan for one rank. `prepare` derives the kernel's own schedule from a launch's mask or a recurrence's segments.

    The proof is stored with the program. Running an unproven plan is at the caller's risk. in_larger_job: True if the job has
    ranks outside the plan, so that messages may be in flight even if the plan has only one rank. The arenas have room for the
    results of kernels that accept `into`. Other kernels allocate their own results, so that room is unused. finishes: the
    directions in which the kernel accepts `final`.
    """
    call = plan.call
    tokens = int(call.layout.shard_sizes()[rank])
    # cache the schedules: most backward launches have the same mask as a forward launch
    prepare = _memoized(prepare, in_larger_job or call.ranks > 1)
    forward = _TableLowering(call, plan.forward, rank, FORWARD_PAYLOADS, prepare)
    kept = {
        key: rows for key, rows in forward.sizes.items() if plan.keeps_inputs and key.payload in (Payload.Q, Payload.KV)
    }
    inherited = [extent._replace(key=kept_key(extent.key)) for extent in forward.buffers if extent.key in kept]
    backward = _TableLowering(call, plan.backward, rank, BACKWARD_PAYLOADS, prepare, inherited)
    ahead = forward.steps(kept)
    landed = {kept_key(key): landing for key, landing in forward.landings.items() if key in kept}
    back = backward.steps(inherited=landed)
    kept = {key: forward.sizes[key] for key in kept}
    kept_places = place_kept(call, kept, forward.bundles)
    blank = frozenset(forward.blank | backward.blank)
    unadded = frozenset(forward.unadded | backward.unadded)
    turns: dict[Payload, Tensor] = {}
    for direction, table, steps, payload in (
        ("forward", plan.forward, ahead, Payload.O),
        ("backward", plan.backward, back, Payload.dQ),
    ):
        if direction in finishes:
            rows = turns_of_rows(call, table, rank, steps, payload, unadded)
            turns |= {} if rows is None else {payload: rows}
    sizes = assign_places(call, ahead, forward.bundles), assign_places(call, back, backward.bundles)
    own_tensors = describe_own_tensors(call, tokens, unadded)
    sums = call.op.kind == "attention" and all(uses_copies_of(Payload.dO, step) for step in back)
    program = Program(
        call, proof, rank, tokens, ahead, back, kept, kept_places, blank, unadded, turns, own_tensors, *sizes, sums
    )
    return _with_states(plan, program) if call.op.is_recurrent else program


def _with_states(plan: Plan, program: Program) -> Program:
    """Add the states to a recurrence's program, with room for their messages at the end of the arenas."""
    states = [lower_states(plan, program.rank, direction) for direction in ("forward", "backward")]
    for state_program, steps in zip(states, (program.forward, program.backward), strict=True):
        for moves, step in zip(state_program.steps, steps, strict=True):
            step.states = moves
    sizes = zip((program.forward_bytes, program.backward_bytes), states, strict=True)
    ahead, back = (rounded_arena_bytes(size + state_program.message_bytes) for size, state_program in sizes)
    changes: dict[str, Any] = dict(forward_states=states[0], backward_states=states[1])
    return replace(program, forward_bytes=ahead, backward_bytes=back, **changes)


class _TableLowering:
    """The lowering of one table for one rank. inherited: buffers kept by an earlier pass."""

    def __init__(
        self,
        call: Call,
        table: Table,
        rank: int,
        payloads: tuple[Payload, ...],
        prepare: PrepareKernel,
        inherited: Iterable[BufferExtent] = (),
    ):
        self.call, self.table, self.rank, self.prepare = call, table, rank, prepare
        self.payloads = payloads
        self.tokens = int(call.layout.shard_sizes()[rank])
        # `row` is the index of a task in the table
        tasks = {**table.tasks, "row": np.arange(num_rows(table.tasks))}
        tasks = select_rows(tasks, tasks["rank"] == rank)
        self.tasks = select_rows(tasks, lexicographic_argsort(*(tasks[name] for name in ("step", "h0", "h1"))))
        # states are lowered separately, since they are not rows of tokens: see `state_program`
        moves = {**table.moves, "part": result_parts(call, table)}
        moves = select_rows(moves, ~np.isin(moves["payload"], STATE_PAYLOADS))
        self.outgoing = select_rows(moves, moves["src"] == rank)
        self.incoming = select_rows(moves, moves["dst"] == rank)
        # incoming buffers hold copies; outgoing buffers hold partial results
        self.buffers = [
            *self._buffers(self.incoming, HELD_PAYLOADS, "src"),
            *self._buffers(self.outgoing, REDUCED_PAYLOADS, "dst"),
        ]
        # filled in by `steps`
        self.blank: set[BufferKey] = set()
        self.unadded: set[Payload] = set()
        self.landings: dict[BufferKey, Landing] = {}
        self.staged: dict[BufferKey, View] = {}
        self.sizes = {extent.key: int((extent.t1 - extent.t0).sum()) for extent in self.buffers}
        self.extents = [*self.buffers, *inherited, *(self._own(payload) for payload in payloads)]
        ends = sorted_unique(np.concatenate([[rank], self.outgoing["dst"], self.incoming["src"]]))
        self.bundles_of_ranks = find_bundles(call, table, ends)
        # for each bundle's payloads and heads: the bytes per payload in a message row, and the row format
        self._formats: dict[tuple[tuple[Payload, int], ...], tuple[tuple[tuple[Payload, int], ...], RowFormat]] = {}
        # bundles of this rank only
        self.bundles = {key: bundle for (end, key), bundle in self.bundles_of_ranks.items() if end == rank}

    def steps(
        self, kept: Container[BufferKey] = (), inherited: Mapping[BufferKey, Landing] = MappingProxyType({})
    ) -> list[ProgramStep]:
        """Return this rank's steps. kept: buffers kept for the backward pass, which are allocated elsewhere. inherited: see
        `land`."""
        steps = [ProgramStep(collective=dense) for dense in _dense_steps(self.call, self.table)]
        outgoing, sends, cut_sends = self._messages(self.outgoing, "dst")
        incoming, receives, cut_receives = self._messages(self.incoming, "src")
        launches: LaunchTable | SegmentLaunches
        if self.call.op.is_recurrent:
            launches = SegmentLaunches.of(self.call, self.tasks)
        else:
            launches = LaunchTable.of(self.tasks, self.call.gqa_group_size, self._query_buffers())
        of_payloads = [launches.parts(payload) for payload in self.payloads]
        # resolve all views of the table in one call
        views = iter(resolve_views(self.extents, ViewParts.joined([sends, receives, *of_payloads])))
        for (peer, key), segments in zip(outgoing, cut_sends, strict=True):
            # copies have the row format of the receiver, partial results that of the sender
            holder = self.rank if key.payload in REDUCED_PAYLOADS else peer
            shared = self._shared_rows(holder, key)
            steps[key.step].sends.append((key.payload, Message(peer, next(views), segments, *shared)))
        for (peer, key), segments in zip(incoming, cut_receives, strict=True):
            holder = peer if key.payload in REDUCED_PAYLOADS else self.rank
            shared = self._shared_rows(holder, key)
            steps[key.step].receives.append((key.payload, Message(peer, next(views), segments, *shared)))
        for step in steps:
            step.joined_sends, step.joined_receives = joined_messages(step.sends), joined_messages(step.receives)
        self._add_launches(steps, launches, views)
        self._land(steps, kept, inherited)
        landings = {key: landing for key, landing in self.landings.items() if len(self.bundles.get(key, (key,))) == 1}
        self.staged = stage(self.call, steps, landings, self.bundles)
        self.sizes |= {key: view.rows for key, view in self.staged.items()}
        self._set_lifetimes(steps, kept)
        self._mark_first_writes(steps)
        for step in steps:
            results = [numbers for numbers in step.joined_receives if step.receives[numbers[0]][0] in REDUCED_PAYLOADS]
            step.packed_sends = pack(self.call, step.sends, step.joined_sends, False)
            step.packed_receives = pack(self.call, step.receives, results, True)
        return steps

    def _shared_rows(
        self, holder: int, key: BufferKey
    ) -> tuple[Bundle, tuple[tuple[Payload, int], ...], RowFormat | None]:
        """Return the bundle of a buffer on rank `holder`, the bytes per payload in a message row, and the row format."""
        bundle = self.bundles_of_ranks.get((holder, key), ())
        if not bundle:
            return bundle, (), None
        heads = tuple((part.payload, part.h1 - part.h0) for part in bundle)
        if heads not in self._formats:
            sent = ((payload, count * self.call.token_head_bytes(payload)) for payload, count in heads)
            parts = [(count, self.call.comm_fields(payload)) for payload, count in heads]
            self._formats[heads] = tuple(sent), RowFormat.of(parts)
        return bundle, *self._formats[heads]

    def _query_buffers(self) -> Ints:
        """Return the index of the buffer that holds each task's query rows for its first head, or -1 if no single buffer
        does."""
        q0, q1, head = (self.tasks[name] for name in ("q0", "q1", "h0"))
        buffers = np.full_like(q0, -1)
        queries = (extent for extent in self.extents if extent.key.payload == Payload.Q)
        for number, extent in enumerate(queries):
            _, begin, end = merge_intervals(np.zeros_like(extent.t0), extent.t0, extent.t1)
            i = np.searchsorted(begin, q0, "right") - 1
            inside = (i >= 0) & (extent.key.h0 <= head) & (head < extent.key.h1)
            inside[inside] = q1[inside] <= end[i[inside]]
            buffers[inside] = number
        return buffers

    def _own(self, payload: Payload) -> BufferExtent:
        """Return the extent of the rank's own tensor of a payload."""
        chunks = select_rows(self.call.layout.chunks, self.call.layout.chunks["rank"] == self.rank)
        key = BufferKey(payload, OWN, 0, self.call.payload_heads(payload))
        return BufferExtent(key, chunks["t0"], chunks["t1"], chunks["row"])

    def _buffers(self, moves: Columns, payloads: tuple[Payload, ...], peer: str) -> list[BufferExtent]:
        """Return a buffer for each payload, step and head range. Its rows are sorted by peer, which makes each message a
        slice."""
        moves = select_rows(moves, np.isin(moves["payload"], payloads))
        moves, first = _grouped(moves, ("payload", "step", "h0", "h1", "part"), (peer, "t0"))
        before = np.append(0, np.cumsum(moves["t1"] - moves["t0"]))
        extents = []
        for a, b in itertools.pairwise(first):
            payload, *rest = (int(moves[name][a]) for name in ("payload", "step", "h0", "h1", "part"))
            key = BufferKey(Payload(payload), *rest)
            extents.append(BufferExtent(key, moves["t0"][a:b], moves["t1"][a:b], before[a:b] - before[a]))
        return extents

    def _messages(
        self, moves: Columns, peer: str
    ) -> tuple[list[tuple[int, BufferKey]], ViewParts, list[tuple[slice, ...]]]:
        """Return (peer, buffer) for all messages in order, their contents as views with one part each, and their segments.

        peer: the column of `moves` that holds the peer's rank, "src" or "dst".
        """
        moves, first = _grouped(moves, ("step", peer, "payload", "h0", "h1"), ("t0",))
        each = select_rows(moves, np.array(first[:-1], np.int64))
        columns = (each[name].tolist() for name in (peer, "payload", "step", "h0", "h1", "part"))
        names = [(rank, BufferKey(Payload(payload), *rest)) for rank, payload, *rest in zip(*columns, strict=True)]
        number = np.arange(num_rows(each))
        length = moves["t1"] - moves["t0"]
        before = np.cumsum(length) - length
        part = np.repeat(number, np.diff(first))
        row = before - before[np.array(first[:-1], np.int64)][part]
        intervals = part, moves["t0"], moves["t1"], row
        views = ViewParts(number, each["payload"], each["h0"], each["h1"], np.zeros_like(number), *intervals)
        # both ends cut a message at the same rows, because the cuts depend only on the table
        is_cut = may_land(self.call, self.table, each)[part[1:]]
        begins = np.ones(len(part), bool)
        begins[1:] = (part[1:] != part[:-1]) | ((moves["t0"][1:] != moves["t1"][:-1]) & is_cut)
        starts = [row[a:b][begins[a:b]].tolist() for a, b in itertools.pairwise(first)]
        sizes = np.bincount(part, length, len(names)).astype(np.int64).tolist()
        segments = [
            tuple(slice(a, b) for a, b in itertools.pairwise([*(some if len(some) <= _MOST_SEGMENTS else [0]), size]))
            for some, size in zip(starts, sizes, strict=True)
        ]
        return names, views, segments

    def _land(
        self, steps: list[ProgramStep], kept: Container[BufferKey], inherited: Mapping[BufferKey, Landing]
    ) -> None:
        """Turn buffers into the working tensors of launches where that saves copies (kept buffers only for attention)."""
        sizes = {key: rows for key, rows in self.sizes.items() if key not in kept or self.call.op.is_softmax}
        self.landings = land(steps, sizes, self.bundles, kept, inherited)
        for key, landing in self.landings.items():
            self.sizes[key] = landing.rows
            if not landing.own_slices or key.payload not in REDUCED_PAYLOADS:
                continue
            for step in steps:
                # launches that only compute states have no results of this payload
                views = [launch.results[key.payload] for launch in step.launches if key.payload in launch.results]
                if any(key == piece.buffer for view in views for piece in view.slices):
                    step.own_results.append((key, landing.own_view))

    def _add_launches(
        self, steps: list[ProgramStep], launches: LaunchTable | SegmentLaunches, views: Iterator[View]
    ) -> None:
        """Add the kernel launches to their steps. `views` yields one view per launch for the first payload, then the next."""
        of_payload = {payload: list(itertools.islice(views, len(launches.steps))) for payload in self.payloads}
        if isinstance(launches, SegmentLaunches):
            schedules: list[Any] = launches.schedules(self.prepare)
        else:
            masks = launches.launch_masks(task_bands(self.call.mask, launches.tasks))
            schedules = [
                self.prepare(mask._replace(overlaps_messages=steps[step].has_messages))
                for mask, step in zip(masks, launches.steps, strict=True)
            ]
        for i, step in enumerate(launches.steps):
            used = [payload for payload in self.payloads if launches.uses(i, payload)]
            operands = {payload: of_payload[payload][i] for payload in used if payload in HELD_PAYLOADS}
            results = {payload: of_payload[payload][i] for payload in used if payload in REDUCED_PAYLOADS}
            steps[step].launches.append(KernelLaunch(slice(*launches.heads[i]), operands, schedules[i], results, i))

    def _set_lifetimes(self, steps: list[ProgramStep], kept: Container[BufferKey]) -> None:
        """Allocate each buffer in the first step that uses it and release it after the last. Skip buffers in `kept`."""
        first: dict[BufferKey, int] = {}
        last: dict[BufferKey, int] = {}
        for index, step in enumerate(steps):
            for key in (piece.buffer for view in step.views() for piece in view.slices):
                for member in self.bundles.get(key, (key,)):
                    first.setdefault(member, index)
                    last[member] = index
        for key, rows in self.sizes.items():
            landing = self.landings.get(key)
            if key not in kept:
                steps[first[key]].allocate[key] = rows
                steps[last[key]].release.append(key)
            if key in self.staged:
                steps[first[key]].own_copies.append((key, self.staged[key]))
            elif landing and landing.own_slices and key.payload in HELD_PAYLOADS:
                steps[first[key]].own_copies.append((key, landing.own_view))

    def _mark_first_writes(self, steps: list[ProgramStep]) -> None:
        """Mark the slices that are the first to write to their rows and heads, in the executor's order of accumulation.

        Buffers that first writes do not fill completely go to `blank`. The rank's own results that nothing is added to go to
        `unadded`.
        """
        own_results = {payload for payload in self.payloads if payload in REDUCED_PAYLOADS}
        self.unadded = set(own_results)
        sizes = {key: rows for key, rows in self.sizes.items() if key.payload in REDUCED_PAYLOADS}
        sizes |= {self._own(payload).key: self.tokens for payload in own_results}
        views = [view for step in steps for view in _result_views(step)]
        head_bounds = {key: {0, key.h1 - key.h0} for key in sizes}
        for piece in (piece for view in views for piece in view.slices):
            head_bounds[piece.buffer].update((piece.heads.start, piece.heads.stop))
        written = {key: WrittenRows(sizes[key], bounds) for key, bounds in head_bounds.items()}

        def marked(view: View, cut: bool = True) -> View:
            slices = []
            for piece in (part for whole in view.slices for part in (cut_by_writes(whole) if cut else [whole])):
                rows = piece.rows if isinstance(piece.rows, slice) else piece.rows.numpy()
                slices.append(piece._replace(is_first=written[piece.buffer].mark(piece.heads, rows)))
                if piece.buffer.step == OWN and not slices[-1].is_first:
                    self.unadded.discard(piece.buffer.payload)
            return view._replace(slices=slices)

        def cut_by_writes(piece: BufferSlice) -> list[BufferSlice]:
            if not (isinstance(piece.rows, slice) and isinstance(piece.view_rows, slice)):
                return [piece]
            shift = piece.view_rows.start - piece.rows.start
            parts = written[piece.buffer].segments(piece.heads, piece.rows)
            return [piece._replace(rows=r, view_rows=slice(r.start + shift, r.stop + shift)) for r in parts]

        for step in steps:
            for launch in step.launches:
                # a kernel either writes an entire tensor or adds to all of it
                direct = {
                    payload for payload, view in launch.results.items() if view.is_complete and len(view.slices) == 1
                }
                launch.results.update(
                    {payload: marked(view, payload not in direct) for payload, view in launch.results.items()}
                )
            step.own_results = [(key, marked(view)) for key, view in step.own_results]
            step.receives = [
                (payload, message._replace(view=marked(message.view)) if payload in REDUCED_PAYLOADS else message)
                for payload, message in step.receives
            ]
        self.blank = {key for key, rows in written.items() if rows.unwritten}


def _result_views(step: ProgramStep) -> Iterator[View]:
    """Yield the views that a step accumulates results into: those of launches, own results and incoming messages, in this
    order."""
    for launch in step.launches:
        yield from launch.results.values()
    yield from (view for _, view in step.own_results)
    for payload, message in step.receives:
        if payload in REDUCED_PAYLOADS:
            yield message.view


def _memoized(prepare: PrepareKernel, in_larger_job: bool) -> PrepareKernel:
    """Return `prepare` with a cache for equal masks or segments. It sets `in_larger_job` in the masks that it passes on."""
    prepared: dict[tuple[Any, ...], Any] = {}

    def once(cells: Any) -> Any:
        key = cells.cache_key() if isinstance(cells, LaunchMask) else cells
        if key not in prepared:
            is_mask = isinstance(cells, LaunchMask)
            prepared[key] = prepare(cells._replace(in_larger_job=in_larger_job) if is_mask else cells)
        return prepared[key]

    return once


def _dense_steps(call: Call, table: Table) -> np.ndarray:
    """Return which steps use one all-to-all: those in which at least half of all rank pairs communicate. All ranks get the
    same result."""
    moves, ranks = table.moves, call.ranks
    pairs = sorted_unique((moves["step"] * ranks + moves["src"]) * ranks + moves["dst"])
    talking = np.bincount(pairs // ranks**2, minlength=table.steps)
    return (ranks > 2) & (2 * talking >= ranks * (ranks - 1))


def _grouped(rows: Columns, by: tuple[str, ...], then: tuple[str, ...]) -> tuple[Columns, list[int]]:
    """Return rows sorted by columns `by` and `then`, and the bounds of all runs of equal `by`, from 0 to the number of rows."""
    rows = select_rows(rows, lexicographic_argsort(*(rows[name] for name in by + then)))
    return rows, [*run_starts(*(rows[name] for name in by)).tolist(), num_rows(rows)]
