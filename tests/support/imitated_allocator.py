"""The rules of CUDA's caching allocator that decide which memory is held when another stream has used it.

`ProcessGroupNCCL` tells the allocator of the storage of every message (`record_stream`). The allocator then records an event on
NCCL's stream when that memory is freed, and gives it to others only once the device has passed the event. The host may be many
layers ahead: CUDA takes about 1,024 launches before it makes the host wait.
"""

from __future__ import annotations

import weakref
from collections import deque

from torch import UntypedStorage

# launches that a device's queue takes before the host waits
QUEUE = 1024


class HeldBytes:
    """Bytes that no other tensor can use: of storages that are alive, and of freed ones that wait for the device.

    queue: launches that the host is ahead of the device, all the time. peak: the most bytes that were held; peak_of_messages:
    the same for storages that messages were sent from or received in.
    """

    def __init__(self, queue: int = 0):
        self.alive = self.peak = self.peak_of_messages = self.launched = 0
        self._queue = queue
        self._sizes: dict[int, int] = {}
        self._recorded: set[int] = set()
        # freed blocks, oldest first: number of the launch that the device must pass, bytes
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
        """Note that another stream uses a storage. Ignore a storage that is not counted."""
        if not self.knows(storage):
            return
        self._recorded.add(storage._cdata)
        in_use = sum(self._sizes[key] for key in self._recorded)
        self.peak_of_messages = max(self.peak_of_messages, in_use + self._waiting_bytes())

    def launch(self, count: int = 1) -> None:
        """Count launches as queued: the device has passed all but the last `queue`."""
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
