"""Inputs of recurrences, and what the recurrence makes of them token by token, in fp64."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.ir.op import OPS, Op
from distattn.kernels.recurrence.tokens import RecurrenceTokens, token_by_token

RECURRENT = [name for name, op in OPS.items() if op.is_recurrent]


class RecurrenceCase(NamedTuple):
    """Tokens, states that enter, and gradients of outputs and of states that leave."""

    x: RecurrenceTokens
    initial: Tensor
    do: Tensor
    dfinal: Tensor
    lengths: tuple[int, ...]

    @property
    def stretches(self) -> list[tuple[int, int]]:
        ends = list(itertools.accumulate(self.lengths, initial=0))
        return list(itertools.pairwise(ends))


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
    """decay: "usual", "near 1", "near 0", "mixed" (most near 1, some that nothing survives)."""
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
    """Outputs, final states and all gradients, by autograd through the definition."""
    leaves = {name: value.clone().requires_grad_() for name, value in case.x.by_token().items()}
    initial = case.initial.clone().requires_grad_()
    o, final = token_by_token(case.x._replace(**leaves), case.stretches, initial)
    *found, dinitial = torch.autograd.grad([o, final], [*leaves.values(), initial], [case.do, case.dfinal])
    dx = case.x._replace(**dict(zip(leaves, found, strict=True)))
    return RecurrenceResult(o.detach(), final.detach(), dx, dinitial)


def assert_same(got: RecurrenceResult, wanted: RecurrenceResult, tolerance: float) -> None:
    """Relative to the largest number of each tensor."""
    pairs = [("o", got.o, wanted.o), ("final", got.final, wanted.final), ("dinitial", got.dinitial, wanted.dinitial)]
    pairs += [(f"d{name}", got.dx.by_token()[name], value) for name, value in wanted.dx.by_token().items()]
    for name, a, b in pairs:
        # a tensor of zeros: what a state of nothing but underflow has for a gradient
        scale = max(float(b.abs().max()), 1e-30) if b.numel() else 1.0
        error = float((a.double() - b).abs().max()) / scale if b.numel() else 0.0
        assert error <= tolerance, f"{name} is off by {error:.2e}, more than {tolerance:.0e}"
