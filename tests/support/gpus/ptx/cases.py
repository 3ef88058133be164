"""Small calls of the kernels, identical in the process that compiles them and in the process that interprets them."""

from __future__ import annotations

from typing import NamedTuple
from unittest import mock

import torch
from oracle import Inputs, random_inputs

from distattn.ir.mask import Mask
from distattn.kernels.gluon import attention as gluon_attention
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.spec import KernelRequirements, ScoreMod
from distattn.kernels.triton import attention as triton_attention
from distattn.kernels.triton.launch import TritonLaunch

HOPPER = 90
CPU = torch.device("cpu")


class Case(NamedTuple):
    """A call: its kernels and its shape."""

    # "forward", "merge" (the forward kernel, merging into earlier results), "backward" or "split" (plain Triton's
    # backward kernels)
    kernels: str
    dtype: str = "bfloat16"
    dim: int = 64
    heads: int = 2
    kv_heads: int = 1
    modifiers: bool = False
    # some tiles of queries and keys need no mask, some do, and some extend past the tensors' ends
    tokens: int = 340
    # lengths of packed documents, or empty for one sequence
    documents: tuple[int, ...] = ()
    # the GPU's number of multiprocessors; if it is small, a program of the forward kernel processes several tiles
    multiprocessors: int = 132

    def __str__(self) -> str:
        documents, modifiers = " documents" * bool(self.documents), " modifiers" * self.modifiers
        few = f" {self.multiprocessors} multiprocessors" * (self.multiprocessors < 132)
        heads = f"{self.heads}:{self.kv_heads} heads"
        return f"{self.kernels} {self.dtype} {self.dim} {heads} {self.tokens} tokens{documents}{modifiers}{few}"

    @property
    def score(self) -> ScoreMod:
        """The score modifiers."""
        if not self.modifiers:
            return ScoreMod(0.25)
        return ScoreMod(0.25, 3.0, torch.arange(1, self.heads + 1, dtype=torch.float32) / 64)

    @property
    def mask(self) -> Mask:
        """A causal mask, which tiles on the diagonal need and others do not. Document boundaries lie inside tiles."""
        return Mask.documents(list(self.documents)) if self.documents else Mask.causal(self.tokens)

    def inputs(self) -> Inputs:
        """Return queries, keys, values and dO, rounded to the call's dtype."""
        inputs = random_inputs(self.tokens, self.heads, self.kv_heads, self.dim)
        return Inputs(*(x.to(getattr(torch, self.dtype)) for x in inputs))


class Call(NamedTuple):
    """The launches of a case in order, and the tensors they fill."""

    launches: list[TritonLaunch]
    results: dict[str, torch.Tensor]


def forward_call(case: Case, into: tuple[torch.Tensor, torch.Tensor] | None = None) -> Call:
    """Return the forward call. into: o and lse to merge into; by default both are filled with NaN before the call."""
    q, k, v, _ = case.inputs()
    nothing = (
        torch.full((case.tokens, case.heads, case.dim), torch.nan),
        torch.full((case.tokens, case.heads), torch.nan),
    )
    o, lse = into or nothing
    schedule = gluon_attention.prepare(_cells(case), _requirements(case))
    # launch at most this many programs, however unevenly the tiles are spread over them
    schedule = schedule._replace(programs=min(len(schedule.forward.order) * case.heads, case.multiprocessors))
    launch = gluon_attention.forward_launch(q, k, v, o, lse, schedule, case.score, merge=case.kernels == "merge")
    return Call([launch], {"o": o, "lse": lse})


def backward_call(case: Case, lse: torch.Tensor, delta: torch.Tensor) -> Call:
    """Return the backward call for lse and rowsum(dO * O), both float32. All gradients accumulate into zeros."""
    q, k, v, do = case.inputs()
    grads = tuple(torch.zeros(x.shape) for x in (q, k, v))
    inputs = do, q, k, v, lse.contiguous(), delta.contiguous(), grads
    if case.kernels == "backward":
        schedule = gluon_attention.prepare(_cells(case), _requirements(case))
        launches = gluon_attention.backward_launch(*inputs, schedule, case.score, accumulate=True)
    else:
        # pretend to run on Hopper, where TMA fetches tiles
        tiles = triton_attention.tiles_for(_requirements(case), HOPPER)
        work = triton_attention.prepare_tiles(_cells(case), tiles, 132)
        with mock.patch.object(triton_attention, "compute_capability", lambda device: HOPPER):
            launches = triton_attention.backward_launch(*inputs, work, case.score, accumulate=(True, True))
    return Call(launches, dict(zip(("dq", "dk", "dv"), grads, strict=True)))


def any_call(case: Case) -> Call:
    """Return a call with arbitrary numbers, for compilation."""
    row_numbers = torch.zeros(case.tokens, case.heads), torch.zeros(case.tokens, case.heads)
    if case.kernels == "forward":
        return forward_call(case)
    if case.kernels == "merge":
        return forward_call(case, into=(torch.zeros(case.tokens, case.heads, case.dim), row_numbers[0]))
    return backward_call(case, *row_numbers)


def _cells(case: Case) -> LaunchMask:
    return LaunchMask.from_mask(case.mask, case.heads, case.kv_heads)


def _requirements(case: Case) -> KernelRequirements:
    return KernelRequirements(getattr(torch, case.dtype), case.dim, case.dim, CPU)
