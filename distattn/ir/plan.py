"""The plan: the tasks of all ranks and the moves between them, as two tables of plain integers.

A *task* (step, rank, piece, q0, q1, k0, k1, h0, h1) computes core attention on `rank`, for one rectangle of one mask
piece and query heads [h0, h1). A *move* (step, src, dst, payload, t0, t1, h0, h1) carries an interval of tokens and
heads of one payload from rank src to rank dst. All rows of step s run concurrently and read the state at the end of step
s-1. `distattn.parallel.analysis.verify` checks that a plan is valid; this file only defines the data.

A recurrence's task reads the tokens [q0, k1) of its *segment* one by one (k0 <= q0). Its rectangle consists of the cells that
pass through the segment: earlier keys enter as their state S[k0, q0), and later rows as their gradient state dS[k1, q1). A task
without rows (q0 = q1) only produces the state S[k0, k1), and a task without keys (k0 = k1) only the gradient state dS[q0, q1).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from distattn.ir.arguments import check_fields, checked
from distattn.ir.bands import BK, BQ, HI, K0, K1, LO, OK, OQ, Q0, Q1, areas, clip
from distattn.ir.cached import cached_property
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.ir.intervals import Ints, lexicographic_argsort
from distattn.ir.layout import Layout
from distattn.ir.mask import MAX_HEADS, Mask
from distattn.ir.op import ATTENTION, Op

Columns = dict[str, Ints]
TASK_COLUMNS = ("step", "rank", "piece", "q0", "q1", "k0", "k1", "h0", "h1")
MOVE_COLUMNS = ("step", "src", "dst", "payload", "t0", "t1", "h0", "h1")
POLICIES = ("keep", "refetch-home", "refetch-follow")
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_FORMAT = 2


class Payload(IntEnum):
    """The tensors that a move carries. O is sent with its log-sum-exp, dO with the final log-sum-exp and delta = rowsum(dO * O).

    S and dS are a recurrence's states and their gradients. In their moves, [t0, t1) are the tokens that the state summarizes.
    """

    Q = 0
    KV = 1
    O = 2  # noqa: E741
    dO = 3
    dQ = 4
    dKV = 5
    S = 6
    dS = 7


# a move copies a held payload; it adds a reduced payload to the payload at the destination, and removes it from the source
HELD_PAYLOADS = (Payload.Q, Payload.KV, Payload.dO)
REDUCED_PAYLOADS = (Payload.O, Payload.dQ, Payload.dKV)
FORWARD_PAYLOADS = (Payload.Q, Payload.KV, Payload.O)
BACKWARD_PAYLOADS = (Payload.Q, Payload.KV, Payload.dO, Payload.dQ, Payload.dKV)
KEY_PAYLOADS = (Payload.KV, Payload.dKV)
# moves also copy states, whose sizes do not depend on the number of tokens that they summarize
STATE_PAYLOADS = (Payload.S, Payload.dS)
_OF_GRADIENT = {Payload.dQ: "Q", Payload.dKV: "KV"}


def make_columns(names: Sequence[str], **values: Ints | int) -> Columns:
    """Return int64 columns of equal length; scalars are broadcast."""
    length = max((len(v) for v in values.values() if isinstance(v, np.ndarray)), default=0)
    return {name: np.broadcast_to(np.asarray(values[name], np.int64), (length,)) for name in names}


def concat_rows(names: Sequence[str], parts: Iterable[Columns]) -> Columns:
    """Concatenate the rows of all parts."""
    rows = list(parts)
    return {name: np.concatenate([np.zeros(0, np.int64), *(part[name] for part in rows)]) for name in names}


def select_rows(rows: Columns, index: np.ndarray) -> Columns:
    """Return the rows that a boolean or integer index selects."""
    return {name: column[index] for name, column in rows.items()}


def num_rows(rows: Columns) -> int:
    """Return the number of rows."""
    return len(rows["step"])


@dataclass(frozen=True, eq=False)
class Table:
    """The tasks and moves of one direction, as int64 columns keyed by name. Rows are sorted by all columns in declared order.

    label: a strategy's note about its choice. Nothing depends on it.
    """

    tasks: Columns
    moves: Columns
    label: str = ""

    def __post_init__(self) -> None:
        for name, names in (("tasks", TASK_COLUMNS), ("moves", MOVE_COLUMNS)):
            object.__setattr__(self, name, _canonical(names, getattr(self, name)))

    @staticmethod
    def from_rows(
        tasks: Sequence[Sequence[int]] | Ints, moves: Sequence[Sequence[int]] | Ints = (), label: str = ""
    ) -> Table:
        """Build a table from handwritten rows, whose values are in the order of `TASK_COLUMNS` or `MOVE_COLUMNS`."""
        task_rows = np.array(tasks, np.int64).reshape(-1, len(TASK_COLUMNS)).T
        move_rows = np.array(moves, np.int64).reshape(-1, len(MOVE_COLUMNS)).T
        named = dict(zip(TASK_COLUMNS, task_rows, strict=True)), dict(zip(MOVE_COLUMNS, move_rows, strict=True))
        return Table(*named, label)

    @cached_property
    def steps(self) -> int:
        """The number of steps in the table."""
        return 1 + int(max((rows["step"].max() for rows in (self.tasks, self.moves) if num_rows(rows)), default=-1))


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype; "" for None. dtype: a name, or a dtype of PyTorch or NumPy."""
    if isinstance(dtype, str) or dtype is None:
        return dtype or ""
    return str(getattr(dtype, "__name__", dtype)).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class Call:
    """One call: the mask and layout of its axis, its head counts, head dims and dtype, and its op.

    heads: query heads, or a recurrence's value heads. kv_heads: heads that several of `heads` share: key/value heads, or the
    heads of a recurrence's queries and keys.
    """

    mask: Mask
    layout: Layout
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    # the dtype in which outputs and gradients are sent; "" for the accumulation dtype
    comm_dtype: str = ""
    # results of which a single kernel call writes each element, so they can be held and sent in the inputs' dtype
    written_once: tuple[Payload, ...] = ()
    op: Op = ATTENTION

    def __post_init__(self) -> None:
        check_fields(self)
        if self.mask.n != self.layout.n:
            raise DistattnError(
                f"the mask covers {self.mask.n} tokens, the layout {self.layout.n}; they share one axis."
            )
        for name in ("heads", "kv_heads", "head_dim", "v_head_dim"):
            if not 1 <= getattr(self, name) <= MAX_HEADS:
                raise DistattnError(f"{name} must be 1 to {MAX_HEADS}, not {getattr(self, name)}.")
        if self.heads % self.kv_heads:
            raise DistattnError(
                f"{self.heads} query heads cannot be divided evenly among {self.kv_heads} key/value heads."
            )
        if self.mask.heads not in (None, self.heads):
            raise DistattnError(f"the mask is for {self.mask.heads} query heads, the call has {self.heads}.")
        if self.dtype not in DTYPE_BYTES:
            raise DistattnError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}.")
        if self.comm_dtype not in ("", self.dtype, self.accumulation_dtype):
            raise DistattnError(
                f"comm_dtype of a {self.dtype} call must be {self.dtype} or {self.accumulation_dtype}, not {self.comm_dtype!r}."
            )
        if self.op.is_recurrent:
            self._check_documents()

    @property
    def ranks(self) -> int:
        return self.layout.ranks

    @property
    def gqa_group_size(self) -> int:
        """The number of query heads per key/value head."""
        return self.heads // self.kv_heads

    @cached_property
    def piece_heads(self) -> Ints:
        """The query heads [h0, h1) of each piece of the mask, (P, 2)."""
        if self.mask.piece_heads is not None:
            return self.mask.piece_heads
        return np.tile(np.array([0, self.heads], np.int64), (len(self.mask.pieces), 1))

    @property
    def accumulation_dtype(self) -> str:
        """The dtype of sums: float32, or float64 for float64 inputs."""
        return "float64" if self.dtype == "float64" else "float32"

    def payload_heads(self, payload: Payload) -> int:
        """Return a payload's number of heads: for attention, key/value heads for KV and dKV, and query heads for the others."""
        return self.kv_heads if payload.name in self.op.shared_payloads else self.heads

    def payloads(self, direction: str) -> tuple[Payload, ...]:
        """Return the payloads that may move in the "forward" or "backward" table."""
        if direction == "forward":
            return (*FORWARD_PAYLOADS, Payload.S) if self.op.is_recurrent else FORWARD_PAYLOADS
        if not self.op.has_gradient:
            return ()
        return (*BACKWARD_PAYLOADS, *STATE_PAYLOADS) if self.op.is_recurrent else BACKWARD_PAYLOADS

    def payload_fields(self, payload: Payload, narrow: bool = False) -> tuple[tuple[int | None, str], ...]:
        """Return (width, dtype) for each tensor of a payload in memory; width None means one number per token and head.

        narrow: True if results are held in the inputs' dtype.
        """
        wide = self.accumulation_dtype
        result = self.dtype if narrow or payload in self.written_once else wide
        fields = self.op.fields(self.head_dim, self.v_head_dim)
        if payload in _OF_GRADIENT:
            dtypes = {"input": result, "wide": wide}
            return tuple((width, dtypes[kind]) for width, kind in fields[_OF_GRADIENT[payload]])
        dtypes = {"input": self.dtype, "wide": wide, "result": result}
        return tuple((width, dtypes[kind]) for width, kind in fields[payload.name])

    def comm_fields(self, payload: Payload) -> tuple[tuple[int | None, str], ...]:
        """Return (width, dtype) for each tensor of a payload as sent. Per-row values (log-sum-exp, delta) are not narrowed."""
        fields = self.payload_fields(payload)
        if payload not in REDUCED_PAYLOADS or payload in self.written_once or not self.comm_dtype:
            return fields
        return tuple((width, dtype if width is None else self.comm_dtype) for width, dtype in fields)

    def token_head_bytes(self, payload: Payload, in_memory: bool = False) -> int:
        """Return the bytes of a payload per token and head, as sent or in memory; 0 for states (see `state_bytes`)."""
        if payload in STATE_PAYLOADS:
            return 0
        fields = self.payload_fields(payload) if in_memory else self.comm_fields(payload)
        return sum((width or 1) * DTYPE_BYTES[dtype] for width, dtype in fields)

    def state_bytes(self, prefix: bool, in_memory: bool = False) -> int:
        """Return the bytes of one head's state. prefix: True if the state starts with its document (for dS: ends with it)."""
        numbers = self.op.state_numbers(self.head_dim, self.v_head_dim, prefix, in_memory)
        return numbers * DTYPE_BYTES[self.accumulation_dtype]

    @cached_property
    def documents(self) -> Ints:
        """The documents of a recurrence, (P, 2): the tokens [t0, t1) of each piece of the mask."""
        return self.mask.pieces[:, [Q0, Q1]]

    def is_prefix(self, payload: Payload, t0: Ints, t1: Ints) -> np.ndarray:
        """Return which states of tokens [t0, t1) start where a document starts; for dS, which end where a document ends."""
        return np.isin(t1, self.documents[:, 1]) if payload == Payload.dS else np.isin(t0, self.documents[:, 0])

    def _check_documents(self) -> None:
        if self.op.is_maximum and self.head_dim != 1:
            raise DistattnError(
                f"{self.op.name} keeps one number for each value: its head_dim must be 1, not {self.head_dim}."
            )
        pieces = self.mask.pieces
        same = (pieces[:, [Q0, Q1]] == pieces[:, [K0, K1]]).all(1) & (pieces[:, [BQ, BK]] == 1).all(1)
        shift = pieces[:, OK] - pieces[:, OQ]
        causal = (pieces[:, HI] + shift == 0) & (pieces[:, LO] + shift <= pieces[:, Q0] - pieces[:, Q1] + 1)
        if not (same & causal).all() or self.mask.heads is not None:
            raise DistattnError(
                f"{self.op.name} reads documents from their start: it takes causal masks, such as Mask.documents(lengths)."
            )


@dataclass(frozen=True, eq=False)
class Plan:
    """A planned attention call: the call, a forward table and a backward table. Compare by `digest`.

    `policy` is "keep" if the forward pass keeps received queries, keys and values for the backward pass; otherwise they are
    sent again. `strategy` is a label; nothing depends on it.
    """

    call: Call
    forward: Table
    backward: Table
    policy: str
    strategy: str = field(default="hand-written")

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise DistattnError(f"backward policy {self.policy!r} is not one of {', '.join(POLICIES)}.")

    @property
    def keeps_inputs(self) -> bool:
        """True if queries, keys and values received in the forward pass are kept for the backward pass."""
        return self.policy == "keep" and self.call.op.has_gradient

    def area_by_rank(self) -> Ints:
        """Return the cells x query heads that each rank computes in the forward pass; for a recurrence, tokens x heads."""
        work = task_areas(self.call, self.forward.tasks)
        out = np.zeros(self.call.ranks, work.dtype)
        np.add.at(out, self.forward.tasks["rank"], work)
        return out

    def bytes(self) -> Columns:
        """Return the bytes moved, forward and backward together: columns `src`, `dst`, `payload` and `bytes`."""
        moves = concat_rows(MOVE_COLUMNS, [self.forward.moves, self.backward.moves])
        size = move_bytes(self.call, moves)
        key = (moves["src"] * self.call.ranks + moves["dst"]) * len(Payload) + moves["payload"]
        triples, row = np.unique(key, return_inverse=True)
        total = np.zeros(len(triples), np.int64)
        np.add.at(total, row, size)
        pair, payload = np.divmod(triples, len(Payload))
        return {"src": pair // self.call.ranks, "dst": pair % self.call.ranks, "payload": payload, "bytes": total}

    @cached_property
    def digest(self) -> str:
        """A 128-bit hash of everything that affects results: tables, mask, layout, shapes, dtype and policy."""
        hasher = hashlib.blake2b(json.dumps(self._shape(), sort_keys=True).encode(), digest_size=16)
        for table in (self.forward, self.backward):
            for rows, names in ((table.tasks, TASK_COLUMNS), (table.moves, MOVE_COLUMNS)):
                hasher.update(np.int64(num_rows(rows)).tobytes())
                for name in names:
                    hasher.update(np.ascontiguousarray(rows[name], "<i8").tobytes())
        return hasher.hexdigest()

    @checked
    def save(self, path: str | Path) -> None:
        """Write the plan to one file; equal plans give equal bytes."""
        call = self.call
        arrays = {f"layout.{name}": column for name, column in call.layout.chunks.items()}
        arrays |= {"mask.pieces": call.mask.pieces, "layout.ends": call.layout.ends}
        if call.mask.piece_heads is not None:
            arrays["mask.piece_heads"] = call.mask.piece_heads
        for direction, table in (("forward", self.forward), ("backward", self.backward)):
            for kind, rows in (("tasks", table.tasks), ("moves", table.moves)):
                arrays |= {f"{direction}.{kind}.{name}": column for name, column in rows.items()}
        labels = {
            name: table.label for name, table in (("forward", self.forward), ("backward", self.backward)) if table.label
        }
        head = {"format": _FORMAT, "strategy": self.strategy, "digest": self.digest, "labels": labels} | self._shape()
        header = np.frombuffer(json.dumps(head, sort_keys=True).encode(), np.uint8)
        with open(path, "wb") as file:
            np.savez(file, allow_pickle=False, header=header, **{k: v.astype("<i8") for k, v in arrays.items()})

    @staticmethod
    @checked
    def load(path: str | Path) -> Plan:
        """Read a plan written by `save`. Raise DamagedDataError if the file is damaged."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = dict(archive)
            head = json.loads(arrays["header"].tobytes())
            if head["format"] != _FORMAT:
                raise DamagedDataError(f"{path}: plan format {head['format']}; this version reads format {_FORMAT}.")
            plan = _unpack(head, arrays)
        except FileNotFoundError:
            raise DistattnError(f"{path}: there is no such plan file.") from None
        except DamagedDataError:
            raise
        except (PermissionError, IsADirectoryError) as error:
            raise DistattnError(f"{path}: cannot be read: {error.strerror}.") from None
        # catch all errors: the zip reader takes flipped bits for unknown compression, encryption or impossible sizes, for example
        except Exception as error:
            raise DamagedDataError(f"{path}: not a plan, or damaged ({error}).") from None
        if plan.digest != head["digest"]:
            raise DamagedDataError(f"{path}: damaged, its content has digest {plan.digest}, not {head['digest']}.")
        return plan

    def _shape(self) -> dict[str, object]:
        call = self.call
        shape = {name: getattr(call, name) for name in ("heads", "kv_heads", "head_dim", "v_head_dim", "dtype")}
        return (
            shape
            | {
                "mask": call.mask.digest,
                "layout": call.layout.digest,
                "n": call.mask.n,
                "ranks": call.ranks,
                "policy": self.policy,
            }
            | ({"comm_dtype": call.comm_dtype} if call.comm_dtype else {})
            | ({"written_once": [int(payload) for payload in call.written_once]} if call.written_once else {})
            | ({"op": call.op.as_dict()} if call.op != ATTENTION else {})
        )

    def __repr__(self) -> str:
        tables = ", ".join(
            f"{name}: {num_rows(table.tasks)} tasks, {num_rows(table.moves)} moves, {table.steps} steps"
            for name, table in (("forward", self.forward), ("backward", self.backward))
        )
        return f"Plan({self.strategy}, {self.call.ranks} ranks, {self.call.mask.n} tokens; {tables}; backward {self.policy})"


def task_bands(mask: Mask, tasks: Columns) -> Ints:
    """Return the mask piece of each task, cut to the task's rectangle, (M, 10)."""
    return clip(mask.pieces[tasks["piece"]], tasks["q0"], tasks["q1"], tasks["k0"], tasks["k1"])


def task_areas(call: Call, tasks: Columns, bands: Ints | None = None) -> Ints:
    """Return the cells x query heads of each task, as Python integers if their sum overflows int64.

    bands: the result of `task_bands`, if known. For a recurrence, return tokens x heads of each task's segment.
    """
    if call.op.is_recurrent:
        return (tasks["k1"] - tasks["q0"]) * (tasks["h1"] - tasks["h0"])
    return cell_counts(call, tasks, bands)


def cell_counts(call: Call, tasks: Columns, bands: Ints | None = None) -> Ints:
    """Return the allowed cells x heads of each task's rectangle, for any op."""
    heads = call.heads if call.mask.heads is None else 1
    exact = np.int64 if call.mask.area() * heads < 1 << 62 else object
    bands = task_bands(call.mask, tasks) if bands is None else bands
    return areas(bands).astype(exact) * (tasks["h1"] - tasks["h0"])


def task_token_ranges(call: Call, payload: Payload, tasks: Columns) -> Columns:
    """Return the tokens [t0, t1) and heads [h0, h1) of a payload that each task reads or adds to."""
    heads = {"h0": tasks["h0"], "h1": tasks["h1"]}
    if payload.name in call.op.shared_payloads:
        heads = {"h0": tasks["h0"] // call.gqa_group_size, "h1": -(-tasks["h1"] // call.gqa_group_size)}
    if call.op.is_recurrent:
        return _segments(payload, tasks) | heads
    if payload in KEY_PAYLOADS:
        return {"t0": tasks["k0"], "t1": tasks["k1"], **heads}
    return {"t0": tasks["q0"], "t1": tasks["q1"], **heads}


def has_rows_and_keys(tasks: Columns) -> np.ndarray:
    """Return which tasks of a recurrence compute outputs or gradients; the others only produce a state."""
    return (tasks["q0"] < tasks["q1"]) & (tasks["k0"] < tasks["k1"])


def move_bytes(call: Call, moves: Columns, in_memory: bool = False) -> Ints:
    """Return the bytes of each move, as sent or as held in the source's memory."""
    per_cell = np.array([call.token_head_bytes(payload, in_memory) for payload in Payload], np.int64)
    heads = moves["h1"] - moves["h0"]
    size = (moves["t1"] - moves["t0"]) * heads * per_cell[moves["payload"]]
    for payload in STATE_PAYLOADS if call.op.is_recurrent else ():
        prefix = call.is_prefix(payload, moves["t0"], moves["t1"])
        per_head = np.where(prefix, call.state_bytes(True), call.state_bytes(False))
        size = np.where(moves["payload"] == payload, heads * per_head, size)
    return size


def nonempty_bands(bands: Ints) -> np.ndarray:
    """Return which tightened bands contain a cell, (M,)."""
    return (bands[:, Q0] < bands[:, Q1]) & (bands[:, K0] < bands[:, K1])


def _segments(payload: Payload, tasks: Columns) -> Columns:
    """Return the tokens of a payload that each task of a recurrence reads or writes; an empty range if it uses no token."""
    used = np.ones(num_rows(tasks), bool)
    if payload in REDUCED_PAYLOADS:
        used = has_rows_and_keys(tasks)
    elif payload == Payload.dO:
        used = tasks["q0"] < tasks["q1"]
    return {"t0": tasks["q0"], "t1": np.where(used, tasks["k1"], tasks["q0"])}


def _canonical(names: Sequence[str], rows: Mapping[str, Ints]) -> Columns:
    if set(rows) != set(names):
        raise DistattnError(f"a table needs exactly the columns {', '.join(names)}; got {', '.join(rows)}.")
    if len({len(column) for column in rows.values()}) != 1:
        raise DistattnError(f"columns of different lengths: { ({name: len(rows[name]) for name in names}) }.")
    order = lexicographic_argsort(*(np.asarray(rows[name], np.int64) for name in names))
    out = {name: np.asarray(rows[name], np.int64)[order] for name in names}
    for column in out.values():
        column.setflags(write=False)
    return out


def _unpack(head: dict, arrays: dict[str, Ints]) -> Plan:
    def table(direction: str) -> Table:
        return Table(
            {name: arrays[f"{direction}.tasks.{name}"] for name in TASK_COLUMNS},
            {name: arrays[f"{direction}.moves.{name}"] for name in MOVE_COLUMNS},
            str(head.get("labels", {}).get(direction, "")),
        )

    lengths = np.diff(arrays["layout.ends"], prepend=0)
    rank, t0, t1, row = (arrays[f"layout.{name}"] for name in ("rank", "t0", "t1", "row"))
    order = np.lexsort((row, rank))
    layout = Layout(lengths.tolist(), head["ranks"], rank[order], t0[order], t1[order])
    shape = {name: head[name] for name in ("heads", "kv_heads", "head_dim", "v_head_dim", "dtype")}
    by_head = (arrays["mask.piece_heads"], head["heads"]) if "mask.piece_heads" in arrays else ()
    once = tuple(Payload(number) for number in head.get("written_once", ()))
    mask = Mask(arrays["mask.pieces"], head["n"], *by_head)
    op = Op(**head["op"]) if "op" in head else ATTENTION
    call = Call(mask, layout, **shape, comm_dtype=head.get("comm_dtype", ""), written_once=once, op=op)
    return Plan(call, table("forward"), table("backward"), head["policy"], head["strategy"])
