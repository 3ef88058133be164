"""Inputs of recurrences and their fp64 results, computed token by token."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from oracle import Record, RecordingTransport
from torch import Tensor

from distattn.ir.op import OPS, Op
from distattn.ir.plan import STATE_PAYLOADS, Plan
from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.recurrence import chunked
from distattn.kernels.recurrence.tokens import RecurrenceTokens, Segments, token_by_token
from distattn.kernels.spec import KernelRequirements
from distattn.parallel.analysis.verify import verify
from distattn.parallel.runtime.communication.transport import InProcessNetwork
from distattn.parallel.runtime.execution import execute_recurrence, state_pass
from distattn.parallel.runtime.execution.execute import run_in_lock_step
from distattn.parallel.runtime.execution.kept_tensors import KeptPlaces, kept_size
from distattn.parallel.runtime.execution.state_tensors import HeldStateTensors
from distattn.parallel.runtime.lowering.lower import lower
from distattn.parallel.runtime.program import Program

RECURRENT = [name for name, op in OPS.items() if op.kind == "recurrence"]


class RecurrenceCase(NamedTuple):
    """Tokens, initial states, and the gradients of the outputs and final states."""

    x: RecurrenceTokens
    initial: Tensor
    do: Tensor
    dfinal: Tensor
    lengths: tuple[int, ...]

    @property
    def segments(self) -> list[tuple[int, int]]:
        ends = list(itertools.accumulate(self.lengths, initial=0))
        return list(itertools.pairwise(ends))


def prepared(kernel: Any, op: Op, x: RecurrenceTokens, segments: Segments) -> Any:
    """Return the segments as prepared by a kernel."""
    needed = KernelRequirements(x.v.dtype, x.k.shape[2], x.v.shape[2], torch.device("cpu"), op=op)
    return kernel.prepare(segments, needed)


class RecurrenceResult(NamedTuple):
    o: Tensor
    final: Tensor
    dx: RecurrenceTokens
    dinitial: Tensor


def recurrence_case(
    op: Op,
    lengths: tuple[int, ...],
    heads: int = 4,
    key_heads: int = 2,
    key_dim: int = 3,
    value_dim: int = 5,
    seed: int = 0,
    decay: str = "usual",
) -> RecurrenceCase:
    """Return random inputs. decay: "usual", "near 1", "near 0" or "mixed" (mostly near 1, with a few gates that erase
    the state).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n = sum(lengths)
    q, k, v = normal(n, key_heads, key_dim), normal(n, key_heads, key_dim), normal(n, heads, value_dim)
    k = k / k.norm(dim=-1, keepdim=True)
    shape = {"none": None, "head": (heads,), "token": (n, heads), "channel": (n, heads, key_dim)}[op.decay]
    g = None
    if shape is not None:
        strength = {"usual": 1.0, "near 1": 1e-4, "near 0": 300.0, "mixed": 1e-3}[decay]
        g = -strength * normal(*shape).abs()
        if decay == "mixed":
            g = torch.where(normal(*shape) > 1.2, torch.full_like(g, -3e4), g)
    beta = 2 * normal(n, heads).sigmoid() if op.delta else None
    states = (len(lengths), heads, key_dim, value_dim)
    return RecurrenceCase(
        RecurrenceTokens(q, k, v, g, beta), normal(*states), normal(n, heads, value_dim), normal(*states), lengths
    )


def by_definition(case: RecurrenceCase) -> RecurrenceResult:
    """Compute outputs, final states and all gradients by autograd through the definition."""
    leaves = {name: value.clone().requires_grad_() for name, value in case.x.by_token().items()}
    initial = case.initial.clone().requires_grad_()
    o, final = token_by_token(case.x._replace(**leaves), case.segments, initial)
    *gradients, dinitial = torch.autograd.grad([o, final], [*leaves.values(), initial], [case.do, case.dfinal])
    dx = case.x._replace(**dict(zip(leaves, gradients, strict=True)))
    return RecurrenceResult(o.detach(), final.detach(), dx, dinitial)


def assert_same(got: RecurrenceResult, wanted: RecurrenceResult, tolerance: float) -> None:
    """Assert that the results are equal within `tolerance`, relative to each tensor's largest element."""
    pairs = [("o", got.o, wanted.o), ("final", got.final, wanted.final), ("dinitial", got.dinitial, wanted.dinitial)]
    pairs += [(f"d{name}", got.dx.by_token()[name], value) for name, value in wanted.dx.by_token().items()]
    for name, a, b in pairs:
        # a gradient is all zeros if its state underflows everywhere
        scale = max(float(b.abs().max()), 1e-30) if b.numel() else 1.0
        error = float((a.double() - b).abs().max()) / scale if b.numel() else 0.0
        assert error <= tolerance, f"{name} is off by {error:.2e}, more than {tolerance:.0e}"


def run_recurrence(
    plan: Plan, case: RecurrenceCase, record: Record | None = None, kernel: Any = chunked
) -> RecurrenceResult:
    """Run the forward and backward passes of all ranks of a plan in one process. Return the gathered results.

    Assert that the peak bytes and the kept bytes of states are those that the proof predicts.
    """
    layout, call = plan.call.layout, plan.call
    ranks, dtype = range(call.ranks), getattr(torch, call.dtype)
    record = Record() if record is None else record
    proof = verify(plan)
    needed = KernelRequirements(dtype, call.head_dim, call.v_head_dim, torch.device("cpu"), op=call.op)
    programs = [lower(plan, rank, lambda segments: kernel.prepare(segments, needed), proof) for rank in ranks]
    record.programs = programs
    local = [
        case.x._replace(
            **{name: layout.shard(_as(value, name, dtype), rank) for name, value in case.x.by_token().items()}
        )
        for rank in ranks
    ]
    do = [layout.shard(case.do.to(dtype), rank) for rank in ranks]

    def transports() -> list[Any]:
        network = InProcessNetwork()
        return [RecordingTransport(network.transport(rank), rank, record) for rank in ranks]

    # the live states of each rank in both passes
    held: list[HeldStateTensors] = []

    def noted(*arguments: Any) -> HeldStateTensors:
        held.append(HeldStateTensors(*arguments))
        return held[-1]

    runs = [
        execute_recurrence.forward(program, transport, kernel, x, case.initial)
        for program, transport, x in zip(programs, transports(), local, strict=True)
    ]
    with patch.object(state_pass, "HeldStateTensors", noted):
        ahead = run_in_lock_step(runs)
    runs = [
        execute_recurrence.backward(program, transport, kernel, do_, case.dfinal, x, case.initial, result.kept)
        for program, transport, x, do_, result in zip(programs, transports(), local, do, ahead, strict=True)
    ]
    with patch.object(state_pass, "HeldStateTensors", noted):
        back = run_in_lock_step(runs)
    kept = [_kept_bytes(program) for program in programs]
    assert kept == proof.kept.tolist()
    assert [len(result.kept) for result in ahead] == [kept_size(program) for program in programs]
    moved = np.concatenate([plan.forward.moves["payload"], plan.backward.moves["payload"]])
    if np.isin(moved, STATE_PAYLOADS).all():
        peaks = [states.peak_bytes for states in held]
        planned = [program.forward_states for program in programs] + [program.backward_states for program in programs]
        assert peaks == [states.peak_bytes for states in planned]
        assert kept == [program.forward_states.kept_bytes for program in programs]
        assert peaks == [*proof.forward_peak.tolist(), *proof.backward_peak.tolist()]
    dx = {name: layout.unshard([result.dx.by_token()[name] for result in back]) for name in case.x.by_token()}
    return RecurrenceResult(
        layout.unshard([result.o for result in ahead]),
        sum(result.final_MHKV for result in ahead),
        case.x._replace(**dx),
        sum(result.dinitial_MHKV for result in back),
    )


def _kept_bytes(program: Program) -> int:
    """Return the bytes that a program keeps for the backward pass, without alignment."""
    places = KeptPlaces.of(program)
    tensors = [*places.states, *(place for some in places.tokens.values() for place in some)]
    return sum(math.prod(place.shape) * place.dtype.itemsize for place in tensors)


def _as(value: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Convert `value` to `dtype`, or gates to the accumulation dtype."""
    return value.to(accumulation_dtype(dtype) if name == "g" else dtype)
