"""The rules by which CUDA's caching allocator keeps memory that another stream has used.

`ProcessGroupNCCL` calls `record_stream` for the storage of every message. When that memory is freed, the allocator
records an event on NCCL's stream, and reuses the memory only after the device has passed the event. The host may be
many layers ahead: CUDA queues about 1,024 launches before it makes the host wait.
"""

from __future__ import annotations

import weakref
from collections import deque

from torch import UntypedStorage

# the number of launches that a device queues before the host has to wait
QUEUE = 1024


class HeldBytes:
    """The bytes that no other tensor can use: live storages, and freed storages that wait for the device.

    queue: how many launches the host runs ahead of the device. peak: the most bytes held at any time.
    peak_of_messages: the same for storages that messages were sent from or received into.
    """

    def __init__(self, queue: int = 0):
        self.alive = self.peak = self.peak_of_messages = self.launched = 0
        self._queue = queue
        self._sizes: dict[int, int] = {}
        self._recorded: set[int] = set()
        # freed blocks, oldest first: (the number of the launch that the device must pass, bytes)
        self._waiting: deque[tuple[int, int]] = deque()

    def held(self) -> int:
        """Return the bytes that no other tensor can use now."""
        return self.alive + self._waiting_bytes()

    def knows(self, storage: UntypedStorage) -> bool:
        """Return whether a storage is alive and counted."""
        return storage._cdata in self._sizes

    def allocate(self, storage: UntypedStorage) -> None:
        """Count a new storage."""
        key, size = storage._cdata, storage.nbytes()
        self._sizes[key] = size
        self.alive += size
        self.peak = max(self.peak, self.held())
        weakref.finalize(storage, self._free, key).atexit = False

    def record(self, storage: UntypedStorage) -> None:
        """Note that another stream uses a storage. Ignore storages that are not counted."""
        if not self.knows(storage):
            return
        self._recorded.add(storage._cdata)
        in_use = sum(self._sizes[key] for key in self._recorded)
        self.peak_of_messages = max(self.peak_of_messages, in_use + self._waiting_bytes())

    def launch(self, count: int = 1) -> None:
        """Count launches as queued, after which the device has passed all but the last `queue` launches."""
        self.launched += count

    def _free(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.alive -= size
        if key in self._recorded:
            self._recorded.remove(key)
            self._waiting.append((self.launched, size))

    def _waiting_bytes(self) -> int:
        while self._waiting and self._waiting[0][0] <= self.launched - self._queue:
            self._waiting.popleft()
        return sum(size for _, size in self._waiting)
