"""The memory of a program: shared memory in which every access is checked, and global memory with bounds checks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .errors import MissingProxyFenceError, OutOfBoundsError, SharedMemoryRaceError

# on Hopper the system reserves the first kilobyte of a program's shared memory
SHARED_BASE = 1024
_GLOBAL_BASE = 1 << 40
# bytes between two tensors, so that an access past one tensor's end does not reach another
_GAP = 1 << 12
_ALIGNMENT = 256


class SharedMemory:
    """Shared memory, indexed by byte address. Bytes never written are all ones, which is NaN in every floating-point
    type.

    For every byte it records whether a copy is landing in it, which warp wrote it without a fence for the asynchronous
    proxy, and how many products, copies and barriers rely on it being unchanged.
    """

    def __init__(self, size: int):
        self.end = SHARED_BASE + size
        self.bytes = np.full(self.end, 0xFF, np.uint8)
        self.landing = np.zeros(self.end, bool)
        self.unfenced = np.zeros(self.end, np.uint8)
        self.users = np.zeros(self.end, np.uint16)

    def read(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return (lanes, size) bytes read by ordinary loads."""
        places = self._places(addresses, size)
        self._refuse_landing(places, "read")
        return self.bytes[places]

    def write(self, addresses: np.ndarray, data: np.ndarray, warp: int) -> None:
        """Write (lanes, size) bytes by ordinary stores of a warp."""
        places = self._places(addresses, data.shape[1])
        self._refuse_landing(places, "written")
        self._refuse_users(places, "written")
        self.bytes[places] = data
        self.unfenced[places] = warp + 1

    def fence(self, warp: int) -> None:
        """Make the warp's earlier writes visible to products and bulk copies (fence.proxy.async)."""
        self.unfenced[self.unfenced == warp + 1] = 0

    def take(self, places: np.ndarray) -> None:
        """Start a product's or bulk copy's read of the bytes at `places`. They must not be written until `release`."""
        self._refuse_outside(places)
        self._refuse_landing(places, "read by a product or copy")
        self._refuse_unfenced(places)
        self.users[places] += 1

    def release(self, places: np.ndarray) -> None:
        """End a read of the bytes at `places`."""
        self.users[places] -= 1

    def expect(self, places: np.ndarray, bulk: bool = True) -> None:
        """Start a copy into the bytes at `places`. They must not be used until `land`. Only bulk copies need a fence first."""
        self._refuse_outside(places)
        self._refuse_landing(places, "written by a second copy")
        self._refuse_users(places, "written by a copy")
        if bulk:
            self._refuse_unfenced(places)
        self.bytes[places] = 0xFF
        self.landing[places] = True

    def land(self, places: np.ndarray, data: np.ndarray, warp: int | None = None) -> None:
        """End a copy. warp: the warp whose ordinary store the copy counts as, or None."""
        self.bytes[places] = data
        self.landing[places] = False
        self.unfenced[places] = 0 if warp is None else warp + 1

    def refuse_unfenced(self, address: int, size: int) -> None:
        """Raise MissingProxyFenceError if the bytes, which the asynchronous proxy is about to use, were written without
        a fence.
        """
        self._refuse_unfenced(np.arange(address, address + size))

    def _places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        if (addresses % size).any():
            raise OutOfBoundsError(f"shared address {int(addresses.max())} is not aligned to {size} bytes")
        places = addresses.astype(np.int64)[:, None] + np.arange(size)
        self._refuse_outside(places)
        return places

    def _refuse_outside(self, places: np.ndarray) -> None:
        low, high = int(places.min()), int(places.max())
        if low < SHARED_BASE or high >= self.end:
            at = f"bytes {low - SHARED_BASE} to {high - SHARED_BASE}"
            raise OutOfBoundsError(f"{at} of shared memory, which has {self.end - SHARED_BASE}")

    def _refuse_landing(self, places: np.ndarray, how: str) -> None:
        if self.landing[places].any():
            raise SharedMemoryRaceError(f"{self._first(places, self.landing)} is {how} while a copy is landing there")

    def _refuse_users(self, places: np.ndarray, how: str) -> None:
        if self.users[places].any():
            user = "a product, copy or barrier still needs it"
            raise SharedMemoryRaceError(f"{self._first(places, self.users)} is {how} while {user}")

    def _refuse_unfenced(self, places: np.ndarray) -> None:
        if self.unfenced[places].any():
            at = places[self.unfenced[places] > 0].ravel()[0]
            raise MissingProxyFenceError(
                f"byte {int(at) - SHARED_BASE} of shared memory, which warp {self.unfenced[at] - 1} wrote without a "
                "fence.proxy.async since, meets the asynchronous proxy"
            )

    def _first(self, places: np.ndarray, flags: np.ndarray) -> str:
        return f"byte {int(places[flags[places] > 0].ravel()[0]) - SHARED_BASE} of shared memory"


class _Region(NamedTuple):
    """A tensor's storage in global memory."""

    begin: int
    storage: torch.UntypedStorage


class GlobalMemory:
    """All tensors of a launch, at artificial addresses."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.regions: dict[int, _Region] = {}
        end = _GLOBAL_BASE
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.regions:
                # keep the tensor's real offset from a multiple of the alignment, because the compiler relied on it
                begin = end + _GAP + storage.data_ptr() % _ALIGNMENT
                self.regions[storage.data_ptr()] = _Region(begin, storage)
                end = -(-(begin + storage.nbytes()) // _ALIGNMENT) * _ALIGNMENT
        self.bytes = np.full(end + _GAP - _GLOBAL_BASE, 0xFF, np.uint8)
        regions = list(self.regions.values())
        self.begins = np.array([region.begin for region in regions], np.int64)
        self.ends = np.array([region.begin + region.storage.nbytes() for region in regions], np.int64)
        for region in regions:
            self._part(region)[:] = _as_numpy(region.storage)

    def address(self, tensor: torch.Tensor) -> int:
        """Return the address of a tensor's first element."""
        storage = tensor.untyped_storage()
        return self.regions[storage.data_ptr()].begin + int(tensor.storage_offset()) * tensor.element_size()

    def write_back(self) -> None:
        """Copy the program's memory back to the tensors."""
        for region in self.regions.values():
            _as_numpy(region.storage)[:] = self._part(region)

    def places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return the indices (..., size) in `bytes` of the `size` bytes at each address. These must be aligned and lie in
        one tensor.
        """
        addresses = np.asarray(addresses, np.int64)
        region = np.searchsorted(self.begins, addresses, "right") - 1
        outside = (region < 0) | (addresses + size > self.ends[region])
        if outside.any():
            at = int(addresses[outside].ravel()[0])
            near = max(int(region[outside].ravel()[0]), 0)
            past = at - int(self.ends[near])
            raise OutOfBoundsError(f"{size} bytes of global memory {past:+d} bytes from the end of tensor {near}")
        if size & (size - 1) == 0 and (addresses % size).any():
            raise OutOfBoundsError(f"a global address is not aligned to {size} bytes")
        return addresses[..., None] - _GLOBAL_BASE + np.arange(size)

    def _part(self, region: _Region) -> np.ndarray:
        return self.bytes[region.begin - _GLOBAL_BASE :][: region.storage.nbytes()]


def _as_numpy(storage: torch.UntypedStorage) -> np.ndarray:
    """Return the bytes of a storage as an array that shares its memory."""
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
