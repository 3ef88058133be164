"""Communication between a driver's ranks: transports for attention, host groups for facts, and a health monitor."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from distattn.batch.collectives import HostGroup
from distattn.batch.health import HealthMonitor
from distattn.driver.control_channel import ControlChannel
from distattn.driver.message_monitor import MessageMonitor
from distattn.driver.message_watch import MESSAGES, Awaited, MessageWatch, describe_messages
from distattn.ir.errors import DistattnError
from distattn.ops.executable import EXECUTABLES
from distattn.parallel.runtime.communication.transport import (
    GroupTransport,
    Packet,
    PendingMessages,
    SingleRankTransport,
    Transport,
)
from distattn.supervision import heartbeats

Result = TypeVar("Result")
SINGLE_RANK: Transport = SingleRankTransport()


class MonitoredTransport:
    """A transport whose errors name the rank to blame, even where a device's stream waits for the messages."""

    def __init__(
        self,
        transport: GroupTransport,
        monitor: HealthMonitor,
        members: Sequence[int],
        device: torch.device,
        messages: MessageMonitor,
    ):
        self._transport, self._monitor, self._members = transport, monitor, members
        self.messages, self._watch = messages, None
        if transport.waits_on_stream:
            messages.complete = False
            self._watch = MessageWatch(monitor, members, transport.abort, device)

    def exchange(
        self, sends: list[Packet], receives: list[Packet], collective: bool, where: str = ""
    ) -> PendingMessages:
        # after a verdict, messages in flight may have been aborted, so their results must not be used
        self._monitor.raise_verdict()
        self._monitor.enter(MESSAGES)
        where += heartbeats.layer_suffix()
        if self.messages.on_send is not None:
            self.messages.on_send(sends)
        watch, messages = self._watch if sends or receives else None, Awaited()
        if watch is not None or heartbeats.is_attached():
            messages = describe_messages(sends, receives, self._members, where)

        def start() -> Any:
            return self._transport.exchange(sends, receives, collective, where)

        if watch is None:
            return _MonitoredWork(self, self.guarded(start), messages)
        with watch.watching(messages.text) as under_way:
            work = self.guarded(start)
            under_way.works = work.requests
        return _MonitoredWork(self, work, messages)

    def guarded(self, work: Callable[[], Any]) -> Any:
        return self._monitor.guarded(work, MESSAGES, self._members)

    def close(self, gracefully: bool) -> None:
        """Stop the watch; the last driver also closes the communicator. gracefully: False if a rank is known to be lost."""
        if self._watch is not None:
            self._watch.close()
        self._transport.release(gracefully and self._monitor.verdict is None)


class _MonitoredWork(NamedTuple):
    transport: MonitoredTransport
    work: PendingMessages
    messages: Awaited

    def wait(self) -> None:
        with heartbeats.activity(self.messages.text, waits=True, peers=self.messages.peers):
            self.transport.messages.timed(lambda: self.transport.guarded(self.work.wait))


class MonitoredTransports:
    """The monitored transports of a group, keyed by device type."""

    def __init__(self, group: dist.ProcessGroup, monitor: HealthMonitor, members: Sequence[int]):
        self._group, self._monitor, self._members = weakref.ref(group), monitor, members
        self.messages = MessageMonitor()
        self._opened: dict[str, MonitoredTransport] = {}

    def on(self, device: torch.device) -> Transport:
        """Return the transport for this type of device. The first call for a type is collective."""
        if device.type not in self._opened:
            group = self._group()
            if group is None:
                raise DistattnError("the process group of this ContextParallel has been destroyed; make another one.")
            transport = self._monitor.guarded(
                lambda: EXECUTABLES.transport(group, device, self._monitor.wait_timeout), MESSAGES, self._members
            )
            transport.acquire()
            self._opened[device.type] = MonitoredTransport(
                transport, self._monitor, self._members, device, self.messages
            )
        return self._opened[device.type]

    def close(self, gracefully: bool) -> None:
        """Stop the threads that watch messages, and close the communicators. A collective call if `gracefully` is set."""
        for transport in self._opened.values():
            transport.close(gracefully)


class Communicators:
    """All channels of a driver with several ranks. All ranks create them together, and close them together.

    name: the same on all ranks, and unique to this driver. exchange: the ranks that exchange facts about steps, numbered as in
    the default group. group: the ranks that share attention; the last `servers` of them have no model.
    """

    def __init__(self, name: str, exchange: Sequence[int], group: dist.ProcessGroup, servers: int, timeout: timedelta):
        self.members = dist.get_process_group_ranks(group)
        self.monitor = HealthMonitor(name, dist.get_rank(), exchange, timeout)
        self.exchange = HostGroup(f"{name}/exchange", exchange, self.monitor)
        # used by the thread that runs the model; the planning thread uses the exchange
        group_name = f"{name}/group of rank {self.members[0]}"
        self.agreement = HostGroup(f"{group_name}/agreement", self.members, self.monitor)
        self.transports = MonitoredTransports(group, self.monitor, self.members)
        self.messages = self.transports.messages
        self.control: ControlChannel | None = None
        if servers:
            host = HostGroup(f"{group_name}/control", self.members, self.monitor, idles=True)
            self.control = ControlChannel(host, servers)

    def guarded(self, work: Callable[[], Result], activity: str, members: Sequence[int]) -> Result:
        """Run `work`, in which this rank waits for `members`; time it. Raise LostRankError if a rank is lost."""
        with heartbeats.activity(activity, waits=True, key=activity):
            return self.messages.timed(lambda: self.monitor.guarded(work, activity, members))

    def close(self, gracefully: bool) -> None:
        """Close the communicators, the host groups and the monitor; `StepExchange` closes the exchange.

        gracefully: True to release the servers first; otherwise they have to notice that this rank is gone.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self.monitor.close)
            stack.callback(self.transports.close, gracefully)
            stack.callback(self.agreement.close)
            if self.control is not None:
                stack.callback(self.control.close, gracefully)
