"""The bytes that a recurrence's launch allocates on the device, counted by running the kernel's own functions on meta tensors.

Recurrence kernels allocate tensors of many sizes, most of them inside PyTorch, so a formula for the total could become outdated.
"""

# T tokens, N segments, H value heads, G query and key heads, K key dim, V value dim

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from distattn.ir.plan import Payload
from distattn.kernels.meta_bytes import META, MetaBytes
from distattn.kernels.recurrence.tokens import RecurrenceTokens
from distattn.kernels.triton.launch import schedule_to_device
from distattn.parallel.runtime.lowering.segment_launches import SegmentKind
from distattn.parallel.runtime.program import KernelLaunch, Program


def recurrence_workspace(program: Program, direction: str, kernel: Any) -> int:
    """Return the most bytes that any launch of a pass allocates: its states, the kernel's tensors, and the results.

    kernel: a module with the functions of `kernels.recurrence.chunked`. Return 0 for a kernel that does not accept meta
    tensors.
    """
    if not getattr(kernel, "RUNS_ON_META", False):
        return 0
    is_forward = direction == "forward"
    states = program.forward_states if is_forward else program.backward_states
    assert states is not None, "a program of a recurrence has states"
    steps = program.forward if is_forward else program.backward
    # count launches of equal sizes only once
    bytes_of: dict[Any, int] = {}
    for launch in (launch for step in steps for launch in step.launches):
        tasks = [states.tasks[number] for number in launch.schedule.tasks]
        is_prefix = all(task.is_prefix for task in tasks)
        lists = tuple(_sizes(launch.schedule.segments))
        key = launch.schedule.kind, _shape(program, launch), is_prefix, len(tasks), lists
        if key not in bytes_of:
            bytes_of[key] = _launch_bytes(program, is_forward, launch, is_prefix, kernel)
    return max(bytes_of.values(), default=0)


def _shape(program: Program, launch: KernelLaunch) -> tuple[int, int, int, bool]:
    """Return T, H and G of a launch, and whether it covers all value heads of each of its query and key heads."""
    heads, group = launch.heads, program.call.gqa_group_size
    is_even = heads.start % group == 0 and heads.stop % group == 0
    return launch.operands[Payload.KV].rows, heads.stop - heads.start, launch.operands[Payload.Q].heads, is_even


def _sizes(schedule: Any) -> Iterator[Any]:
    """Yield the shapes of the tensors in a kernel's schedule, and its non-tensor values unchanged."""
    if isinstance(schedule, Tensor):
        yield tuple(schedule.shape)
    elif isinstance(schedule, tuple):
        for part in schedule:
            yield from _sizes(part)
    else:
        yield schedule


def _launch_bytes(program: Program, is_forward: bool, launch: KernelLaunch, is_prefix: bool, kernel: Any) -> int:
    """Return the bytes that a launch allocates besides its operands. is_prefix: the launch's results depend on no earlier
    state."""
    call, kind = program.call, launch.schedule.kind
    narrow, wide = getattr(torch, call.dtype), getattr(torch, call.accumulation_dtype)
    rows, heads, shared_heads, is_even = _shape(program, launch)

    def tensor(*shape: int, dtype: torch.dtype = narrow) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    def states() -> Tensor:
        return tensor(len(launch.schedule.tasks), heads, call.head_dim, call.v_head_dim, dtype=wide)

    with torch.inference_mode(False), torch.no_grad(), MetaBytes() as counted:
        q, k = (tensor(rows, shared_heads, call.head_dim) for _ in range(2))
        v, do = (tensor(rows, heads, call.v_head_dim) for _ in range(2))
        shape_of_g = {"none": None, "head": (heads,), "token": (rows, heads), "channel": (rows, heads, call.head_dim)}
        shape = shape_of_g[call.op.decay]
        g = None if shape is None else tensor(*shape, dtype=wide)
        beta = tensor(rows, heads) if call.op.delta else None
        lists = schedule_to_device(launch.schedule.segments, META)
        input_bytes = counted.peak = counted.alive
        # if the launch splits a group of heads that share queries and keys, each value head gets its own copy of them
        queries_and_keys = (q, k) if is_even else tuple(tensor(rows, heads, call.head_dim) for _ in range(2))
        x, entering = RecurrenceTokens(queries_and_keys[0], queries_and_keys[1], v, g, beta), states()
        if kind is SegmentKind.STATE:
            kernel.states(x, lists, entering, not is_prefix)
        elif kind is SegmentKind.GRADIENT_STATE:
            kernel.gradient_states(x, lists, do, entering, not is_prefix)
        elif is_forward:
            kernel.forward(x, lists, entering)
        else:
            dleaving = states()
            dx, dentering = kernel.backward(x, lists, entering, do, dleaving)
            # the gradients of queries and keys are summed over the heads that share them
            sums = [] if is_even else [tensor(rows, shared_heads, call.head_dim, dtype=wide) for _ in range(2)]
            del dx, dentering, dleaving, sums
        return counted.peak - input_bytes
