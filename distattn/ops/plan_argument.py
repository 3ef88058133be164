"""The plan argument of all ops: what is wrong with it is said in the same sentences, and a plan is made ready to run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from distattn.ir.errors import DistattnError
from distattn.ir.plan import Plan
from distattn.ops.current_micro_batch import current_micro_batch
from distattn.ops.executable import Executable, prepare


def check_flag(name: str, value: object) -> None:
    """Raise DistattnError where what is to be True or False is anything else."""
    if not isinstance(value, bool):
        raise DistattnError(f"{name} is True or False, not a {type(value).__name__}.")


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
    """The executable that an op's plan argument is, or one prepared for this call, which is then collective.

    op: the name of the public function, for errors. device, kernel and modifiers are for `prepare`. can_interleave: whether the
    op may be called where micro-batches take turns.

    Raises what `prepare` raises, and DistattnError for what is no plan, for an executable beside a group or a kernel, for a plan
    inside torch.compile, and where micro-batches take turns that the op cannot take.
    """
    if not isinstance(plan, (Plan, Executable)):
        raise DistattnError(f"plan is what make_plan or prepare returned, not a {type(plan).__name__}.")
    if not can_interleave and current_micro_batch() is not None:
        raise DistattnError(f"{op} cannot take turns with other micro-batches yet; leave OverlapSchedule out.")
    if isinstance(plan, Executable):
        if group is not None or kernel is not None:
            raise DistattnError("an executable knows its group and kernel; give them to prepare instead.")
        return plan
    if torch.compiler.is_compiling():
        raise DistattnError(f"inside torch.compile, {op} takes prepare(plan, group) instead of a plan.")
    return prepare(plan, group, kernel=kernel, device=device, modifiers=modifiers)
