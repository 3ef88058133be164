"""Arenas: memory reused from pass to pass. Each stream has one arena for every unfinished pass on it.

NCCL's process group tells PyTorch's allocator about the storage of every message (`record_stream`). Memory freed after that is
reused only once the device has passed that point. Since the host runs many layers ahead of the device, a new arena for each
pass would mean that 8 to 18 arenas exist at once. All messages are therefore sent from and received in arenas of this pool,
which are not freed between passes. A pass works on one stream, which waits for the messages of each step, so the stream itself
orders the passes that use an arena.

Tensors that a forward pass receives for the backward pass stay where they arrive. Activation checkpointing drops them immediately
after a layer's first forward pass, and when the layer is recomputed, it needs them only briefly. The next pass therefore receives
into memory that no tensor uses any longer.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from distattn.kernels.devices import has_streams
from distattn.parallel.runtime.lowering.memory import ALIGNMENT

# a stream's arenas are freed after this many loans to other streams: a few steps of a large model
_FORGOTTEN_AFTER = 4096
# a device and its stream, which is None on devices without streams
_Place = tuple[torch.device, Any]


class ArenaPool:
    """A pool of idle arenas, keyed by device and stream. Any thread may borrow and return them."""

    def __init__(self) -> None:
        # reentrant, since garbage collection may close a driver, which frees arenas, on a thread that holds the lock
        self._lock = threading.RLock()
        # for each place, its idle arenas, smallest first
        self._idle: dict[_Place, list[Tensor]] = defaultdict(list)
        # for each place, memory for tensors received for a backward pass; some of it may be in use
        self._kept: dict[_Place, list[Tensor]] = defaultdict(list)
        self._of_parents: list[Any] = []
        # the number of loans so far, and for each place, the number of its last loan
        self._loans = 0
        self._last_loan: dict[_Place, int] = {}

    def forget(self) -> None:
        """Reset the pool in a forked process: the device memory, and any thread that holds the lock, belong to the parent."""
        self._lock = threading.RLock()
        # keep the tensors alive: freeing them would call CUDA, which a forked process cannot use
        self._of_parents += [self._idle, self._kept, self._last_loan]
        self._idle, self._kept, self._last_loan = defaultdict(list), defaultdict(list), {}

    @contextmanager
    def borrowed(self, nbytes: int, device: torch.device) -> Iterator[Tensor]:
        """Lend an arena of at least `nbytes` bytes, an uninitialized uint8 tensor, for work on the current stream.

        The block must not end before all work on the arena is done or queued on that stream. If the block raises, the arena
        is dropped, because messages may still be using it. Raise torch.OutOfMemoryError if the device has too little memory.
        """
        if not nbytes:
            yield torch.empty(0, dtype=torch.uint8, device=device)
            return
        place = _place(device)
        with self._lock:
            self._note_loan(place)
            idle = self._idle[place]
        arena = self._take(place, nbytes, idle)
        yield arena
        # not reached if the block raises, or if it is in a generator that is closed
        with self._lock:
            insort(self._idle[place], arena, key=_size)

    @contextmanager
    def kept(self, count: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
        """Give a forward pass an uninitialized tensor (count,) in which to receive tensors that its backward pass needs.

        It may reuse memory from another pass that no tensor uses any longer. If the block raises, its memory is not reused.
        Raise torch.OutOfMemoryError if the device has too little memory.
        """
        if not count or _is_taken_by_hooks():
            yield torch.empty(count, dtype=dtype, device=device)
            return
        place = _place(device)
        with self._lock:
            blocks = self._kept[place]
            unused = sorted((block for block in blocks if _is_unused(block)), key=_size)
            # outside a recomputation, received tensors stay in use for a long time, so the pool drops its references to them
            self._kept[place] = [block for block in blocks if not _is_unused(block)] if runs_backward() else []
        block = self._take(place, count * dtype.itemsize, unused)
        # a new tensor on the same storage: autograd would track a view
        yield torch.empty(0, dtype=dtype, device=device).set_(block.untyped_storage(), 0, (count,), (1,))
        with self._lock:
            self._kept[place] += [block, *unused]

    def free(self, device: torch.device | None = None) -> None:
        """Free the idle arenas of one device, or of all devices."""
        with self._lock:
            for memory in (self._idle, self._kept):
                for place in [place for place in memory if device is None or place[0] == device]:
                    del memory[place]

    def idle_bytes(self, device: torch.device) -> list[int]:
        """Return the sizes in bytes of a device's idle arenas, smallest first."""
        with self._lock:
            return sorted(
                _size(arena) for place, arenas in self._idle.items() if place[0] == device for arena in arenas
            )

    def _note_loan(self, place: _Place) -> None:
        """Count a loan, and free the memory of streams whose last loan was long ago."""
        self._loans += 1
        self._last_loan[place] = self._loans
        if self._loans % _FORGOTTEN_AFTER == 0:
            for old in [old for old, loan in self._last_loan.items() if loan <= self._loans - _FORGOTTEN_AFTER]:
                del self._last_loan[old]
                self._idle.pop(old, None)
                self._kept.pop(old, None)

    def _take(self, place: _Place, nbytes: int, idle: list[Tensor]) -> Tensor:
        """Take memory from `idle`, sorted by size, or allocate it. Raise torch.OutOfMemoryError if there is too little."""
        with self._lock:
            fitting = bisect_left(idle, nbytes, key=_size)
            if fitting < len(idle):
                return idle.pop(fitting)
            if idle:
                # the new arena replaces the largest idle arena, which is freed first
                idle.pop()
        try:
            return _new(nbytes, place[0])
        except torch.OutOfMemoryError:
            # idle arenas of other streams or earlier passes may occupy the memory needed
            self.free(place[0])
            with self._lock:
                idle.clear()
            return _new(nbytes, place[0])


class ArenaAllocator:
    """An allocator that places tensors one after another in an arena, or in a part of an arena."""

    def __init__(self, arena: Tensor):
        """Start at the beginning of `arena`, a uint8 tensor with the alignment of an arena."""
        self._arena, self._used = arena, 0

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a contiguous, uninitialized tensor in the arena."""
        begin, size = self._used, prod(shape) * dtype.itemsize
        self._used += aligned_bytes(size)
        return self._arena[begin : begin + size].view(dtype).view(tuple(shape))

    def copy_of(self, x: Tensor) -> Tensor:
        """Return a contiguous copy of a tensor in the arena."""
        return self.tensor(x.shape, x.dtype).copy_(x)

    def clear(self) -> None:
        """Start again at the beginning of the arena."""
        self._used = 0


def aligned_bytes(*sizes: int) -> int:
    """Return the bytes that tensors of `sizes` bytes occupy in an arena, including alignment."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _new(nbytes: int, device: torch.device) -> Tensor:
    # an arena first requested for inference may also serve training, which cannot write to inference tensors
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


def runs_backward() -> bool:
    """Return whether this thread is inside an autograd backward pass, in which any forward pass is a checkpoint's
    recomputation."""
    return int(torch._C._current_graph_task_id()) >= 0


def _place(device: torch.device) -> _Place:
    return device, torch.cuda.current_stream(device) if has_streams(device) else None


def _size(arena: Tensor) -> int:
    return arena.nbytes


def _uses(memory: Tensor) -> int:
    return int(torch._C._storage_Use_Count(memory.untyped_storage()._cdata))


def _is_taken_by_hooks() -> bool:
    """Return whether saved-tensor hooks, except ours and activation checkpointing's, may read saved tensors after they are freed.

    Other libraries' offloading reads saved tensors on its own stream and informs only PyTorch's allocator (`record_stream`).
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and not str(getattr(hooks[0], "__module__", "")).startswith(
        ("torch.utils.checkpoint", "distattn.")
    )


def _is_unused(memory: Tensor) -> bool:
    """Return whether `memory` is the only tensor that uses its storage."""
    return _uses(memory) == _OF_ONE_TENSOR


_OF_ONE_TENSOR = _uses(torch.empty(1, dtype=torch.uint8))
ARENAS = ArenaPool()
os.register_at_fork(after_in_child=ARENAS.forget)
