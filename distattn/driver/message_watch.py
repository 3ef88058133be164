"""A watch on the host over messages that a device waits for, because NCCL's own wait returns at once.

A thread checks periodically whether the oldest message in flight has arrived. If it is late, all ranks are asked whether they
are alive, the result is logged, and the communicator is aborted, so that the device continues and this process gets an error.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from distattn.batch.health import HealthMonitor
from distattn.ir.errors import LostRankError, named_ranks
from distattn.kernels.devices import has_streams
from distattn.parallel.runtime.communication.transport import Packet

MESSAGES = "an exchange of attention's messages"
_LOG = logging.getLogger("distattn")
# seconds between checks of the messages in flight
_POLL = 0.5


@dataclass(eq=False)
class PendingMessage:
    """Messages under watch. text: describes them. works: the backend's handles, None until the messages are started.

    It holds no reference to the tensors sent and received, so watching does not extend their lifetimes.
    """

    text: str
    since: float
    works: Sequence[Any] | None = None

    def have_arrived(self) -> bool:
        """Return whether all messages have been started and have arrived."""
        return self.works is not None and all(work.is_completed() for work in self.works)


class MessageWatch:
    """A watch over the messages of one communicator, which arrive in the order in which they were started.

    members: the communicator's ranks, numbered as in the default group. give_up: aborts messages in flight. device: the device
    that waits for the messages.
    """

    def __init__(
        self, monitor: HealthMonitor, members: Sequence[int], give_up: Callable[[], None], device: torch.device
    ):
        self._monitor, self._members, self._give_up, self._device = monitor, members, give_up, device
        self._under_way: deque[PendingMessage] = deque()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="distattn-messages")
        self._thread.start()

    @contextlib.contextmanager
    def watching(self, text: str) -> Iterator[PendingMessage]:
        """Watch messages from before they are started until they have arrived. text: describes them in the error.

        The body of the context starts the messages and sets `works`. NCCL blocks the host there while it connects two ranks that
        have never exchanged a message.
        """
        under_way = PendingMessage(text, time.monotonic())
        self._under_way.append(under_way)
        try:
            yield under_way
        except BaseException:
            # the thread may have removed it already
            with contextlib.suppress(ValueError):
                self._under_way.remove(under_way)
            raise

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        self._thread.join(timeout=2 * _POLL)
        self._under_way.clear()

    def _run(self) -> None:
        if has_streams(self._device):
            # the checks below must not initialize another device
            torch.cuda.set_device(self._device)
        limit, arrived = self._monitor.wait_timeout.total_seconds(), time.monotonic()
        while not self._closed.wait(_POLL):
            # the calling thread may concurrently remove a message whose call failed
            while (oldest := next(iter(tuple(self._under_way)), None)) is not None and oldest.have_arrived():
                with contextlib.suppress(ValueError):
                    self._under_way.remove(oldest)
                arrived = time.monotonic()
            # a device processes messages in order: the oldest message has been in flight since the previous message arrived
            if oldest is not None and time.monotonic() - max(oldest.since, arrived) > limit:
                self._report(oldest.text, limit)
                return

    def _report(self, text: str, limit: float) -> None:
        def late() -> None:
            raise TimeoutError(f"{text} did not arrive within {limit:.0f} s")

        try:
            self._monitor.guarded(late, MESSAGES, self._members)
        except LostRankError as error:
            _LOG.error("%s", error)
        # this ends kernels that are waiting for messages, and makes the next attention call raise
        self._give_up()


class Awaited(NamedTuple):
    """Messages that a step waits for. text: describes them. peers: the ranks that send or receive them."""

    text: str = ""
    peers: tuple[int, ...] = ()


def describe_messages(
    sends: Sequence[Packet], receives: Sequence[Packet], members: Sequence[int], where: str
) -> Awaited:
    """Describe the messages that a step waits for, with ranks numbered as in the default group."""
    ranks: dict[str, set[int]] = {}
    for packet in receives or sends:
        ranks.setdefault(packet.name, set()).add(members[packet.peer])
    direction = "from" if receives else "to"
    moves = ", ".join(f"{name} {direction} {named_ranks(peers)}" for name, peers in ranks.items())
    return Awaited(f"{moves} {where}".strip(), tuple(sorted(set().union(*ranks.values()))))
