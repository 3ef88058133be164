"""Arithmetic of 32 lanes: the effect of one instruction on a warp's registers.

Integers wrap around. Shifts by the width or more give zero, or the sign. Division truncates. Single precision rounds
once, like the hardware, except that fma is computed in double precision, which in rare cases changes the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UnknownOperationError
from .parse import Immediate, Instruction, Operand, Register, Special, Symbol

if TYPE_CHECKING:
    from .machine import Warp

LANES = 32
# the lanes that take part, or None for all lanes
Mask = np.ndarray | None
Run = Callable[["Warp", Mask], Any]

DTYPES = {
    "pred": np.bool_, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip
_WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
_SMALLEST_NORMAL = np.float32(2.0**-126)


def reader(operand: Operand, kind: str) -> Callable[[Warp], Any]:
    """Return a function that reads an operand as type `kind`: one value per lane, or a scalar for all lanes."""
    if isinstance(operand, Register):
        number = operand.number
        return lambda warp: warp.registers[kind][number]
    if isinstance(operand, Immediate):
        if kind == "pred":
            value: Any = np.bool_(operand.bits != 0)
        else:
            dtype = np.dtype(DTYPES[kind])
            bits = operand.bits & ((1 << 8 * dtype.itemsize) - 1)
            value = np.array(bits, f"u{dtype.itemsize}").view(dtype)[()]
        return lambda warp: value
    if isinstance(operand, Symbol):
        name = operand.name
        return lambda warp: DTYPES[kind](warp.program.address_of(name))
    if isinstance(operand, Special):
        name = operand.name
        return lambda warp: warp.special(name).astype(DTYPES[kind])
    raise UnknownOperationError(f"an operand {operand}")


def write(warp: Warp, mask: Mask, target: Register, kind: str, value: Any) -> None:
    """Write a value to a register in the lanes of a mask."""
    np.copyto(warp.registers[kind][target.number], value, where=True if mask is None else mask)


def flushed(x: Any) -> Any:
    """Replace subnormal numbers with zeros of the same sign."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Round single precision to the nearest bfloat16, ties to even. Return the bits as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _fused(a: Any, b: Any, c: Any) -> Any:
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def _divided(a: Any, b: Any) -> Any:
    a, b = np.int64(a), np.int64(b)
    quotient = np.abs(a) // np.maximum(np.abs(b), 1)
    # the result of a division by zero is undefined
    return np.where(b == 0, -1, np.sign(a) * np.sign(b) * quotient)


def _shift_left(a: Any, count: Any) -> Any:
    width = 8 * a.dtype.itemsize
    return np.where(count < width, a << np.minimum(count, width - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: Any, count: Any) -> Any:
    width = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < width, shifted, a.dtype.type(0))


def _extract(a: Any, first: Any, length: Any) -> Any:
    """Return the bits [first, first + length) of a number. For a signed type, the highest of them is the sign."""
    first, length = np.int64(first), np.int64(length)
    field = (np.int64(a) >> first) & ((np.int64(1) << length) - 1)
    if a.dtype.kind == "i":
        sign = np.int64(1) << np.maximum(length - 1, 0)
        field = np.where(length > 0, (field ^ sign) - sign, 0)
    return field


def _high(a: Any, b: Any) -> Any:
    return (np.int64(a) * np.int64(b)) >> np.int64(32)


# maps an opcode without its type to its function, and to the types of sources that differ from the instruction's type
_OPERATIONS: dict[str, tuple[Callable[..., Any], dict[int, str]]] = {
    "mov": (lambda a: a, {}),
    "add": (lambda a, b: a + b, {}),
    "sub": (lambda a, b: a - b, {}),
    "mul": (lambda a, b: a * b, {}),
    "mul.lo": (lambda a, b: a * b, {}),
    "mul.hi": (_high, {}),
    "mad.lo": (lambda a, b, c: a * b + c, {}),
    "div": (_divided, {}),
    "div.full": (lambda a, b: a / b, {}),
    "rem": (lambda a, b: np.int64(a) - _divided(a, b) * np.int64(b), {}),
    "neg": (lambda a: -a, {}),
    "not": (lambda a: ~a, {}),
    "and": (lambda a, b: a & b, {}),
    "or": (lambda a, b: a | b, {}),
    "xor": (lambda a, b: a ^ b, {}),
    "shl": (_shift_left, {1: "u32"}),
    "shr": (_shift_right, {1: "u32"}),
    "bfe": (_extract, {1: "u32", 2: "u32"}),
    # min and max of a number and NaN return the number
    "min": (np.fmin, {}),
    "max": (np.fmax, {}),
    "fma.rn": (_fused, {}),
    "fma.rn.ftz": (lambda a, b, c: flushed(_fused(flushed(a), flushed(b), flushed(c))), {}),
    "ex2.approx.ftz": (lambda a: flushed(np.exp2(np.float64(flushed(a))).astype(np.float32)), {}),
    "selp": (lambda a, b, chosen: np.where(chosen, a, b), {2: "pred"}),
}
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_HALVES: dict[str, Callable[[Any], np.ndarray]] = {
    "bf16x2": bfloat16_bits,
    "f16x2": lambda x: x.astype(np.float16).view(np.uint16),
}


def arithmetic(instruction: Instruction) -> Run | None:
    """Compile an arithmetic instruction. Return None for any other instruction."""
    *stem, kind = instruction.opcode.split(".")
    name = ".".join(stem)
    if stem[:1] == ["cvt"]:
        return _conversion(instruction)
    if stem[:1] == ["setp"] and stem[1] in _COMPARISONS:
        return _elementwise(instruction, _COMPARISONS[stem[1]], "pred", kind, {})
    if name in ("mul.wide", "mad.wide"):
        return _widening(instruction, kind)
    if name in _OPERATIONS and kind in DTYPES:
        return _elementwise(instruction, _OPERATIONS[name][0], kind, kind, _OPERATIONS[name][1])
    return None


def _elementwise(
    instruction: Instruction, function: Callable[..., Any], result: str, kind: str, others: dict[int, str]
) -> Run:
    target, *sources = instruction.operands
    reads = [reader(source, others.get(i, kind)) for i, source in enumerate(sources)]
    assert isinstance(target, Register)
    number = target.number

    def run(warp: Warp, mask: Mask) -> None:
        value = function(*(read(warp) for read in reads))
        where: Any = True if mask is None else mask
        np.copyto(warp.registers[result][number], value, where=where, casting="unsafe")

    return run


def _widening(instruction: Instruction, kind: str) -> Run:
    wide = _WIDE[kind]

    def function(a: Any, b: Any, *c: Any) -> Any:
        product = DTYPES[wide](a) * DTYPES[wide](b)
        return product + c[0] if c else product

    return _elementwise(instruction, function, wide, kind, {2: wide})


def _conversion(instruction: Instruction) -> Run:
    *_, result, kind = instruction.opcode.split(".")
    if result in _HALVES:
        rounded = _HALVES[result]

        def pack(high: Any, low: Any) -> Any:
            return rounded(high).astype(np.uint32) << np.uint32(16) | rounded(low)

        return _elementwise(instruction, pack, "b32", kind, {})
    if result not in DTYPES or kind not in DTYPES or (kind == "f32" and result != "f32"):
        raise UnknownOperationError(f"the conversion {instruction.opcode}")
    dtype = DTYPES[result]
    return _elementwise(instruction, lambda a: a.astype(dtype), result, kind, {})
