"""A plan lowered for one rank: buffers, transfers, kernel calls and index lists, made once and shared by all layers.

Here the table's rows end: what is left to the layer is one loop over steps and messages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.ir.bands import K0, K1, OK, OQ, Q0, Q1
from distattn.ir.intervals import Ints, expand_ranges, lexicographic_argsort, merge_intervals, run_starts, sorted_unique
from distattn.ir.plan import (
    BACKWARD_PAYLOADS,
    FORWARD_PAYLOADS,
    HELD_PAYLOADS,
    KEY_PAYLOADS,
    REDUCED_PAYLOADS,
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
from distattn.parallel.runtime.views import OWN, BufferExtent, BufferKey, View, ViewParts, resolve_views

PrepareKernel = Callable[[LaunchMask], Any]
# bytes that lists on the device are aligned to
_ALIGNED = 16
# one call per step takes working tensors at most this many times as large as what its tasks need
_MAX_PADDING = 2


class Message(NamedTuple):
    """What one peer sends or receives of one payload and head range: the same rows, in the same order, at both ends."""

    peer: int
    view: View


class KernelLaunch(NamedTuple):
    """A kernel call: query heads, operands to gather, prepared work, and where results are deposited."""

    heads: slice
    operands: dict[Payload, View]
    work: Any
    results: dict[Payload, View]


@dataclass
class ProgramStep:
    """What this rank does in one step of a table."""

    # rows of each new buffer
    allocate: dict[BufferKey, int] = field(default_factory=dict)
    sends: list[tuple[Payload, Message]] = field(default_factory=list)
    receives: list[tuple[Payload, Message]] = field(default_factory=list)
    # one, but where head groups need so different tokens that a tensor of all of them would be mostly unused
    launches: list[KernelLaunch] = field(default_factory=list)
    # whether all ranks exchange this step's messages in one all-to-all
    collective: bool = False
    release: list[BufferKey] = field(default_factory=list)


@dataclass(frozen=True)
class Program:
    """One rank's share of a plan. `kept`: rows of each forward batch that stays for the backward, by its forward name."""

    # not the plan itself: programs are cached for as long as their plan lives
    call: Call
    # None: nobody has proven this plan
    proof: Proof | None
    rank: int
    tokens: int
    forward: list[ProgramStep]
    backward: list[ProgramStep]
    kept: dict[BufferKey, int]


def lower(plan: Plan, rank: int, prepare: PrepareKernel, proof: Proof | None = None) -> Program:
    """Lower a plan for one rank; `prepare` is the kernel's. `proof` travels with it: to run without one is the caller's risk."""
    call = plan.call
    tokens = int(call.layout.shard_sizes()[rank])
    keep = plan.policy == "keep"
    # the backward's launches are mostly the forward's
    prepare = _memoized(prepare)
    forward = _TableLowering(call, plan.forward, rank, FORWARD_PAYLOADS, prepare)
    kept = {key: rows for key, rows in forward.sizes.items() if keep and key.payload in (Payload.Q, Payload.KV)}
    there = [place._replace(key=kept_key(place.key)) for place in forward.batches if place.key in kept]
    backward = _TableLowering(call, plan.backward, rank, BACKWARD_PAYLOADS, prepare, there)
    return Program(call, proof, rank, tokens, forward.steps(kept), backward.steps(), kept)


def _memoized(prepare: PrepareKernel) -> PrepareKernel:
    made: dict[tuple[Any, ...], Any] = {}

    def once(mask: LaunchMask) -> Any:
        key = mask.cache_key()
        if key not in made:
            made[key] = prepare(mask)
        return made[key]

    return once


def kept_key(key: BufferKey) -> BufferKey:
    """The name a forward batch has in the backward table, and back again; no batch that arrives there has it."""
    return key._replace(step=OWN - 1 - key.step)


class _TableLowering:
    """Lowers one table for one rank. `there`: batches that an earlier pass left behind."""

    def __init__(
        self,
        call: Call,
        table: Table,
        rank: int,
        payloads: tuple[Payload, ...],
        prepare: PrepareKernel,
        there: Iterable[BufferExtent] = (),
    ):
        self.call, self.table, self.rank, self.prepare = call, table, rank, prepare
        self.payloads = payloads
        self.tokens = int(call.layout.shard_sizes()[rank])
        self.tasks = select_rows(table.tasks, table.tasks["rank"] == rank)
        self.tasks = select_rows(
            self.tasks, lexicographic_argsort(*(self.tasks[name] for name in ("step", "h0", "h1")))
        )
        self.outgoing = select_rows(table.moves, table.moves["src"] == rank)
        self.incoming = select_rows(table.moves, table.moves["dst"] == rank)
        # batches that arrive hold copies; batches that leave hold partial results
        self.batches = [
            *self._batches(self.incoming, HELD_PAYLOADS, "src"),
            *self._batches(self.outgoing, REDUCED_PAYLOADS, "dst"),
        ]
        self.sizes = {place.key: int((place.t1 - place.t0).sum()) for place in self.batches}
        self.places = [*self.batches, *there, *(self._own(payload) for payload in payloads)]

    def steps(self, stays: Container[BufferKey] = ()) -> list[ProgramStep]:
        """The steps of this rank; buffers in `stays` are never released."""
        outgoing, sends = self._messages(self.outgoing, "dst")
        incoming, receives = self._messages(self.incoming, "src")
        launched = _LaunchTable.of(self.tasks, self.call.gqa_group_size)
        working = [launched.keys if payload in KEY_PAYLOADS else launched.rows for payload in self.payloads]
        parts = [tokens.parts(payload) for tokens, payload in zip(working, self.payloads, strict=True)]
        views = iter(resolve_views(self.places, ViewParts.joined([sends, receives, *parts])))
        steps = [ProgramStep(collective=dense) for dense in _dense_steps(self.call, self.table)]
        for step, peer, payload in outgoing:
            steps[step].sends.append((Payload(payload), Message(peer, next(views))))
        for step, peer, payload in incoming:
            steps[step].receives.append((Payload(payload), Message(peer, next(views))))
        by_payload = {payload: list(itertools.islice(views, len(launched.steps))) for payload in self.payloads}
        cells = launched.cells(task_bands(self.call.mask, self.tasks))
        for i, step in enumerate(launched.steps):
            operands = {payload: by_payload[payload][i] for payload in self.payloads if payload in HELD_PAYLOADS}
            results = {payload: by_payload[payload][i] for payload in self.payloads if payload in REDUCED_PAYLOADS}
            steps[step].launches.append(
                KernelLaunch(slice(*launched.heads[i]), operands, self.prepare(cells[i]), results)
            )
        self._set_lifetimes(steps, stays)
        self._mark_first_deposits(steps)
        return steps

    def _own(self, payload: Payload) -> BufferExtent:
        mine = select_rows(self.call.layout.chunks, self.call.layout.chunks["rank"] == self.rank)
        key = BufferKey(payload, OWN, 0, self.call.payload_heads(payload))
        return BufferExtent(key, mine["t0"], mine["t1"], mine["row"])

    def _batches(self, moves: Columns, payloads: tuple[Payload, ...], peer: str) -> list[BufferExtent]:
        """What moves of one payload in one step and head range, grouped by peer, so that messages are slices."""
        moves = select_rows(moves, np.isin(moves["payload"], payloads))
        moves, first = _grouped(moves, ("payload", "step", "h0", "h1"), (peer, "t0"))
        before = np.append(0, np.cumsum(moves["t1"] - moves["t0"]))
        places = []
        for a, b in itertools.pairwise(first):
            payload, *key = (int(moves[name][a]) for name in ("payload", "step", "h0", "h1"))
            places.append(
                BufferExtent(
                    BufferKey(Payload(payload), *key), moves["t0"][a:b], moves["t1"][a:b], before[a:b] - before[a]
                )
            )
        return places

    def _messages(self, moves: Columns, peer: str) -> tuple[list[tuple[int, int, int]], ViewParts]:
        """(step, peer, payload) of every message, in order, and what each carries: a view with one part."""
        moves, first = _grouped(moves, ("step", peer, "payload", "h0", "h1"), ("t0",))
        each = select_rows(moves, np.array(first[:-1], np.int64))
        names = list(zip(*(each[name].tolist() for name in ("step", peer, "payload")), strict=True))
        number = np.arange(num_rows(each))
        length = moves["t1"] - moves["t0"]
        before = np.cumsum(length) - length
        part = np.repeat(number, np.diff(first))
        at = before - before[np.array(first[:-1], np.int64)][part]
        rows = part, moves["t0"], moves["t1"], at
        return names, ViewParts(number, each["payload"], each["h0"], each["h1"], np.zeros_like(number), *rows)

    def _set_lifetimes(self, steps: list[ProgramStep], stays: Container[BufferKey]) -> None:
        first: dict[BufferKey, int] = {}
        last: dict[BufferKey, int] = {}
        for index, step in enumerate(steps):
            views = [message.view for _, message in (*step.sends, *step.receives)]
            for launch in step.launches:
                views += [*launch.operands.values(), *launch.results.values()]
            for key in (buffer_slice.buffer for view in views for buffer_slice in view.slices):
                first.setdefault(key, index)
                last[key] = index
        for key, rows in self.sizes.items():
            steps[first[key]].allocate[key] = rows
            if key not in stays:
                steps[last[key]].release.append(key)

    def _mark_first_deposits(self, steps: list[ProgramStep]) -> None:
        """Which links write outputs where none are yet, in the order in which the executor deposits.

        Gradients are left alone: adding to zeros costs what writing does, merging outputs five times as much.
        """
        sizes = {**self.sizes, self._own(Payload.O).key: self.tokens}
        results = [launch.results for step in steps for launch in step.launches]
        views = [views[Payload.O] for views in results if Payload.O in views]
        views += [message.view for step in steps for payload, message in step.receives if payload == Payload.O]
        cuts: dict[BufferKey, set[int]] = {}
        for buffer_slice in (buffer_slice for view in views for buffer_slice in view.slices):
            cuts.setdefault(buffer_slice.buffer, set()).update((buffer_slice.heads.start, buffer_slice.heads.stop))
        written = {key: WrittenRows(sizes[key], heads) for key, heads in cuts.items()}

        def marked(view: View) -> View:
            slices = []
            for buffer_slice in view.slices:
                rows = buffer_slice.rows if isinstance(buffer_slice.rows, slice) else buffer_slice.rows.numpy()
                slices.append(buffer_slice._replace(fresh=written[buffer_slice.buffer].mark(buffer_slice.heads, rows)))
            return view._replace(slices=slices)

        for step in steps:
            for launch in step.launches:
                if Payload.O in launch.results:
                    launch.results[Payload.O] = marked(launch.results[Payload.O])
            step.receives = [
                (payload, message._replace(view=marked(message.view)) if payload == Payload.O else message)
                for payload, message in step.receives
            ]


def _dense_steps(call: Call, table: Table) -> np.ndarray:
    """The steps in which at least half of all pairs of ranks talk: those become one all-to-all. The same on every rank."""
    moves, ranks = table.moves, call.ranks
    pairs = sorted_unique((moves["step"] * ranks + moves["src"]) * ranks + moves["dst"])
    talking = np.bincount(pairs // ranks**2, minlength=table.steps)
    return (ranks > 2) & (2 * talking >= ranks * (ranks - 1))


def on_device(program: Program, device: torch.device) -> Program:
    """The same program with its lists on the device: one copy, from pinned memory where that exists."""
    if device.type == "cpu":
        return program
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        # steps share lists: each is copied once
        found[id(tensor)] = tensor
        return tensor

    _with_tensors(program, note)
    if not found:
        return program
    places = np.cumsum([0, *(-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in found.values())]).tolist()
    packed = torch.empty(places[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for tensor, at in zip(found.values(), places, strict=False):
        packed[at : at + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
    copied = packed.to(device, non_blocking=True)
    there = {
        name: copied[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for (name, tensor), at in zip(found.items(), places, strict=False)
    }
    return _with_tensors(program, lambda tensor: there[id(tensor)])


def _with_tensors(program: Program, change: Callable[[Tensor], Tensor]) -> Program:
    """The program with every tensor in its views and kernel work replaced."""

    def view(old: View) -> View:
        slices = [
            buffer_slice._replace(rows=changed(buffer_slice.rows), view_rows=changed(buffer_slice.view_rows))
            for buffer_slice in old.slices
        ]
        return old._replace(slices=slices)

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        # named tuples of kernels, within each other
        return type(value)(*map(changed, value)) if hasattr(value, "_fields") else value

    def messages(old: list[tuple[Payload, Message]]) -> list[tuple[Payload, Message]]:
        return [(payload, message._replace(view=view(message.view))) for payload, message in old]

    def launch(old: KernelLaunch) -> KernelLaunch:
        views = [{payload: view(part) for payload, part in parts.items()} for parts in (old.operands, old.results)]
        return old._replace(operands=views[0], results=views[1], work=changed(old.work))

    def step(old: ProgramStep) -> ProgramStep:
        launches = [launch(part) for part in old.launches]
        return replace(old, sends=messages(old.sends), receives=messages(old.receives), launches=launches)

    passes = [[step(part) for part in steps] for steps in (program.forward, program.backward)]
    return replace(program, forward=passes[0], backward=passes[1])


class _TokenIntervals(NamedTuple):
    """The tokens that the tasks of each call need, end to end in a working tensor, and which of them in which heads."""

    # intervals, sorted by call and token, with their row in the call's tensor
    call: Ints
    t0: Ints
    t1: Ints
    at: Ints
    # heads [h0, h1) of each call
    h0: Ints
    h1: Ints
    # the same by elementary head range: (call, h0, h1) of each part; then its intervals, and the part of each
    part_call: Ints
    part_h0: Ints
    part_h1: Ints
    part: Ints
    part_t0: Ints
    part_t1: Ints

    @staticmethod
    def of(call: Ints, t0: Ints, t1: Ints, low: Ints, high: Ints) -> _TokenIntervals:
        """Of tasks, sorted by call, that need tokens [t0_i, t1_i) in heads [low_i, high_i)."""
        where, begin, end = merge_intervals(call, t0, t1)
        before = np.cumsum(end - begin) - (end - begin)
        at = before - before[np.searchsorted(where, where)]
        first = np.searchsorted(call, np.arange(int(call.max(initial=-1)) + 1))
        h0, h1 = (f.reduceat(x, first) if len(x) else x for f, x in ((np.minimum, low), (np.maximum, high)))
        limits = sorted_unique(np.concatenate([low, high]))
        row, head = expand_ranges(np.searchsorted(limits, low), np.searchsorted(limits, high))
        key, part_t0, part_t1 = merge_intervals(call[row] * len(limits) + head, t0[row], t1[row])
        named, part = np.unique(key, return_inverse=True)
        part_call, part_head = np.divmod(named, max(len(limits), 1))
        bounds = limits[part_head], limits[part_head + 1]
        return _TokenIntervals(where, begin, end, at, h0, h1, part_call, *bounds, part, part_t0, part_t1)

    def parts(self, payload: Payload) -> ViewParts:
        """As parts of one view per call."""
        call, h0 = self.part_call, self.part_h0
        at = self.part_t0 + self.to_row(call[self.part], self.part_t0)
        named = call, np.full(len(call), int(payload)), h0, self.part_h1, h0 - self.h0[call]
        return ViewParts(*named, self.part, self.part_t0, self.part_t1, at)

    def to_row(self, call: Ints, token: Ints) -> Ints:
        """What to add to a token that some task of the call needs, to get its row."""
        span = int(self.t1.max(initial=0)) + 1
        i = np.searchsorted(self.call * span + self.t0, call * span + token, "right") - 1
        return self.at[i] - self.t0[i]

    def rows(self) -> Ints:
        """Rows of each call's tensor."""
        total = np.zeros(len(self.h0), np.int64)
        np.add.at(total, self.call, self.t1 - self.t0)
        return total

    def waste(self) -> np.ndarray:
        """How many times larger each call's tensor is than what its tasks need of it."""
        needed = np.zeros(len(self.h0), np.int64)
        heads = (self.part_h1 - self.part_h0)[self.part]
        np.add.at(needed, self.part_call[self.part], heads * (self.part_t1 - self.part_t0))
        return self.rows() * (self.h1 - self.h0) / np.maximum(needed, 1)


class _LaunchTable(NamedTuple):
    """All kernel calls of a table, numbered by step: the tasks of one step are one call, or one for each head range."""

    steps: list[int]
    heads: list[tuple[int, int]]
    tasks: Columns
    # the call's number, per task
    number: Ints
    rows: _TokenIntervals
    keys: _TokenIntervals
    group: int

    @staticmethod
    def of(tasks: Columns, group: int) -> _LaunchTable:
        """Of one rank's tasks, sorted by step and head range."""
        head_range = np.unique(np.stack([tasks["h0"], tasks["h1"]], 1), axis=0, return_inverse=True)[1].reshape(-1)
        whole = _LaunchTable._numbered(tasks, group, tasks["step"], tasks["step"])
        wasteful = (whole.rows.waste() > _MAX_PADDING) | (whole.keys.waste() > _MAX_PADDING)
        if not wasteful.any():
            return whole
        apart = np.where(wasteful[whole.number], head_range, 0)
        return _LaunchTable._numbered(tasks, group, tasks["step"] * (len(head_range) + 1) + apart, tasks["step"])

    @staticmethod
    def _numbered(tasks: Columns, group: int, call: Ints, step: Ints) -> _LaunchTable:
        _, first, number = np.unique(call, return_index=True, return_inverse=True)
        low, high = tasks["h0"], tasks["h1"]
        rows = _TokenIntervals.of(number, tasks["q0"], tasks["q1"], low, high)
        keys = _TokenIntervals.of(number, tasks["k0"], tasks["k1"], low // group, -(-high // group))
        heads = list(zip(rows.h0.tolist(), rows.h1.tolist(), strict=True))
        return _LaunchTable(step[first].tolist(), heads, tasks, number, rows, keys, group)

    def cells(self, bands: Ints) -> list[LaunchMask]:
        """Per call; `bands` of the tasks in global coordinates."""
        rows, keys, bands = self.rows, self.keys, bands.copy()
        # global to working coordinates: each task lies inside one interval of the union
        to_row, to_key = rows.to_row(self.number, self.tasks["q0"]), keys.to_row(self.number, self.tasks["k0"])
        bands[:, [Q0, Q1, OQ]] += to_row[:, None]
        bands[:, [K0, K1, OK]] += to_key[:, None]
        heads = np.stack([self.tasks["h0"], self.tasks["h1"]], 1) - rows.h0[self.number][:, None]
        first = np.searchsorted(self.number, np.arange(len(self.steps) + 1)).tolist()
        shift, group = to_row - to_key, self.group
        sizes = rows.rows(), keys.rows(), rows.h1 - rows.h0, keys.h1 - keys.h0
        return [
            LaunchMask(bands[a:b], heads[a:b], shift[a:b], n, s, h, kv, group, h0 % group)
            for (a, b), (n, s, h, kv), (h0, _) in zip(
                itertools.pairwise(first), np.stack(sizes, 1).tolist(), self.heads, strict=True
            )
        ]


def _grouped(rows: Columns, by: tuple[str, ...], then: tuple[str, ...]) -> tuple[Columns, list[int]]:
    """Rows sorted by columns `by` and `then`, and where runs of equal `by` begin (and the end of the last)."""
    rows = select_rows(rows, lexicographic_argsort(*(rows[name] for name in by + then)))
    return rows, [*run_starts(*(rows[name] for name in by)).tolist(), num_rows(rows)]
