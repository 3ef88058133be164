"""Host-side collectives: a gloo communicator alongside a process group, for values that ranks exchange about batches.

It is used by one thread at a time, and independent of the trainer's messages. A wait for a missing rank ends within the
time-out with a DistattnError that names the rank (see `health`).
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from distattn.batch.health import HealthMonitor
from distattn.parallel.runtime.communication.collective_calls import default_store
from distattn.parallel.runtime.communication.communicator import all_gather_objects, all_gather_objects_over_gloo
from distattn.parallel.runtime.communication.sealed_values import seal, unseal
from distattn.supervision.heartbeats import thread_activity

# control messages are padded to this size, because gloo's receiver must know the size in advance
_MESSAGE_BYTES = 2048
# with this many unfinished messages to one rank, the sender waits for the oldest
_MAX_IN_FLIGHT = 64
_FOREVER = timedelta(days=30)


class HostGroup:
    """Host-side communication between the ranks of a process group, numbered by their order in `members`."""

    def __init__(self, name: str, members: Sequence[int], monitor: HealthMonitor, idles: bool = False):
        """Open the communicator.

        members: ranks of the default group. name: equal on all members, and different from other groups' names. idles: True if
        messages may be rare, so that a long wait is no error while the sender is alive.
        """
        self.members, self._monitor = list(members), monitor
        self.rank, self.ranks = self.members.index(monitor.rank), len(self.members)
        store = dist.PrefixStore(f"distattn/{name}", default_store())
        arguments = store, self.rank, self.ranks, _FOREVER if idles else monitor.wait_timeout
        self._received: queue.SimpleQueue[Any] | None = None
        with thread_activity("connecting to the other ranks", waits=True, key="connecting"):
            self._gloo: Any = self._guarded(lambda: dist.ProcessGroupGloo(*arguments), "connecting")
        self._in_flight: dict[int, deque[tuple[Any, torch.Tensor]]] = {}

    def all_gather(self, value: Any, activity: str) -> list[Any]:
        """Gather a picklable value from every rank and return the values by rank. activity: describes this call in errors."""
        self._monitor.enter(activity)
        with thread_activity(activity, waits=True, key=activity):
            return list(self._guarded(lambda: all_gather_objects_over_gloo(self._gloo, value), activity))

    def send(self, message: Any, destination: int) -> None:
        """Send a small picklable message. Return immediately unless many earlier messages to that rank are unfinished."""
        data = seal(message)
        if len(data) > _MESSAGE_BYTES - 4:
            raise ValueError(f"a control message of {len(data)} bytes; at most {_MESSAGE_BYTES - 4} fit.")
        padded = len(data).to_bytes(4, "little") + data.ljust(_MESSAGE_BYTES - 4, b"\0")
        tensor = torch.frombuffer(bytearray(padded), dtype=torch.uint8)
        pending = self._in_flight.setdefault(destination, deque())
        # sends finish in order, and gloo reports a finished send only to a caller that waits for it, so wait for the oldest
        while len(pending) >= _MAX_IN_FLIGHT:
            self._wait_oldest(pending)
        pending.append((self._guarded(lambda: self._gloo.send([tensor], destination, 0), "sending"), tensor))

    def receive(self, source: int, activity: str) -> Any:
        """Return the next message from rank `source`. All calls must name the same rank.

        Raise LostRankError once any rank is lost.
        """
        if self._received is None:
            self._received = queue.SimpleQueue()
            # receive on a separate thread, because this thread could not check the sender during gloo's own wait
            arguments = self._gloo, source, self._received
            threading.Thread(target=_receive_all, args=arguments, daemon=True, name="distattn-control").start()
        silent_since = time.monotonic()
        while True:
            try:
                message = self._received.get(timeout=1.0)
                break
            except queue.Empty:
                waited = time.monotonic() - silent_since
                if self._monitor.verdict is not None:
                    message = RuntimeError(self._monitor.verdict.text)
                    break
                if waited > self._monitor.wait_timeout.total_seconds():
                    self._monitor.check_alive(self.members[source], activity)
                    silent_since = time.monotonic()

        def result() -> Any:
            if isinstance(message, RuntimeError):
                raise message
            return message

        return self._guarded(result, activity)

    def flush(self) -> None:
        """Wait until all messages have been sent."""
        for pending in self._in_flight.values():
            while pending:
                self._wait_oldest(pending)

    def close(self) -> None:
        """Close the communicator; unfinished messages are dropped."""
        self._in_flight.clear()
        self._gloo = None

    def _guarded(self, work: Callable[[], Any], activity: str) -> Any:
        return self._monitor.guarded(work, activity, self.members)

    def _wait_oldest(self, pending: deque[tuple[Any, torch.Tensor]]) -> None:
        work, _ = pending.popleft()
        self._guarded(work.wait, "sending")


def _receive_all(gloo: Any, source: int, received: queue.SimpleQueue[Any]) -> None:
    """Receive messages from a rank until the connection ends, and then queue the error that ended it."""
    while True:
        tensor = torch.empty(_MESSAGE_BYTES, dtype=torch.uint8)
        try:
            gloo.recv([tensor], source, 0).wait()
            data = tensor.numpy().tobytes()
            received.put(unseal(data[4 : 4 + int.from_bytes(data[:4], "little")]))
        except RuntimeError as error:
            received.put(error)
            return


def shared_name(group: dist.ProcessGroup) -> str:
    """Return a unique name that is the same on all ranks of a group. A collective call."""
    return str(all_gather_objects(group, uuid.uuid4().hex)[0])
