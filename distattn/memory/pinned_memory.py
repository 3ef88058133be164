"""Pinned host memory of exactly the required size.

PyTorch rounds each pinned allocation up to a power of two (CachingHostAllocator.h, `PowerOf2Ceil`), so 1.1 GB takes 2.1 GB.
Here distattn maps pages and has CUDA pin them, which takes at most a page more.
"""

from __future__ import annotations

import mmap
import weakref

import torch
from torch import Tensor

from distattn.ir.errors import DistattnError
from distattn.kernels.devices import current_device

# cudaHostRegisterPortable: pinned for all devices of the process
_PORTABLE = 1


def pinned_like(tensor: Tensor) -> Tensor:
    """Return an empty, contiguous tensor of a tensor's shape and dtype in pinned memory. Raise as `pinned_bytes`."""
    # pinning uses the current device, and a new thread begins with device 0
    with current_device(tensor.device):
        return pinned_bytes(tensor.nbytes).view(tensor.dtype).view(tensor.shape)


def pinned_bytes(size: int) -> Tensor:
    """Return bytes (size,) of pinned memory. Raise DistattnError if CUDA cannot pin that many."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, size)
    flat = torch.frombuffer(pages, dtype=torch.uint8)
    error = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), size, _PORTABLE))
    if error:
        raise DistattnError(
            f"CUDA cannot pin {size / 1e9:.3g} GB of host memory (error {error}); use fewer ranks on this machine, or raise its "
            "limit of locked memory."
        )
    # the finalizer keeps the pages until they are no longer pinned
    weakref.finalize(flat.untyped_storage(), _unpin, pages, flat.data_ptr()).atexit = False
    return flat


def _unpin(pages: mmap.mmap, address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
