"""The plan argument of all ops: common errors, and the preparation of plans."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from distattn.ir.errors import DistattnError
from distattn.ir.plan import Plan
from distattn.ops.current_micro_batch import current_micro_batch
from distattn.ops.executable import Executable, prepare


def check_flag(name: str, value: object) -> None:
    """Raise DistattnError if a flag is not True or False."""
    if not isinstance(value, bool):
        raise DistattnError(f"{name} must be True or False, not a {type(value).__name__}.")


def executable_of(
    plan: Plan | Executable,
    group: dist.ProcessGroup | None,
    op: str,
    device: torch.device,
    *,
    kernel: str | None = None,
    modifiers: Sequence[str] = (),
    can_interleave: bool = False,
) -> Executable:
    """Return an op's plan argument if it is an executable; otherwise prepare the plan, which is a collective call.

    op: the name of the public function, for errors. device, kernel, modifiers: see `prepare`. can_interleave: True if the op may
    be called while micro-batches take turns.

    Raise the errors of `prepare`, and DistattnError for objects that are neither plans nor executables, for an executable
    together with a group or a kernel, for a plan inside torch.compile, and for an op that cannot take turns with other
    micro-batches.
    """
    if not isinstance(plan, (Plan, Executable)):
        raise DistattnError(f"plan must be a result of make_plan or prepare, not a {type(plan).__name__}.")
    if not can_interleave and current_micro_batch() is not None:
        raise DistattnError(f"{op} cannot take turns with other micro-batches yet; leave OverlapSchedule out.")
    if isinstance(plan, Executable):
        if group is not None or kernel is not None:
            raise DistattnError("an executable has its group and kernel; pass them to prepare instead.")
        return plan
    if torch.compiler.is_compiling():
        raise DistattnError(f"inside torch.compile, {op} takes prepare(plan, group) instead of a plan.")
    return prepare(plan, group, kernel=kernel, device=device, modifiers=modifiers)
