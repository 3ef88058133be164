"""Upload a program's lists to the device that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distattn.ir.plan import Payload
from distattn.kernels.devices import current_device, has_streams
from distattn.parallel.runtime.communication.streams import Handover
from distattn.parallel.runtime.lowering.views import View
from distattn.parallel.runtime.program import KernelLaunch, Message, Program, ProgramStep

# alignment of index lists on the device, in bytes
_ALIGNMENT = 16


def copy_program_to_device(program: Program, device: torch.device) -> Program:
    """Return the program with its index lists on the device, uploaded in one copy, from pinned memory if available.

    The copy runs on this thread's current stream, which need not be the stream that runs the program, so join
    `Program.uploaded` before running it.
    """
    if device.type == "cpu":
        return program
    lists: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        # copy lists shared by several steps only once
        lists[id(tensor)] = tensor
        return tensor

    replace_tensors(program, note)
    if not lists:
        return program
    streams = has_streams(device)
    # A program first prepared in inference mode may also serve training, and autograd cannot save inference tensors. Pinned
    # memory belongs to the current device, which is set per thread.
    with torch.inference_mode(False), current_device(device):
        offsets = np.cumsum([0, *(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in lists.values())]).tolist()
        packed = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=streams)
        for tensor, begin in zip(lists.values(), offsets, strict=False):
            # copy in the list's own dtype: the strides of empty NumPy arrays do not allow a view as bytes
            packed[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        copied = packed.to(device, non_blocking=True)
        uploaded = Handover.of([copied])
        on_it = {
            name: copied[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for (name, tensor), begin in zip(lists.items(), offsets, strict=False)
        }
    return replace(replace_tensors(program, lambda tensor: on_it[id(tensor)]), uploaded=uploaded)


def replace_tensors(program: Program, change: Callable[[Tensor], Tensor]) -> Program:
    """Return the program with `change` applied to every tensor in its views and kernel schedules."""

    def view(old: View) -> View:
        slices = [piece._replace(rows=changed(piece.rows), view_rows=changed(piece.view_rows)) for piece in old.slices]
        return old._replace(slices=slices)

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if not isinstance(value, tuple):
            return value
        # kernel schedules are nested tuples, named or plain
        parts = map(changed, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)

    def messages(old: list[tuple[Payload, Message]]) -> list[tuple[Payload, Message]]:
        return [(payload, message._replace(view=view(message.view))) for payload, message in old]

    def launch(old: KernelLaunch) -> KernelLaunch:
        views = [{payload: view(part) for payload, part in parts.items()} for parts in (old.operands, old.results)]
        return old._replace(operands=views[0], results=views[1], schedule=changed(old.schedule))

    def step(old: ProgramStep) -> ProgramStep:
        launches = [launch(part) for part in old.launches]
        own_copies, own_results = (
            [(key, view(part)) for key, part in rows_of_step] for rows_of_step in (old.own_copies, old.own_results)
        )
        changes: dict[str, Any] = dict(sends=messages(old.sends), receives=messages(old.receives))
        changes |= dict(packed_sends=changed(old.packed_sends), packed_receives=changed(old.packed_receives))
        return replace(old, launches=launches, own_copies=own_copies, own_results=own_results, **changes)

    passes = [[step(part) for part in steps] for steps in (program.forward, program.backward)]
    turns = {payload: change(rows) for payload, rows in program.turns.items()}
    return replace(program, forward=passes[0], backward=passes[1], turns=turns)
