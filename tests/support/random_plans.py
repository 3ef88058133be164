"""Valid plans that no strategy would make: random rectangles at random ranks and steps, with data routed through other
ranks.

Cells are (token, head) pairs, handled one by one. The code is slow and obvious, for sequences of a dozen tokens.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable

from distattn.ir.bands import clip, tighten
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.op import ATTENTION, TOKEN_SHIFT, Op
from distattn.ir.plan import (
    BACKWARD_PAYLOADS,
    FORWARD_PAYLOADS,
    HELD_PAYLOADS,
    KEY_PAYLOADS,
    Call,
    Payload,
    Plan,
    Table,
)

Cell = tuple[int, int]
Row = tuple[int, ...]
# the number of input tokens that each output token of a convolution depends on
TAPS = 3
# steps before the first task, which leave time for inputs to arrive
_LEAD = 4
# each accumulated payload takes the route of the input payload it maps to, in reverse
_MIRROR = {Payload.O: Payload.Q, Payload.dQ: Payload.Q, Payload.dKV: Payload.KV}


def random_plan(rng: random.Random, op: Op = ATTENTION) -> Plan:
    """Return a random plan of attention, latent attention, a `TAPS`-tap convolution or a token shift that `verify` must
    accept.
    """
    n, ranks = rng.randrange(6, 16), rng.randrange(1, 5)
    heads, kv_heads = rng.choice([(2, 1), (6, 2), (4, 4), (6, 3)])
    if op != ATTENTION:
        # all heads share one latent
        kv_heads = 1 if op.kind == "latent_attention" else heads
    mask = _mask_of_few_tokens(rng, n, op) if op.kind == "convolution" else _mask(rng, n)
    call = Call(mask, _layout(rng, n, ranks), heads, kv_heads, 4, 4, "float64", op=op)
    forward = _tasks(rng, call)
    backward = forward if rng.random() < 0.5 else _tasks(rng, call)
    policy = rng.choice(["keep", "refetch-home"])
    there = [row for payload in FORWARD_PAYLOADS for row in _moves(rng, call, payload, forward, set())]
    kept = {(row[3], row[2], cell) for row in there if policy == "keep" and row[3] != Payload.O for cell in _cells(row)}
    back = [row for payload in BACKWARD_PAYLOADS for row in _moves(rng, call, payload, backward, kept)]
    return Plan(call, Table.from_rows(forward, there), Table.from_rows(backward, back), policy)


def _mask(rng: random.Random, n: int) -> Mask:
    half = n // 2
    blocks = [
        [0, half, 0, n, -(1 << 40), 2, 2, 3, 0, 1],
        [half, n, 0, half, -n, 0, 1, 1, 0, 0],
        [half, n, half, n, 0, 3, 1, 1, 0, 0],
    ]
    return rng.choice(
        [
            Mask.causal(n),
            Mask.full(n),
            Mask.documents([half, n - half]),
            Mask.sliding_window(n, rng.randrange(n), 2),
            Mask.from_pieces(blocks, n),
        ]
    )


def _mask_of_few_tokens(rng: random.Random, n: int, op: Op) -> Mask:
    """Return a mask of documents, some of which may be shorter than the span their tokens see."""
    cuts = sorted(rng.sample(range(1, n // 2), rng.randrange(3)))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    return (
        Mask.token_shift(lengths, rng.choice([-2, 1, 3]))
        if op == TOKEN_SHIFT
        else Mask.documents(lengths, (TAPS - 1, 0))
    )


def _layout(rng: random.Random, n: int, ranks: int) -> Layout:
    """Return random chunks on random ranks in random local order. Some ranks may have no tokens."""
    cuts = sorted({0, n, *(rng.randrange(n) for _ in range(4))})
    spans = list(zip(cuts[:-1], cuts[1:], strict=True))
    rng.shuffle(spans)
    owners = [rng.randrange(ranks) for _ in spans]
    return Layout.from_chunks(
        [n], [[s for s, owner in zip(spans, owners, strict=True) if owner == rank] for rank in range(ranks)]
    )


def _tasks(rng: random.Random, call: Call) -> list[Row]:
    """Cut the mask at random along queries, keys or heads, and assign each rectangle to a random rank and step."""
    rows = []
    for piece, band in enumerate(call.mask.pieces):
        waiting = [(0, call.mask.n, 0, call.mask.n, 0, call.heads)]
        while waiting:
            *rectangle, h0, h1 = waiting.pop()
            tight = tighten(clip(band[None], *rectangle))[0]
            box = [*map(int, tight[:4]), h0, h1]
            if box[0] == box[1]:
                continue
            axis = 2 * rng.randrange(3)
            if rng.random() < 0.5 and box[axis + 1] - box[axis] > 1:
                cut = rng.randrange(box[axis] + 1, box[axis + 1])
                waiting += [
                    tuple([*box[: axis + 1], cut, *box[axis + 2 :]]),
                    tuple([*box[:axis], cut, *box[axis + 1 :]]),
                ]
            else:
                rows.append((_LEAD + rng.randrange(3), rng.randrange(call.ranks), piece, *box))
    return rows


def _moves(rng: random.Random, call: Call, payload: Payload, tasks: list[Row], kept: set) -> list[Row]:
    if payload in HELD_PAYLOADS:
        return _deliveries(rng, call, payload, tasks, {(rank, cell) for kind, rank, cell in kept if kind == payload})
    last = max(task[0] for task in tasks) + _LEAD
    mirrored = _deliveries(rng, call, _MIRROR[payload], [(last - task[0], *task[1:]) for task in tasks], set())
    return [(last - step, dst, src, int(payload), *where) for step, src, dst, _, *where in mirrored]


def _deliveries(rng: random.Random, call: Call, payload: Payload, tasks: list[Row], kept: set) -> list[Row]:
    """Return moves that deliver every cell to its tasks in time, sometimes through a rank that does not need the cell."""
    owner = {int(token): rank for rank in range(call.ranks) for token in call.layout.tokens(rank)}
    needed: dict[Cell, dict[int, int]] = defaultdict(dict)
    for step, rank, _, q0, q1, k0, k1, h0, h1 in tasks:
        on_keys = payload in KEY_PAYLOADS
        rows, heads = (
            (range(k0, k1), range(h0 // call.gqa_group_size, -(-h1 // call.gqa_group_size)))
            if on_keys
            else (range(q0, q1), range(h0, h1))
        )
        for cell in ((token, head) for token in rows for head in heads):
            if owner[cell[0]] != rank and (rank, cell) not in kept:
                needed[cell][rank] = min(step, needed[cell].get(rank, step))
    # cells with the same route travel together
    block = rng.choice([1, 3, 100])
    alike: dict[tuple, list[Cell]] = defaultdict(list)
    for cell, users in needed.items():
        keepers = tuple(rank for rank in range(call.ranks) if (rank, cell) in kept)
        alike[owner[cell[0]], tuple(sorted(users.items())), keepers, cell[0] // block].append(cell)
    moves = []
    for (home, users, keepers, _), cells in alike.items():
        since = {home: -1, **{rank: -1 for rank in keepers}}
        for user, deadline in sorted(users, key=lambda item: item[1]):
            src = rng.choice([rank for rank, step in since.items() if step < deadline - 1])
            strangers = [rank for rank in range(call.ranks) if rank not in since and rank not in dict(users)]
            path = [user]
            if strangers and deadline - since[src] > 2 and rng.random() < 0.5:
                path = [rng.choice(strangers), user]
            for left, dst in zip(range(len(path) - 1, -1, -1), path, strict=True):
                step = rng.randrange(since[src] + 1, deadline - left)
                since[dst] = step
                moves += [(step, src, dst, int(payload), *box) for box in _boxes(cells)]
                src = dst
    return moves


def _cells(row: Row) -> Iterable[Cell]:
    *_, t0, t1, h0, h1 = row
    return ((token, head) for token in range(t0, t1) for head in range(h0, h1))


def _boxes(cells: Iterable[Cell]) -> list[Row]:
    """Return the cells as disjoint (t0, t1, h0, h1)."""
    left, boxes = set(cells), []
    while left:
        t0, h0 = min(left)
        t1 = h1 = 0
        for t1 in range(t0, t0 + len(left) + 1):
            if (t1, h0) not in left:
                break
        for h1 in range(h0, h0 + len(left) + 1):
            if not all((token, h1) in left for token in range(t0, t1)):
                break
        boxes.append((t0, t1, h0, h1))
        left -= set(_cells(boxes[-1]))
    return boxes
