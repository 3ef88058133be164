"""A program's lists, copied to the device that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distattn.ir.plan import Payload
from distattn.kernels.devices import current_device, has_streams
from distattn.parallel.runtime.program import KernelLaunch, Message, Program, ProgramStep
from distattn.parallel.runtime.streams import Handover
from distattn.parallel.runtime.views import View

# bytes that lists on the device are aligned to
_ALIGNMENT = 16


def on_device(program: Program, device: torch.device) -> Program:
    """Return the same program with its lists on the device: one copy, from pinned memory where that exists.

    The copy is in the current stream of this thread, which need not be the one that runs the program: whoever does joins
    `Program.uploaded`.
    """
    if device.type == "cpu":
        return program
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        # steps share lists: each is copied once
        found[id(tensor)] = tensor
        return tensor

    with_tensors(program, note)
    if not found:
        return program
    streams = has_streams(device)
    # a program that is first prepared in inference mode serves training, too: what autograd saves must be no inference tensor.
    # The current device is a thread's own, and pinned memory belongs to it.
    with torch.inference_mode(False), current_device(device):
        offsets = np.cumsum([0, *(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in found.values())]).tolist()
        packed = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=streams)
        for tensor, at in zip(found.values(), offsets, strict=False):
            # numpy gives empty lists strides that bytes cannot be viewed by
            packed[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        copied = packed.to(device, non_blocking=True)
        uploaded = Handover.of([copied])
        on_it = {
            name: copied[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for (name, tensor), at in zip(found.items(), offsets, strict=False)
        }
    return replace(with_tensors(program, lambda tensor: on_it[id(tensor)]), uploaded=uploaded)


def with_tensors(program: Program, change: Callable[[Tensor], Tensor]) -> Program:
    """Return the program with every tensor in its views and kernel schedules replaced."""

    def view(old: View) -> View:
        slices = [piece._replace(rows=changed(piece.rows), view_rows=changed(piece.view_rows)) for piece in old.slices]
        return old._replace(slices=slices)

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if not isinstance(value, tuple):
            return value
        # tuples of kernels, named or not, within each other
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
            [(key, view(part)) for key, part in own] for own in (old.own_copies, old.own_results)
        )
        changes: dict[str, Any] = dict(sends=messages(old.sends), receives=messages(old.receives))
        changes |= dict(packed_sends=changed(old.packed_sends), packed_receives=changed(old.packed_receives))
        return replace(old, launches=launches, own_copies=own_copies, own_results=own_results, **changes)

    passes = [[step(part) for part in steps] for steps in (program.forward, program.backward)]
    return replace(program, forward=passes[0], backward=passes[1])
