"""Operators of PyTorch that run a plan: what all of them do around their passes is written once, here.

An operator takes tensors, the handle of an executable, and numbers. Its backward pass is an operator, too, which has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.ir.errors import DistattnError
from distattn.kernels.devices import current_device, has_streams
from distattn.ops.executable import EXECUTABLES
from distattn.parallel.runtime.execution.execute import PausableRun
from distattn.supervision.heartbeats import current_layer, set_layer

# Tags of operators that run a plan: they send messages, and wait for events of other streams. Inductor partitions a graph at such
# operators, so that torch.compile(mode="reduce-overhead") does not capture them (torch/_inductor/scheduler.py, should_partition).
NOT_IN_CUDA_GRAPHS = (torch.Tag.cudagraph_unsafe,)
_HERE = nullcontext()
# the functions of operators, by name; and those that save for the backward pass and compute gradients, by prefix
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
AUTOGRAD: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {}


class PlannedPass(NamedTuple):
    """One direction of an operator. tensors, numbers: its arguments, and its results, as a schema of PyTorch has them.

    run: gets the executable, the tensors and the numbers; returns a run whose result is that of the operator. fake: gets all
    arguments, and returns tensors of the results' shapes and dtypes.
    """

    tensors: tuple[str, ...]
    numbers: tuple[str, ...]
    results: str
    run: Callable[..., PausableRun[Any]]
    fake: Callable[..., Any]


def register_planned_op(
    prefix: str,
    subject: str,
    forward: PlannedPass,
    backward: PlannedPass,
    gradients: Callable[..., Any],
    *,
    saved_outputs: slice = slice(-1, None),
    fixed_outputs: slice = slice(-1, None),
) -> None:
    """Register distattn::PREFIXforward, differentiable, and distattn::PREFIXbackward.

    subject: of the sentence that refuses second derivatives. gradients: gets the context, the tensors that were saved and the
    gradients of all outputs; returns the gradients of all tensors that the forward pass takes. saved_outputs: of the forward
    pass, saved behind its tensors; fixed_outputs: those without a gradient. The last output is what is kept for the backward.
    """
    names, tensors = (f"distattn::{prefix}forward", f"distattn::{prefix}backward"), len(forward.tensors)
    # a handle follows the tensors, and in the forward pass how much is kept for the backward
    facts = ("SymInt plan", "SymInt kept_elements"), ("SymInt plan",)
    for name, one_pass, between in zip(names, (forward, backward), facts, strict=True):
        arguments = ", ".join((*one_pass.tensors, *between, *one_pass.numbers))
        torch.library.define(name, f"({arguments}) -> ({one_pass.results})", tags=NOT_IN_CUDA_GRAPHS)
        IMPLEMENTATIONS[name] = _runner(one_pass.run, len(one_pass.tensors), len(between))
        torch.library.impl(name, "CompositeExplicitAutograd", IMPLEMENTATIONS[name])
        torch.library.register_fake(name, one_pass.fake)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[fixed_outputs])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors], *output[saved_outputs])
        ctx.plan, ctx.numbers, ctx.layer = inputs[tensors], inputs[tensors + 2 :], current_layer()
        # the executable outlives its plan until the backward has run; under torch.compile the caller holds it
        ctx.executable = EXECUTABLES.by_handle(ctx.plan) if type(ctx.plan) is int else None

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        # messages of this pass belong to the layer of the forward pass, or to none
        set_layer(ctx.layer)
        # once: a checkpoint recomputes them then
        of_tensors = gradients(ctx, ctx.saved_tensors, *grads)
        return *of_tensors, None, None, *(None for _ in ctx.numbers)

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise DistattnError(f"{subject} has no second derivative: a gradient of its gradients was asked for.")

    AUTOGRAD[prefix] = save, differentiate
    torch.library.register_autograd(names[1], refuse)
    torch.library.register_autograd(names[0], differentiate, setup_context=save)


def _runner(run: Callable[..., PausableRun[Any]], tensors: int, facts: int) -> Callable[..., Any]:
    """Return the function of an operator, which runs on the device of its first tensor. facts: arguments behind the tensors."""

    def run_plan(*arguments: Any) -> Any:
        device = arguments[0].device
        with current_device(device) if has_streams(device) else _HERE:
            executable = EXECUTABLES.by_handle(arguments[tensors])
            steps = run(executable, *arguments[:tensors], *arguments[tensors + facts :])
            # as `run_to_completion` does, with one frame less on the way to every kernel
            while True:
                try:
                    next(steps)
                except StopIteration as stop:
                    return stop.value

    return run_plan
