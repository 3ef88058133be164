"""A plan lowered for one rank: buffers, transfers, kernel launches and index lists, made once and shared by all layers.

Here the table's rows end: what is left to the layer is one loop over steps, messages and launches. Rows of a buffer are
tokens; *links* say which rows and heads of a buffer are which rows and heads of a contiguous working tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.bands import K0, K1, OK, OQ, Q0, Q1
from distattn.intervals import Ints, crossing, union
from distattn.kernels.cells import Cells
from distattn.parallel.verify import Proof, verify
from distattn.plan import (
    ACCUMULATING,
    BACKWARD,
    FORWARD,
    HOLDING,
    ON_KEYS,
    Call,
    Columns,
    Payload,
    Plan,
    Table,
    count,
    take,
    task_bands,
)

Rows = slice | Tensor
Prepare = Callable[[Cells], Any]


class BufferKey(NamedTuple):
    """The rank's own tensor of a payload (step OWN), or a batch that arrives or leaves at `step` with heads [h0, h1)."""

    payload: Payload
    step: int
    h0: int
    h1: int


OWN = -1


class Link(NamedTuple):
    """Rows and heads of a buffer that are these rows and heads of a working tensor."""

    buffer: BufferKey
    rows: Rows
    heads: slice
    at_rows: Rows
    at_heads: slice
    # nothing has been deposited there before: write instead of adding
    fresh: bool = False


class View(NamedTuple):
    """A working tensor of `rows` tokens and `heads` heads, spread over buffers."""

    rows: int
    heads: int
    links: list[Link]
    # the links reach every cell; where head groups need different tokens they do not
    whole: bool = True


class Message(NamedTuple):
    """What one peer sends or receives of one payload and head range: the same rows, in the same order, at both ends."""

    peer: int
    view: View


class Launch(NamedTuple):
    """The kernel call of a step: query heads, operands to gather, prepared work, and where results are deposited."""

    heads: slice
    operands: dict[Payload, View]
    work: Any
    results: dict[Payload, View]


@dataclass
class Step:
    """What this rank does in one step of a table."""

    # rows of each new buffer
    allocate: dict[BufferKey, int] = field(default_factory=dict)
    sends: list[tuple[Payload, Message]] = field(default_factory=list)
    receives: list[tuple[Payload, Message]] = field(default_factory=list)
    launch: Launch | None = None
    # whether all ranks exchange this step's messages in one all-to-all
    collective: bool = False
    release: list[BufferKey] = field(default_factory=list)


@dataclass(frozen=True)
class Program:
    """One rank's share of a plan. `kept`: rows of each forward batch that stays for the backward, by its forward name."""

    # not the plan itself: programs are cached for as long as their plan lives
    call: Call
    proof: Proof
    rank: int
    tokens: int
    forward: list[Step]
    backward: list[Step]
    kept: dict[BufferKey, int]


def lower(plan: Plan, rank: int, prepare: Prepare, proof: Proof | None = None) -> Program:
    """Lower a plan for one rank; `prepare` is the kernel's. The plan is proven first: PlanError if it cannot be."""
    proof = proof if proof is not None and proof.digest == plan.digest else verify(plan)
    call = plan.call
    tokens = int(call.layout.shard_sizes()[rank])
    keep = plan.policy == "keep"
    # the backward's launches are mostly the forward's
    prepare = _remembered(prepare)
    forward = _TableLowering(call, plan.forward, rank, FORWARD, prepare)
    kept = {key: rows for key, rows in forward.sizes.items() if keep and key.payload in (Payload.Q, Payload.KV)}
    there = [place._replace(key=inherited(place.key)) for place in forward.batches if place.key in kept]
    backward = _TableLowering(call, plan.backward, rank, BACKWARD, prepare, there)
    return Program(call, proof, rank, tokens, forward.steps(kept), backward.steps(), kept)


def _remembered(prepare: Prepare) -> Prepare:
    made: dict[tuple[Any, ...], Any] = {}

    def once(cells: Cells) -> Any:
        key = cells.key()
        if key not in made:
            made[key] = prepare(cells)
        return made[key]

    return once


def inherited(key: BufferKey) -> BufferKey:
    """The name a forward batch has in the backward table, and back again; no batch that arrives there has it."""
    return key._replace(step=OWN - 1 - key.step)


class _Place(NamedTuple):
    """Where the (token, head) cells of one buffer lie: rows `row`.. hold tokens [t0, t1)."""

    key: BufferKey
    t0: Ints
    t1: Ints
    row: Ints


class _Atlas(NamedTuple):
    """All places of one payload and head range, sorted by token: a (token, head) lies in at most one of them."""

    payload: Payload
    h0: int
    h1: int
    keys: list[BufferKey]
    # index into keys, per stretch
    buffer: Ints
    t0: Ints
    t1: Ints
    row: Ints


def _atlases(places: list[_Place]) -> list[_Atlas]:
    grouped: dict[tuple[Payload, int, int], list[_Place]] = {}
    for place in places:
        grouped.setdefault((place.key.payload, place.key.h0, place.key.h1), []).append(place)
    atlases = []
    for (payload, h0, h1), same in grouped.items():
        buffer = np.repeat(np.arange(len(same)), [len(place.t0) for place in same])
        t0, t1, row = (np.concatenate([getattr(place, name) for place in same]) for name in ("t0", "t1", "row"))
        order = np.argsort(t0)
        keys = [place.key for place in same]
        atlases.append(_Atlas(payload, h0, h1, keys, buffer[order], t0[order], t1[order], row[order]))
    return atlases


class _TableLowering:
    """Lowers one table for one rank. `there`: batches that an earlier pass left behind."""

    def __init__(
        self,
        call: Call,
        table: Table,
        rank: int,
        payloads: tuple[Payload, ...],
        prepare: Prepare,
        there: Iterable[_Place] = (),
    ):
        self.call, self.table, self.rank, self.prepare = call, table, rank, prepare
        self.payloads = payloads
        self.tokens = int(call.layout.shard_sizes()[rank])
        self.tasks = take(table.tasks, table.tasks["rank"] == rank)
        self.outgoing = take(table.moves, table.moves["src"] == rank)
        self.incoming = take(table.moves, table.moves["dst"] == rank)
        self.sizes: dict[BufferKey, int] = {}
        self.batches: list[_Place] = []
        # batches that arrive hold copies; batches that leave hold partial results
        self._make_batches(self.incoming, HOLDING, "src")
        self._make_batches(self.outgoing, ACCUMULATING, "dst")
        self.atlases = _atlases([*self.batches, *there, *(self._own(payload) for payload in payloads)])

    def steps(self, stays: Container[BufferKey] = ()) -> list[Step]:
        """The steps of this rank; buffers in `stays` are never released."""
        steps = [Step() for _ in range(self.table.steps)]
        collective = _dense_steps(self.call, self.table)
        for index, step in enumerate(steps):
            step.collective = bool(collective[index])
            step.sends = self._messages(self.outgoing, index, "dst")
            step.receives = self._messages(self.incoming, index, "src")
            step.launch = self._launch(index)
        self._set_lifetimes(steps, stays)
        self._mark_first_deposits(steps)
        return steps

    def _own(self, payload: Payload) -> _Place:
        mine = take(self.call.layout.chunks, self.call.layout.chunks["rank"] == self.rank)
        key = BufferKey(payload, OWN, 0, self.call.payload_heads(payload))
        return _Place(key, mine["t0"], mine["t1"], mine["row"])

    def _make_batches(self, moves: Columns, payloads: tuple[Payload, ...], peer: str) -> None:
        for payload in payloads:
            rows = take(moves, moves["payload"] == payload)
            for step, h0, h1 in _distinct(rows["step"], rows["h0"], rows["h1"]):
                batch = take(rows, (rows["step"] == step) & (rows["h0"] == h0) & (rows["h1"] == h1))
                batch = take(batch, np.lexsort((batch["t0"], batch[peer])))
                length = batch["t1"] - batch["t0"]
                key = BufferKey(payload, step, h0, h1)
                self.sizes[key] = int(length.sum())
                # grouped by peer, so that messages are slices
                self.batches.append(_Place(key, batch["t0"], batch["t1"], np.cumsum(length) - length))

    def _messages(self, moves: Columns, step: int, peer: str) -> list[tuple[Payload, Message]]:
        here = take(moves, moves["step"] == step)
        messages = []
        for other, payload, h0, h1 in _distinct(here[peer], here["payload"], here["h0"], here["h1"]):
            same = (here[peer] == other) & (here["payload"] == payload) & (here["h0"] == h0) & (here["h1"] == h1)
            rows = take(here, same)
            view = self._view(Payload(payload), rows["t0"], rows["t1"], h0, h1)
            messages.append((Payload(payload), Message(other, view)))
        return messages

    def _launch(self, step: int) -> Launch | None:
        """All tasks of a step: a working tensor holds the tokens and heads of any of them."""
        tasks, group = take(self.tasks, self.tasks["step"] == step), self.call.group
        if not count(tasks):
            return None
        h0, h1 = int(tasks["h0"].min()), int(tasks["h1"].max())
        heads = tasks["h0"], tasks["h1"]
        rows = _Ranges.of(tasks["q0"], tasks["q1"], *heads, 1)
        keys = _Ranges.of(tasks["k0"], tasks["k1"], *heads, group)
        views = {payload: self._working(payload, keys if payload in ON_KEYS else rows) for payload in self.payloads}
        bands = task_bands(self.call.mask, tasks)
        # global to working coordinates: each task lies inside one interval of the union
        to_row, to_key = _offsets(rows.t0, rows.t1, tasks["q0"]), _offsets(keys.t0, keys.t1, tasks["k0"])
        bands[:, [Q0, Q1, OQ]] += to_row[:, None]
        bands[:, [K0, K1, OK]] += to_key[:, None]
        cells = Cells(
            bands,
            np.stack([tasks["h0"], tasks["h1"]], 1) - h0,
            to_row - to_key,
            rows.rows,
            keys.rows,
            h1 - h0,
            keys.h1 - keys.h0,
            group,
            h0 % group,
        )
        return Launch(
            slice(h0, h1),
            {payload: view for payload, view in views.items() if payload in HOLDING},
            self.prepare(cells),
            {payload: view for payload, view in views.items() if payload in ACCUMULATING},
        )

    def _working(self, payload: Payload, ranges: _Ranges) -> View:
        """The working tensor of a launch: only what some task uses is linked."""
        links = []
        for h0, h1, t0, t1 in ranges.parts:
            at = t0 + _offsets(ranges.t0, ranges.t1, t0)
            links += self._links(payload, t0, t1, at, (h0, h1), h0 - ranges.h0)
        heads = ranges.h1 - ranges.h0
        linked = sum(_length(link.at_rows) * _length(link.at_heads) for link in links)
        return View(ranges.rows, heads, links, linked == ranges.rows * heads)

    def _view(self, payload: Payload, t0: Ints, t1: Ints, h0: int, h1: int) -> View:
        """Tokens [t0_i, t1_i), one interval after another, and heads [h0, h1) of a payload."""
        at = np.cumsum(t1 - t0) - (t1 - t0)
        return View(int((t1 - t0).sum()), h1 - h0, self._links(payload, t0, t1, at, (h0, h1), 0))

    def _links(
        self, payload: Payload, t0: Ints, t1: Ints, at: Ints, heads: tuple[int, int], at_head: int
    ) -> list[Link]:
        """Where tokens [t0_i, t1_i), from row at_i on, and heads [h0, h1), from at_head on, of a payload lie."""
        h0, h1 = heads
        links = []
        for atlas in self.atlases:
            low, high = max(h0, atlas.h0), min(h1, atlas.h1)
            if atlas.payload != payload or low >= high:
                continue
            i, j = crossing(atlas.t0, atlas.t1, t0, t1)
            begin, end = np.maximum(t0[i], atlas.t0[j]), np.minimum(t1[i], atlas.t1[j])
            rows, at_rows = atlas.row[j] + begin - atlas.t0[j], at[i] + begin - t0[i]
            there, here = slice(low - atlas.h0, high - atlas.h0), slice(at_head + low - h0, at_head + high - h0)
            owner = atlas.buffer[j]
            # mostly one: cheaper to ask than to sort
            several = len(owner) and (owner != owner[0]).any()
            for buffer in np.unique(owner) if several else owner[:1]:
                mine = owner == buffer if several else slice(None)
                length = (end - begin)[mine]
                links.append(
                    Link(atlas.keys[buffer], _as_rows(rows[mine], length), there, _as_rows(at_rows[mine], length), here)
                )
        return links

    def _set_lifetimes(self, steps: list[Step], stays: Container[BufferKey]) -> None:
        first: dict[BufferKey, int] = {}
        last: dict[BufferKey, int] = {}
        for index, step in enumerate(steps):
            views = [message.view for _, message in (*step.sends, *step.receives)]
            if step.launch is not None:
                views += [*step.launch.operands.values(), *step.launch.results.values()]
            for key in (link.buffer for view in views for link in view.links):
                first.setdefault(key, index)
                last[key] = index
        for key, rows in self.sizes.items():
            steps[first[key]].allocate[key] = rows
            if key not in stays:
                steps[last[key]].release.append(key)

    def _mark_first_deposits(self, steps: list[Step]) -> None:
        """Which links write outputs where none are yet, in the order in which the executor deposits.

        Gradients are left alone: adding to zeros costs what writing does, merging outputs five times as much.
        """
        sizes = {**self.sizes, self._own(Payload.O).key: self.tokens}
        written = {
            key: np.zeros((rows, key.h1 - key.h0), bool) for key, rows in sizes.items() if key.payload == Payload.O
        }

        def marked(view: View) -> View:
            links = []
            for link in view.links:
                place = (link.rows if isinstance(link.rows, slice) else link.rows.numpy(), link.heads)
                links.append(link._replace(fresh=not written[link.buffer][place].any()))
                written[link.buffer][place] = True
            return view._replace(links=links)

        for step in steps:
            if step.launch is not None and Payload.O in step.launch.results:
                step.launch.results[Payload.O] = marked(step.launch.results[Payload.O])
            step.receives = [
                (payload, message._replace(view=marked(message.view)) if payload == Payload.O else message)
                for payload, message in step.receives
            ]


def _dense_steps(call: Call, table: Table) -> np.ndarray:
    """The steps in which at least half of all pairs of ranks talk: those become one all-to-all. The same on every rank."""
    moves, ranks = table.moves, call.ranks
    pairs = np.unique((moves["step"] * ranks + moves["src"]) * ranks + moves["dst"])
    talking = np.bincount(pairs // ranks**2, minlength=table.steps)
    return (ranks > 2) & (2 * talking >= ranks * (ranks - 1))


def on_device(program: Program, device: torch.device) -> Program:
    """The same program with its index lists on the device: one copy, from pinned memory where that exists."""
    if device.type == "cpu":
        return program
    found: list[Tensor] = []

    def note(rows: Rows) -> Rows:
        if isinstance(rows, Tensor):
            found.append(rows)
        return rows

    _with_rows(program, note)
    if not found:
        return program
    packed = torch.cat(found)
    if device.type == "cuda":
        packed = packed.pin_memory()
    copies = iter(packed.to(device, non_blocking=True).split([len(rows) for rows in found]))
    return _with_rows(program, lambda rows: next(copies) if isinstance(rows, Tensor) else rows)


def _with_rows(program: Program, change: Callable[[Rows], Rows]) -> Program:
    """The program with every index of its views replaced, in a fixed order."""

    def view(old: View) -> View:
        return old._replace(
            links=[link._replace(rows=change(link.rows), at_rows=change(link.at_rows)) for link in old.links]
        )

    def messages(old: list[tuple[Payload, Message]]) -> list[tuple[Payload, Message]]:
        return [(payload, message._replace(view=view(message.view))) for payload, message in old]

    def launch(old: Launch) -> Launch:
        views = [{payload: view(part) for payload, part in parts.items()} for parts in (old.operands, old.results)]
        return old._replace(operands=views[0], results=views[1])

    def step(old: Step) -> Step:
        calls = None if old.launch is None else launch(old.launch)
        return replace(old, sends=messages(old.sends), receives=messages(old.receives), launch=calls)

    passes = [[step(part) for part in steps] for steps in (program.forward, program.backward)]
    return replace(program, forward=passes[0], backward=passes[1])


def _distinct(*columns: Ints) -> list[tuple[int, ...]]:
    """The distinct rows, sorted."""
    return [tuple(row) for row in np.unique(np.stack(columns, 1), axis=0).tolist()]


class _Ranges(NamedTuple):
    """The tokens that some tasks need: all of them, and `parts` (h0, h1, t0, t1) by head range, ranges disjoint."""

    h0: int
    h1: int
    t0: Ints
    t1: Ints
    parts: list[tuple[int, int, Ints, Ints]]

    @property
    def rows(self) -> int:
        return int((self.t1 - self.t0).sum())

    @staticmethod
    def of(t0: Ints, t1: Ints, h0: Ints, h1: Ints, group: int) -> _Ranges:
        """Of intervals [t0_i, t1_i) in query heads [h0_i, h1_i); heads are counted in units of `group`."""
        low, high = h0 // group, -(-h1 // group)
        _, begin, end = union(np.zeros_like(t0), t0, t1)
        cuts = np.unique([low, high]).tolist()
        parts = []
        for a, b in itertools.pairwise(cuts):
            here = (low <= a) & (b <= high)
            if here.all():
                parts.append((a, b, begin, end))
            elif here.any():
                parts.append((a, b, *union(np.zeros_like(t0[here]), t0[here], t1[here])[1:]))
        return _Ranges(cuts[0], cuts[-1], begin, end, parts)


def _offsets(t0: Ints, t1: Ints, start: Ints) -> Ints:
    """What to add to a token in the interval that holds start_i to get its row in the concatenation."""
    at = np.cumsum(t1 - t0) - (t1 - t0)
    i = np.searchsorted(t0, start, "right") - 1
    return at[i] - t0[i]


def _length(part: Rows) -> int:
    return part.stop - part.start if isinstance(part, slice) else len(part)


def _as_rows(start: Ints, length: Ints) -> Rows:
    """Consecutive stretches of rows as a slice where they are one stretch, as an index otherwise."""
    if (start[1:] == start[:-1] + length[:-1]).all():
        return slice(int(start[0]), int(start[-1] + length[-1]))
    offset = np.repeat(np.cumsum(length) - length - start, length)
    return torch.from_numpy(np.arange(int(length.sum())) - offset)
