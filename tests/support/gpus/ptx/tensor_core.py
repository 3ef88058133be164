"""Matrix products of a warpgroup (wgmma): descriptors of shared memory, swizzles, register fragments, late reads.

Each warp computes 16 of the 64 rows. A product reads its operands at the wait, which is the latest moment allowed.
Until then its registers and its bytes of shared memory must not change.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .errors import RegisterRaceError, UnknownOperationError

if TYPE_CHECKING:
    from .machine import Warp
    from .memory import SharedMemory

ROWS = 16
# depth of one instruction in 16-bit elements
DEPTH = 16
_LANE = np.arange(32)


class Descriptor(NamedTuple):
    """An instruction's descriptor of a matrix in shared memory. Offsets are in bytes. width: swizzle width in bytes, or
    0 if not swizzled.
    """

    start: int
    leading: int
    stride: int
    width: int

    @staticmethod
    def decode(bits: int) -> Descriptor:
        """Decode a 64-bit descriptor (PTX ISA, "Matrix descriptor format"), whose addresses and offsets count units of
        16 bytes.
        """
        if bits >> 49 & 7:
            raise UnknownOperationError("a matrix descriptor with a base offset")
        start, leading, stride = (16 * (bits >> shift & 0x3FFF) for shift in (0, 16, 32))
        return Descriptor(start, leading, stride, (0, 128, 64, 32)[bits >> 62])

    def places(self, size: int, first: int, transposed: bool) -> np.ndarray:
        """Return the (size, DEPTH) addresses of the elements in rows [first, first + size). transposed: consecutive
        rows are adjacent in memory.
        """
        row, k = np.arange(first, first + size)[:, None], np.arange(DEPTH)[None, :]
        if transposed:
            if not self.width:
                raise UnknownOperationError("a transposed matrix without a swizzle")
            across = self.width // 2
            linear = row // across * self.leading + k // 8 * self.stride + k % 8 * self.width + row % across * 2
        elif self.width:
            linear = row // 8 * self.stride + row % 8 * self.width + k * 2
        else:
            linear = row // 8 * self.stride + k // 8 * self.leading + row % 8 * 16 + k % 8 * 2
        return swizzled(self.start + linear, self.width)


def swizzled(address: np.ndarray, width: int) -> np.ndarray:
    """Return the address of a byte in a swizzled tile. The row number modulo 8 is XORed into the number of its 16-byte
    chunk.
    """
    return address ^ (address >> 3 & max(width - 16, 0))


def numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """Convert 16-bit elements (bf16 or f16) to single precision."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


@dataclass
class Product:
    """One warp's product in flight. Operands are registers (left operand only) or addresses in shared memory."""

    accumulators: tuple[int, ...]
    left: tuple[int, ...] | np.ndarray
    right: np.ndarray
    kind: str
    # True if the product is added to the accumulators
    adds: bool
    # the product of both operands' signs
    sign: float

    def registers(self) -> frozenset[int]:
        """Return the registers that the product reads but does not write."""
        return frozenset(self.left) if isinstance(self.left, tuple) else frozenset()

    def places(self) -> np.ndarray:
        """Return the addresses of all bytes of shared memory that the product reads."""
        parts = [self.right] if isinstance(self.left, tuple) else [self.left, self.right]
        first = np.concatenate([part.ravel() for part in parts])
        return np.concatenate([first, first + 1])

    def compute(self, warp: Warp, shared: SharedMemory) -> None:
        """Read the operands, multiply them and write the accumulators."""
        memory = shared.bytes.view(np.uint16)
        right = numbers(memory[self.right >> 1], self.kind)
        if isinstance(self.left, tuple):
            left = _from_fragment(warp.registers["b32"][list(self.left)], self.kind)
        else:
            left = numbers(memory[self.left >> 1], self.kind)
        row, column = _accumulator_places(len(self.accumulators))
        values = (left @ right.T)[row, column] * np.float32(self.sign)
        rows = list(self.accumulators)
        if self.adds:
            values = warp.registers["f32"][rows] + values
        warp.registers["f32"][rows] = values


def _accumulator_places(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two (count, 32) arrays: the row and the column that each lane holds in each of its accumulators."""
    i = np.arange(count)[:, None]
    return _LANE // 4 + i // 2 % 2 * 8, i // 4 * 8 + _LANE % 4 * 2 + i % 2


def _from_fragment(registers: np.ndarray, kind: str) -> np.ndarray:
    """Return the (16, 16) elements in four registers per lane, two elements per register."""
    i = np.arange(4)[:, None]
    row, k = _LANE // 4 + i % 2 * 8, _LANE % 4 * 2 + i // 2 * 8
    out = np.empty((ROWS, DEPTH), np.uint16)
    out[row, k] = registers & np.uint32(0xFFFF)
    out[row, k + 1] = registers >> np.uint32(16)
    return numbers(out, kind)


@dataclass
class ProductQueue:
    """A warp's products that it has not waited for, and the registers they need."""

    uncommitted: list[Product] = field(default_factory=list)
    groups: deque[list[Product]] = field(default_factory=deque)
    results: set[int] = field(default_factory=set)
    operands: set[int] = field(default_factory=set)
    # registers read or written by other instructions since the last wgmma.fence, and those of them that were written
    touched: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)

    def start(self, product: Product, shared: SharedMemory) -> None:
        """Issue a product. Raise RegisterRaceError if another product or instruction is still using its registers."""
        needed = product.registers().union(product.accumulators)
        if late := (self.touched & set(product.accumulators)) | (self.written & product.registers()):
            raise RegisterRaceError(f"{_names(late)} of a product is used elsewhere after the last wgmma.fence")
        if early := product.registers() & self.results:
            raise RegisterRaceError(f"{_names(early)}, an operand, is the result of a product that is not waited for")
        chained = any(product.accumulators == other.accumulators for other in self._all())
        if not chained and (early := needed & (self.results | self.operands)):
            raise RegisterRaceError(f"{_names(early)} is an accumulator of a product that is not waited for")
        shared.take(product.places())
        self.uncommitted.append(product)
        self.results.update(product.accumulators)
        self.operands |= product.registers()

    def fence(self) -> None:
        """Let products use all registers with their current values (wgmma.fence)."""
        self.touched.clear()
        self.written.clear()

    def commit(self) -> None:
        """Close a group of products (wgmma.commit_group)."""
        self.groups.append(self.uncommitted)
        self.uncommitted = []

    def wait(self, allowed: int, warp: Warp, shared: SharedMemory) -> None:
        """Compute groups until at most `allowed` are left (wgmma.wait_group)."""
        while len(self.groups) > allowed:
            for product in self.groups.popleft():
                product.compute(warp, shared)
                shared.release(product.places())
        self.results = {number for product in self._all() for number in product.accumulators}
        self.operands = {number for product in self._all() for number in product.registers()}

    def pass_by(self, uses: frozenset[int], writes: frozenset[int]) -> None:
        """Note that another instruction uses registers. Raise RegisterRaceError if a product in flight needs them."""
        self.touched |= uses
        self.written |= writes
        if early := uses & self.results:
            raise RegisterRaceError(f"{_names(early)} is used before the wait for the product that makes it")
        if early := writes & self.operands:
            raise RegisterRaceError(f"{_names(early)} is written before the wait for the product that reads it")

    def _all(self) -> list[Product]:
        return [*(product for group in self.groups for product in group), *self.uncommitted]


def _names(registers: frozenset[int] | set[int]) -> str:
    return f"register %r{min(registers)}"
