"""Operands of instructions (addresses, registers, constants), and the outcomes that instructions return to the
scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import MachineError, UnknownOperationError
from .lanes import LANES, Mask, reader
from .parse import Address, Immediate, Operand, Register, Vector

if TYPE_CHECKING:
    from .machine import Warp


class Wait(NamedTuple):
    """A warp's wait: a function that returns whether the wait is over, and a function that describes it."""

    ready: Callable[[], bool]
    describe: Callable[[], str]


# EXIT: the warp ends. PAUSE: the warp continues, but others may run first
EXIT, PAUSE = object(), object()
LANE_NUMBERS = np.arange(LANES)


def active_lanes(mask: Mask) -> np.ndarray:
    """Return the indices of the lanes that take part."""
    return LANE_NUMBERS if mask is None else np.flatnonzero(mask)


def addresses_of(operand: Operand) -> Callable[[Warp], np.ndarray]:
    """Return a function that computes each lane's address."""
    assert isinstance(operand, Address)
    kind = operand.base.width if isinstance(operand.base, Register) else "b32"
    base, offset = reader(operand.base, kind), operand.offset

    def get(warp: Warp) -> np.ndarray:
        return np.broadcast_to(np.asarray(base(warp)).astype(np.int64) + offset, LANES)

    return get


def same_in_all(values: Any, mask: Mask = None) -> int:
    """Return the value that all active lanes share. Raise MachineError if their values differ."""
    values = np.broadcast_to(values, LANES)[active_lanes(mask)]
    if (values != values[0]).any():
        raise MachineError("the lanes of the warp do not agree on an operand that must be the same in all")
    return int(values[0])


def parts_of(operand: Operand) -> tuple[Operand, ...]:
    """Return the operands in braces, or a tuple of the single operand."""
    return operand.parts if isinstance(operand, Vector) else (operand,)


def register_numbers(operand: Operand) -> tuple[int, ...]:
    """Return the numbers of the registers in braces."""
    return tuple(part.number for part in parts_of(operand) if isinstance(part, Register))


def constant(operand: Operand) -> int:
    """Return the value of an operand that must be an immediate."""
    if not isinstance(operand, Immediate):
        raise UnknownOperationError("a constant is expected here")
    return operand.bits
