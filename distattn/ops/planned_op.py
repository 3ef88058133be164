"""PyTorch operators that run a plan: their registration, and the code around the passes that they share.

An operator takes tensors, the handle of an executable, and numbers. Its backward pass is an operator, too, without a gradient.
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

# Operators that run a plan send messages and wait for events of other streams. Inductor partitions a graph at operators with this
# tag, so that torch.compile(mode="reduce-overhead") does not capture them (torch/_inductor/scheduler.py, should_partition).
NOT_IN_CUDA_GRAPHS = (torch.Tag.cudagraph_unsafe,)
_HERE = nullcontext()
# operators' functions, keyed by name; autograd's functions, which save tensors and compute gradients, keyed by prefix
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
AUTOGRAD: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {}


class PlannedPass(NamedTuple):
    """The forward or backward pass of an operator. tensors, numbers, results: its arguments and results, as in a PyTorch schema.

    run: takes the executable, the tensors and the numbers; returns a generator that pauses while messages travel, and returns the
    operator's results at its end. fake: takes all arguments; returns tensors with the results' shapes and dtypes.
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
    """Register distattn::PREFIXforward, which is differentiable, and distattn::PREFIXbackward.

    subject: the subject of the error that refuses second derivatives. gradients: takes the context, the saved tensors and the
    gradients of all outputs; returns the gradients of all tensors that the forward pass takes. saved_outputs: the outputs of the
    forward pass to save after its tensors. fixed_outputs: the outputs without a gradient. The last output contains the tensors
    kept for the backward pass.
    """
    names, tensors = (f"distattn::{prefix}forward", f"distattn::{prefix}backward"), len(forward.tensors)
    # after the tensors come a handle and, in the forward pass, the number of elements kept for the backward pass
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
        # keep the executable alive until the backward pass has run; under torch.compile, the caller has to do that
        ctx.executable = EXECUTABLES.by_handle(ctx.plan) if type(ctx.plan) is int else None

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        # messages of this pass belong to the layer that the forward pass belonged to
        set_layer(ctx.layer)
        # read saved_tensors only once, because under a checkpoint reading them triggers the recomputation
        of_tensors = gradients(ctx, ctx.saved_tensors, *grads)
        return *of_tensors, None, None, *(None for _ in ctx.numbers)

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise DistattnError(f"{subject} has no second derivative: a gradient of its gradients was asked for.")

    AUTOGRAD[prefix] = save, differentiate
    torch.library.register_autograd(names[1], refuse)
    torch.library.register_autograd(names[0], differentiate, setup_context=save)


def _runner(run: Callable[..., PausableRun[Any]], tensors: int, facts: int) -> Callable[..., Any]:
    """Return the function of an operator. facts: the number of its arguments between the tensors and the numbers."""

    def run_plan(*arguments: Any) -> Any:
        device = arguments[0].device
        with current_device(device) if has_streams(device) else _HERE:
            executable = EXECUTABLES.by_handle(arguments[tensors])
            steps = run(executable, *arguments[:tensors], *arguments[tensors + facts :])
            # `run_to_completion`, written out to save a stack frame on the way to every kernel
            while True:
                try:
                    next(steps)
                except StopIteration as stop:
                    return stop.value

    return run_plan
