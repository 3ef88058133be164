"""The Tensor Memory Accelerator (TMA): maps of matrices in global memory, and copies of their boxes in shared memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .errors import OutOfBoundsError, TensorMapError
from .memory import GlobalMemory
from .tensor_core import swizzled

# widths in bytes of cuTensorMapEncodeTiled's swizzles, indexed by their number in the metadata
_SWIZZLE_WIDTHS = (0, 32, 64, 128)
_FLOAT32 = 7


class Box(NamedTuple):
    """A box of a matrix: the addresses of its bytes in shared memory, and which of its elements exist in global memory."""

    # (rows, bytes) addresses in shared memory
    shared: np.ndarray
    # (rows, columns) bool: True for elements inside the matrix
    exists: np.ndarray
    # global addresses of the elements that exist
    addresses: np.ndarray


@dataclass(frozen=True)
class TensorMap:
    """A matrix in global memory as described by a tensor map. Shapes count elements, rows first."""

    address: int
    shape: tuple[int, int]
    row_bytes: int
    box: tuple[int, int]
    element_size: int
    element_type: int
    swizzle: int

    @staticmethod
    def encode(address: int, shape: Any, strides: Any, metadata: dict[str, Any]) -> TensorMap:
        """Encode a descriptor's shape and strides with the compiler's metadata, as the launcher does."""
        if len(shape) != 2 or strides[1] != 1:
            raise TensorMapError("only matrices whose rows are contiguous")
        size, box = metadata["elem_size"], metadata["block_size"]
        width = _SWIZZLE_WIDTHS[metadata["swizzle"]]
        wrong = (
            (address % 16 or strides[0] * size % 16, "an address or stride is not a multiple of 16 bytes"),
            (box[1] * size % 16, "the rows of a box are not a multiple of 16 bytes"),
            (width and box[1] * size > width, "the rows of a box are longer than the swizzle"),
            (max(box) > 256, "a box has a side longer than 256"),
            (metadata["fp4_padded"] or metadata.get("is_im2col"), "only plain boxes"),
        )
        for broken, sentence in wrong:
            if broken:
                raise TensorMapError(f"{sentence}: {metadata}")
        kind = metadata["elem_type"]
        return TensorMap(address, tuple(shape), strides[0] * size, tuple(box), size, kind, width)

    @property
    def bytes(self) -> int:
        """Bytes of a box, including those outside the matrix."""
        return self.box[0] * self.box[1] * self.element_size

    def at(self, target: int, coordinates: tuple[int, int]) -> Box:
        """Return the box at `coordinates` (column, row) for a tile at address `target` in shared memory."""
        if target % 128:
            raise OutOfBoundsError("a tile in shared memory is not aligned to 128 bytes")
        rows, columns = self.box
        linear = target + np.arange(self.bytes).reshape(rows, columns * self.element_size)
        column = coordinates[0] + np.arange(columns)[None, :]
        row = coordinates[1] + np.arange(rows)[:, None]
        exists = (row >= 0) & (row < self.shape[0]) & (column >= 0) & (column < self.shape[1])
        addresses = self.address + row * self.row_bytes + column * self.element_size
        return Box(swizzled(linear, self.swizzle), exists, addresses[exists])

    def load(self, box: Box, memory: GlobalMemory) -> np.ndarray:
        """Return the (rows, bytes) of a box, with zeros outside the matrix."""
        out = np.zeros((*box.exists.shape, self.element_size), np.uint8)
        out[box.exists] = memory.bytes[memory.places(box.addresses, self.element_size)]
        return out.reshape(box.shared.shape)

    def add(self, box: Box, data: np.ndarray, memory: GlobalMemory) -> None:
        """Add (rows, bytes) to a box, ignoring elements outside the matrix."""
        if self.element_type != _FLOAT32:
            raise TensorMapError("only single precision is added")
        values = np.ascontiguousarray(data).view(np.float32)[box.exists]
        places = memory.places(box.addresses, 4)
        old = memory.bytes[places].view(np.float32)[:, 0]
        memory.bytes[places] = (old + values)[:, None].view(np.uint8)


class Landing(NamedTuple):
    """A copy in flight into shared memory, and the action to run when it lands."""

    land: Callable[[], None]
    text: str


@dataclass
class CopyQueue:
    """A warp's copies in groups. Each copy is an action, which the wait for its group runs."""

    uncommitted: list[Callable[[], None]] = field(default_factory=list)
    groups: list[list[Callable[[], None]]] = field(default_factory=list)

    def commit(self) -> None:
        """Close the current group."""
        self.groups.append(self.uncommitted)
        self.uncommitted = []

    def wait(self, allowed: int) -> None:
        """Finish all groups except the last `allowed`."""
        while len(self.groups) > allowed:
            for finish in self.groups.pop(0):
                finish()

    def busy(self) -> bool:
        """Return whether any copy has not been waited for."""
        return bool(self.uncommitted or any(self.groups))
