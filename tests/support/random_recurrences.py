"""Random recurrence plans that are correct by construction, and mutations of one or two of their rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from recurrences import RECURRENT, RecurrenceCase, RecurrenceResult, by_definition, recurrence_case

from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.op import OPS
from distattn.ir.plan import MOVE_COLUMNS, TASK_COLUMNS, Call, Plan, Table, has_rows_and_keys, num_rows, select_rows
from distattn.parallel.strategies.scan_schedules import LAST_STEP, SCHEDULES, Chain, Schedule, Segment
from distattn.parallel.strategies.scan_tables import chain_rows, layout_chains, table_of_rows

KEY_DIM, VALUE_DIM = 3, 4


class RandomPlan(NamedTuple):
    """A plan and a description of how it was built."""

    plan: Plan
    name: str


def random_layout(rng: random.Random) -> Layout:
    """Return a layout of documents with random lengths on 1 to 8 ranks, some of which may have no tokens."""
    n, ranks = rng.randint(1, 60), rng.randint(1, 8)
    cuts = sorted(rng.sample(range(1, n), min(n - 1, rng.choice([0, 0, 1, 3, 8]))))
    lengths = np.diff([0, *cuts, n]).tolist()
    kind = rng.choice(["contiguous", "zigzag", "document_zigzag", "block_cyclic", "balanced", "random"])
    if kind == "document_zigzag":
        return Layout.document_zigzag(lengths, ranks, min_chunk=rng.randint(1, 5))
    if kind == "block_cyclic":
        return Layout.block_cyclic(lengths, ranks, block=rng.randint(2, 9))
    if kind != "random":
        return getattr(Layout, kind)(lengths, ranks)
    edges = [0, *sorted(rng.sample(range(1, n), min(n - 1, rng.randint(0, 12)))), n]
    pairs = list(zip(edges[:-1], edges[1:], strict=True))
    rng.shuffle(pairs)
    owners = rng.sample(range(ranks), rng.randint(1, ranks))
    chunks: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for pair in pairs:
        chunks[rng.choice(owners)].append(pair)
    return Layout.from_chunks(lengths, chunks)


def random_recurrent_plan(rng: random.Random, ops: Sequence[str] = RECURRENT) -> RandomPlan:
    """Return a random plan. Segments run on their owners, on all ranks by heads, or on random ranks. Schedules may be
    mixed, and some tasks are split in two.
    """
    layout = random_layout(rng)
    kv_heads = rng.randint(1, 2)
    heads, op = kv_heads * rng.randint(1, 2), OPS[rng.choice(ops)]
    mask = Mask.documents(layout.lengths)
    key_dim = 1 if op.is_maximum else KEY_DIM
    call = Call(mask, layout, heads, kv_heads, key_dim, VALUE_DIM, "float64", op=op)
    where = rng.choice(["owners", "owners", "heads", "anywhere"])
    chains = {
        "owners": lambda: layout_chains(call, call.layout),
        "heads": lambda: _by_heads(call),
        "anywhere": lambda: _anywhere(call, rng),
    }[where]()
    name = rng.choice([*SCHEDULES, "mixed"])
    chosen = [_one(rng, rng.choice(list(SCHEDULES)) if name == "mixed" else name) for _ in chains]
    tables = {direction: table_of(call, chains, chosen, direction) for direction in ("forward", "backward")}
    if not op.has_gradient:
        tables["backward"] = Table.from_rows([])
    if rng.random() < 0.3:
        tables, name = _split(tables, rng), f"{name}, split"
    return RandomPlan(Plan(call, **tables, policy="keep"), f"{op.name} {where} {name}")


def case_of(plan: Plan, seed: int) -> tuple[RecurrenceCase, RecurrenceResult]:
    """Return random inputs for a plan, and their results by definition."""
    call = plan.call
    shape = dict(heads=call.heads, key_heads=call.kv_heads, key_dim=KEY_DIM, value_dim=VALUE_DIM)
    case = recurrence_case(call.op, tuple(call.layout.lengths), seed=seed, **shape)
    return case, by_definition(case)


def mutated(plan: Plan, rng: random.Random) -> Plan | None:
    """Return the plan with one or two table rows changed, or None if nothing has changed."""
    other = _changed(plan, rng)
    if other is not None and rng.random() < 0.3:
        return _changed(other, rng)
    return other


def _changed(plan: Plan, rng: random.Random) -> Plan | None:
    direction, kind = rng.choice(["forward", "backward"]), rng.choice(["tasks", "moves", "moves"])
    table = getattr(plan, direction)
    rows = getattr(table, kind)
    count = num_rows(rows)
    if not count:
        return None
    i, names = rng.randrange(count), TASK_COLUMNS if kind == "tasks" else MOVE_COLUMNS
    changed = {name: column.copy() for name, column in rows.items()}
    how = rng.choice(["delete", "copy", "elsewhere", "shift", "heads", "edge", "edge", "rank", "step", "swap", "kind"])
    by = rng.choice([-2, -1, 1, 2])
    places = {"tasks": ("q0", "q1", "k0", "k1"), "moves": ("t0", "t1")}[kind]
    rank = "rank" if kind == "tasks" else rng.choice(["src", "dst"])
    if how == "delete":
        changed = select_rows(changed, np.arange(count) != i)
    elif how in ("copy", "elsewhere"):
        changed = select_rows(changed, np.sort(np.append(np.arange(count), i)))
        if how == "elsewhere":
            changed[rank][i] = rng.randrange(plan.call.ranks)
    elif how == "shift":
        for name in places:
            changed[name][i] += by
    elif how == "heads":
        for name in rng.choice([("h0",), ("h1",), ("h0", "h1")]):
            changed[name][i] += np.sign(by)
    elif how == "edge":
        changed[rng.choice(places)][i] += by
    elif how == "rank":
        changed[rank][i] = rng.randrange(plan.call.ranks)
    elif how == "step":
        changed["step"][i] += by
    elif how == "swap":
        j, name = rng.randrange(count), rng.choice(names)
        changed[name][i], changed[name][j] = changed[name][j], changed[name][i]
    else:
        changed["piece" if kind == "tasks" else "payload"][i] += by
    if all(len(changed[name]) == count and (changed[name] == rows[name]).all() for name in names):
        return None
    tables = {"tasks": table.tasks, "moves": table.moves, kind: changed}
    return replace(plan, **{direction: Table(**tables)})


def _one(rng: random.Random, name: str) -> Schedule:
    first_whole = rng.choice([0, 1, 2, LAST_STEP])
    return SCHEDULES[name] if name == "sequential" else partial(SCHEDULES[name], first_whole=first_whole)


def table_of(call: Call, chains: list[Chain], schedules: list[Schedule], direction: str) -> Table:
    """Return the table of `chains`, where `schedules` holds each chain's schedule."""
    each = zip(chains, schedules, strict=True)
    return table_of_rows(
        call, [chain_rows(chain, schedule, range(call.ranks), direction) for chain, schedule in each], direction
    )


def _by_heads(call: Call) -> list[Chain]:
    """Return chains in which every rank computes entire documents for its share of the heads."""
    cuts = [rank * call.heads // call.ranks for rank in range(call.ranks + 1)]
    return [
        Chain(piece, t0, t1, cuts[rank], cuts[rank + 1], [Segment(t0, t1, rank)])
        for piece, (t0, t1) in enumerate(call.documents.tolist())
        for rank in range(call.ranks)
        if cuts[rank] < cuts[rank + 1]
    ]


def _anywhere(call: Call, rng: random.Random) -> list[Chain]:
    """Return chains of random segments on random ranks, which differ between groups of heads."""
    bounds = [0, *sorted(rng.sample(range(1, call.heads), rng.randint(0, call.heads - 1))), call.heads]
    out = []
    for h0, h1 in zip(bounds[:-1], bounds[1:], strict=True):
        for piece, (start, end) in enumerate(call.documents.tolist()):
            inner = sorted(rng.sample(range(start + 1, end), min(end - start - 1, rng.randint(0, 4))))
            edges = [start, *inner, end]
            segments = [Segment(a, b, rng.randrange(call.ranks)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
            out.append(Chain(piece, start, end, h0, h1, segments))
    return out


def _split(tables: dict[str, Table], rng: random.Random) -> dict[str, Table]:
    """Split some tasks of the tables in two. The second half starts from the state that the first half leaves behind."""
    cuts: dict[tuple[int, ...], int] = {}
    split_tables = {}
    for direction, table in tables.items():
        rows = []
        for row in zip(*(table.tasks[name].tolist() for name in TASK_COLUMNS), strict=True):
            step, rank, piece, q0, q1, k0, k1, *heads = row
            cut = cuts.setdefault((rank, q0, k1, *heads), rng.choice([0, rng.randint(q0, k1)]))
            if not q0 < cut < k1:
                boxes = [(q0, q1, k0, k1)]
            elif q0 == q1:
                boxes = [(q0, q0, k0, cut), (cut, cut, k0, k1)]
            elif k0 == k1:
                boxes = [(cut, q1, k1, k1), (q0, q1, cut, cut)]
            elif direction == "forward":
                boxes = [(q0, cut, k0, cut), (cut, k1, k0, k1)]
            else:
                boxes = [(cut, q1, k0, k1), (q0, q1, k0, cut)]
            # doubling the steps leaves room for the first halves without going below step 0
            first = 2 * step + 2 - len(boxes)
            rows += [(first + i, rank, piece, *box, *heads) for i, box in enumerate(boxes)]
        moves = {**table.moves, "step": 2 * table.moves["step"] + 2}
        split_tables[direction] = Table(Table.from_rows([(row[0] + 1, *row[1:]) for row in rows]).tasks, moves)
    return split_tables


def attacked(rng: random.Random) -> tuple[Plan, str] | None:
    """Return a plan with consistent rows that either drops state in the middle of a document or carries it into the
    next document, and the name of this fault. Return None if the documents drawn do not allow the fault.
    """
    layout = random_layout(rng)
    call = Call(Mask.documents(layout.lengths), layout, 2, 2, KEY_DIM, VALUE_DIM, "float64", op=OPS["gla"])
    chains, schedule = layout_chains(call, layout), _one(rng, rng.choice(list(SCHEDULES)))
    how = rng.choice(["state lost", "gradient lost", "documents joined", "gradients joined"])
    if "lost" in how:
        long = [i for i, chain in enumerate(chains) if len(chain.segments) > 1]
        if not long:
            return None
        i = rng.choice(long)
        chain, cut = chains[i], rng.randrange(1, len(chains[i].segments))
        middle = chain.segments[cut].t0
        first = chain._replace(t1=middle, segments=chain.segments[:cut])
        second = chain._replace(t0=middle, segments=chain.segments[cut:])
        wrong = [*chains[:i], first, second, *chains[i + 1 :]]
        start, end, begin = (middle, chain.t1, middle) if how == "state lost" else (chain.t0, chain.t1, chain.t0)
    else:
        if len(chains) < 2:
            return None
        i = rng.randrange(len(chains) - 1)
        left, right_ = chains[i : i + 2]
        joined = rng.choice([left, right_])._replace(t0=left.t0, t1=right_.t1, segments=left.segments + right_.segments)
        wrong = [*chains[:i], joined, *chains[i + 2 :]]
        start, end, begin = right_.t0, right_.t1, left.t0 if how == "documents joined" else right_.t0
    right, other = (
        [table_of(call, some, [schedule] * len(some), direction) for direction in ("forward", "backward")]
        for some in (chains, wrong)
    )
    if how in ("state lost", "documents joined"):
        tables = other[0], _begun_at(right[1], start, end, begin)
    else:
        tables = right[0], _begun_at(other[1], start, end, begin)
    return Plan(call, *tables, policy="keep"), how


def _begun_at(table: Table, q0: int, q1: int, start: int) -> Table:
    """Return the backward table, except that tasks of unsplit segments starting in [q0, q1) begin their sum at `start`."""
    tasks = table.tasks
    whole = has_rows_and_keys(tasks) & (q0 <= tasks["q0"]) & (tasks["q0"] < q1)
    return Table({**tasks, "k0": np.where(whole, start, tasks["k0"])}, table.moves)
