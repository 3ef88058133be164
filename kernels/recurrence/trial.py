"""Trials of recurrence kernels: the functions that tasks call are compared with the chunked kernel in fp64, then timed."""

# N segments, T tokens, H heads, G heads of queries and keys, K key dim, V value dim

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.ir.op import Op
from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.recurrence import chunked
from distattn.kernels.recurrence.tokens import RecurrenceTokens
from distattn.kernels.spec import KernelRequirements
from distattn.kernels.trials import Trial, median_seconds, try_each
from distattn.kernels.triton.launch import schedule_to_device

# segment lengths, and maximum numbers of heads, each for the comparison and for timing
_COMPARED, _TIMED = (150, 1, 64, 33), (2048, 1500, 548)
_HEADS_COMPARED, _HEADS_TIMED = 4, 32
_SEED = 1234


class RecurrenceInputs(NamedTuple):
    """The inputs of a trial: tokens, initial states, gradients of outputs and of final states, segments and requirements."""

    x: RecurrenceTokens
    state: Tensor
    do: Tensor
    dstate: Tensor
    segments: tuple[tuple[int, int], ...]
    requirements: KernelRequirements

    def schedule_of(self, kernel: Any) -> Any:
        """Return the kernel's schedule for the segments, on the tokens' device."""
        return schedule_to_device(kernel.prepare(self.segments, self.requirements), self.state.device)

    @staticmethod
    def random(
        lengths: Sequence[int], heads: int, key_heads: int, requirements: KernelRequirements
    ) -> RecurrenceInputs:
        """Return random inputs like those of a trained layer: unit-length keys, and decays over a few to thousands of tokens."""
        op, device, dtype = requirements.op, requirements.device, requirements.dtype
        generator = torch.Generator(device).manual_seed(_SEED)
        tokens, key_dim, value_dim = sum(lengths), requirements.head_dim, requirements.v_head_dim

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        q, k = (F.normalize(normal(tokens, key_heads, key_dim), dim=-1).to(dtype) for _ in range(2))
        v, do = (normal(tokens, heads, value_dim).to(dtype) for _ in range(2))
        wide = accumulation_dtype(dtype)
        g = None if op.decay == "none" else -F.softplus(2 * normal(*_shape_of_decays(op, tokens, heads, key_dim)) - 2)
        beta = normal(tokens, heads).sigmoid().to(dtype) if op.delta else None
        state, dstate = (normal(len(lengths), heads, key_dim, value_dim).to(wide) for _ in range(2))
        ends = list(itertools.accumulate(lengths, initial=0))
        x = RecurrenceTokens(q, k, v, None if g is None else g.to(wide), beta)
        return RecurrenceInputs(x, state, do, dstate, tuple(itertools.pairwise(ends)), requirements)


def try_recurrence(
    names: Sequence[str],
    requirements: KernelRequirements,
    heads: int,
    key_heads: int,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Trial]:
    """Try kernels on calls of a recurrence with `heads` heads of values and `key_heads` heads of queries and keys."""
    group = heads // key_heads

    def inputs(lengths: Sequence[int], most: int) -> RecurrenceInputs:
        count = min(max(most // group, 1), key_heads)
        return RecurrenceInputs.random(lengths, count * group, count, requirements)

    return try_each(
        names,
        requirements,
        lambda kernel: differences(kernel, inputs(_COMPARED, _HEADS_COMPARED)),
        lambda kernel: _seconds(kernel, inputs(_TIMED, _HEADS_TIMED)),
        report,
    )


def differences(kernel: Any, inputs: RecurrenceInputs) -> list[float]:
    """Return the relative difference (Frobenius norm) between each of the kernel's results and the chunked kernel's in fp64."""
    exact = RecurrenceInputs(
        x=inputs.x._replace(**{name: y.double() for name, y in inputs.x.present().items()}),
        state=inputs.state.double(),
        do=inputs.do.double(),
        dstate=inputs.dstate.double(),
        segments=inputs.segments,
        requirements=inputs.requirements._replace(dtype=torch.float64),
    )
    pairs = zip(_results(kernel, inputs), _results(chunked, exact), strict=True)
    return [float((a.double() - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs]


def _results(kernel: Any, inputs: RecurrenceInputs) -> list[Tensor]:
    x, state, do, dstate = inputs[:4]
    schedule = inputs.schedule_of(kernel)
    dx, dentering = kernel.backward(x, schedule, state, do, dstate)
    results = [*kernel.forward(x, schedule, state), *dx.by_token().values(), dentering]
    return results + [
        *kernel.states(x, schedule, state, True),
        *kernel.gradient_states(x, schedule, do, dstate, True),
    ]


def _seconds(kernel: Any, inputs: RecurrenceInputs) -> float:
    """Return the median seconds of a forward and backward pass."""
    x, state, do, dstate = inputs[:4]
    schedule = inputs.schedule_of(kernel)

    def run() -> Any:
        return kernel.forward(x, schedule, state), kernel.backward(x, schedule, state, do, dstate)

    return median_seconds(run, state.device)


def _shape_of_decays(op: Op, tokens: int, heads: int, key_dim: int) -> tuple[int, ...]:
    return {"head": (heads,), "token": (tokens, heads), "channel": (tokens, heads, key_dim)}[op.decay]
