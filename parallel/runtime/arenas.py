"""Arenas: the memory of passes, kept from pass to pass, one for each stream and for each pass that is under way on it.

NCCL's process group tells PyTorch's allocator of the storage of every message (`record_stream`). Memory that is freed after that
goes to others only once the device has come past it, and the host runs many layers ahead: a new arena for each pass would be 8 to
18 arenas at once. So all messages are sent from and received in arenas of this pool, and arenas are not freed between passes. A
pass works on one stream, which waits for the messages of each step: the stream itself orders the passes that use an arena.

What a forward pass receives for the backward stays where it arrives. Activation checkpointing drops it at once in a layer's first
forward pass, and uses it soon where that is repeated: what nothing refers to any longer is where the next pass receives.
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
from distattn.parallel.runtime.memory import ALIGNMENT

# a device and its stream, None where the device has no streams
_Place = tuple[torch.device, Any]


class ArenaPool:
    """Arenas that no pass uses now, by device and stream. Any thread may borrow and give back."""

    def __init__(self) -> None:
        # garbage collection may close a driver, which frees arenas, on a thread that holds the lock
        self._lock = threading.RLock()
        # of each place by size, the smallest first
        self._idle: dict[_Place, list[Tensor]] = defaultdict(list)
        # what passes have received for a backward in, of each place; it may be in use
        self._kept: dict[_Place, list[Tensor]] = defaultdict(list)
        self._of_parents: list[Any] = []

    def forget(self) -> None:
        """Begin anew in a process that was forked: the device's memory, and threads that held the lock, stay with the parent."""
        self._lock = threading.RLock()
        # PyTorch's allocator would ask CUDA for events if they were freed, and a forked process cannot use CUDA
        self._of_parents += [self._idle, self._kept]
        self._idle, self._kept = defaultdict(list), defaultdict(list)

    @contextmanager
    def borrowed(self, nbytes: int, device: torch.device) -> Iterator[Tensor]:
        """Lend an arena of at least `nbytes` bytes, a tensor of uint8, to work on the current stream; its content has no meaning.

        The block ends when all that uses the arena is done or queued on that stream. If the block raises, the arena is dropped:
        messages may still be under way in it. Raises torch.OutOfMemoryError.
        """
        if not nbytes:
            yield torch.empty(0, dtype=torch.uint8, device=device)
            return
        place = _place(device)
        with self._lock:
            idle = self._idle[place]
        arena = self._take(place, nbytes, idle)
        yield arena
        # not reached by an exception, nor by a generator that is closed
        with self._lock:
            insort(self._idle[place], arena, key=_size)

    @contextmanager
    def kept(self, count: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
        """Give a forward pass a tensor (count,) to receive in what its backward will find again; its content has no meaning.

        It may lie where that of another pass was, to which nothing refers any longer. If the block raises, its memory is not used
        again. Raises torch.OutOfMemoryError.
        """
        if not count or _is_taken_by_hooks():
            yield torch.empty(count, dtype=dtype, device=device)
            return
        place = _place(device)
        with self._lock:
            blocks = self._kept[place]
            unused = sorted((block for block in blocks if _is_unused(block)), key=_size)
            # what first passes have received is needed until much later: then it is not the pool's any longer
            self._kept[place] = [block for block in blocks if not _is_unused(block)] if runs_backward() else []
        block = self._take(place, count * dtype.itemsize, unused)
        # no view, of which autograd would know
        yield torch.empty(0, dtype=dtype, device=device).set_(block.untyped_storage(), 0, (count,), (1,))
        with self._lock:
            self._kept[place] += [block, *unused]

    def free(self, device: torch.device | None = None) -> None:
        """Free the arenas that no pass uses, of one device or of all."""
        with self._lock:
            for memory in (self._idle, self._kept):
                for place in [place for place in memory if device is None or place[0] == device]:
                    del memory[place]

    def idle_bytes(self, device: torch.device) -> list[int]:
        """Return the sizes in bytes of the arenas that no pass uses on a device, the smallest first."""
        with self._lock:
            return sorted(
                _size(arena) for place, arenas in self._idle.items() if place[0] == device for arena in arenas
            )

    def _take(self, place: _Place, nbytes: int, idle: list[Tensor]) -> Tensor:
        """Take memory from a list that is sorted by size, or make it. Raises torch.OutOfMemoryError."""
        with self._lock:
            fitting = bisect_left(idle, nbytes, key=_size)
            if fitting < len(idle):
                return idle.pop(fitting)
            if idle:
                # a larger one takes its place; the smaller one is freed first
                idle.pop()
        try:
            return _new(nbytes, place[0])
        except torch.OutOfMemoryError:
            # arenas that other streams or earlier schedules have left may be what is missing
            self.free(place[0])
            with self._lock:
                idle.clear()
            return _new(nbytes, place[0])


class ArenaAllocator:
    """An allocator that places tensors in a part of an arena, one behind another."""

    def __init__(self, arena: Tensor):
        """arena: bytes, aligned as an arena is."""
        self._arena, self._used = arena, 0

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor of the arena, uninitialized."""
        begin, size = self._used, prod(shape) * dtype.itemsize
        self._used += aligned_bytes(size)
        return self._arena[begin : begin + size].view(dtype).view(tuple(shape))

    def copy_of(self, x: Tensor) -> Tensor:
        """Return a contiguous copy of a tensor, placed in the arena."""
        return self.tensor(x.shape, x.dtype).copy_(x)

    def clear(self) -> None:
        """Place tensors from the beginning again."""
        self._used = 0


def aligned_bytes(*sizes: int) -> int:
    """Return the bytes of an arena that tensors of these sizes in bytes take, with alignment."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _new(nbytes: int, device: torch.device) -> Tensor:
    # an arena that is first needed for inference serves training, too, where inference tensors cannot be written
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


def runs_backward() -> bool:
    """Return whether this thread runs a backward pass of autograd, where a forward pass is one that a checkpoint repeats."""
    return int(torch._C._current_graph_task_id()) >= 0


def _place(device: torch.device) -> _Place:
    return device, torch.cuda.current_stream(device) if has_streams(device) else None


def _size(arena: Tensor) -> int:
    return arena.nbytes


def _uses(memory: Tensor) -> int:
    return int(torch._C._storage_Use_Count(memory.untyped_storage()._cdata))


def _is_taken_by_hooks() -> bool:
    """Return whether hooks that are not of activation checkpointing or our own may still read saved tensors that are freed.

    Offloading by other libraries copies them on a stream of its own and tells PyTorch's allocator alone (`record_stream`).
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and not str(getattr(hooks[0], "__module__", "")).startswith(
        ("torch.utils.checkpoint", "distattn.")
    )


def _is_unused(memory: Tensor) -> bool:
    """Return whether no other tensor lies in the memory of a tensor that only one list has."""
    return _uses(memory) == _OF_ONE_TENSOR


_OF_ONE_TENSOR = _uses(torch.empty(1, dtype=torch.uint8))
ARENAS = ArenaPool()
os.register_at_fork(after_in_child=ARENAS.forget)
