"""Pinned host memory of exactly the required size.

PyTorch rounds each pinned allocation up to a power of two (CachingHostAllocator.h, `PowerOf2Ceil`), so 1.1 GB takes 2.1 GB.
Here, pages are mapped and then pinned by CUDA, which takes at most one extra page.
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
    """Return an uninitialized, contiguous, pinned tensor with a tensor's shape and dtype. Raises as `pinned_bytes` does."""
    # pinning uses the current device, and a new thread starts on device 0
    with current_device(tensor.device):
        return pinned_bytes(tensor.nbytes).view(tensor.dtype).view(tensor.shape)


def pinned_bytes(size: int) -> Tensor:
    """Return a uint8 tensor (size,) of pinned memory. Raises DistattnError if CUDA cannot pin that many bytes."""
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
    # the finalizer keeps the pages alive until they are unpinned
    weakref.finalize(flat.untyped_storage(), _unpin, pages, flat.data_ptr()).atexit = False
    return flat


def _unpin(pages: mmap.mmap, address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
