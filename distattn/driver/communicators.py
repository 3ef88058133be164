"""How the ranks of a driver reach each other: a transport for attention, host groups for words, a monitor of their health."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from distattn.batch.collectives import HostGroup
from distattn.batch.health import HealthMonitor
from distattn.driver.control_channel import ControlChannel
from distattn.ops.executable import EXECUTABLES
from distattn.parallel.runtime.transport import Packet, PendingMessages, SingleRankTransport, Transport

_MESSAGES = "an exchange of attention's messages"
SINGLE_RANK: Transport = SingleRankTransport()


class MonitoredTransport:
    """A transport whose failures name the rank that is to blame."""

    def __init__(self, transport: Transport, monitor: HealthMonitor, members: Sequence[int]):
        self._transport, self._monitor, self._members = transport, monitor, members

    def exchange(self, sends: list[Packet], receives: list[Packet], collective: bool) -> PendingMessages:
        self._monitor.enter(_MESSAGES)
        return _MonitoredWork(self, self.guarded(lambda: self._transport.exchange(sends, receives, collective)))

    def guarded(self, work: Callable[[], Any]) -> Any:
        return self._monitor.guarded(work, _MESSAGES, self._members)


class _MonitoredWork(NamedTuple):
    transport: MonitoredTransport
    work: PendingMessages

    def wait(self) -> None:
        self.transport.guarded(self.work.wait)


class Communicators:
    """Everything a driver of several ranks sends through. Made and closed by all ranks together.

    name: the same on all ranks, and no other driver's; exchange: ranks of the default group that tell each other of steps;
    group: those that share attention, of which the last `servers` have no model.
    """

    def __init__(self, name: str, exchange: Sequence[int], group: dist.ProcessGroup, servers: int, timeout: timedelta):
        self.members = dist.get_process_group_ranks(group)
        self.monitor = HealthMonitor(name, dist.get_rank(), exchange, timeout)
        self.exchange = HostGroup(f"{name}/exchange", exchange, self.monitor)
        # used on the thread that runs the model, where the exchange is used on the planning thread
        own = f"{name}/group of rank {self.members[0]}"
        self.agreement = HostGroup(f"{own}/agreement", self.members, self.monitor)
        transport = EXECUTABLES.transport(group, self.monitor.wait_timeout)
        self.transport: Transport = MonitoredTransport(transport, self.monitor, self.members)
        self.control: ControlChannel | None = None
        if servers:
            host = HostGroup(f"{own}/control", self.members, self.monitor, idles=True)
            self.control = ControlChannel(host, servers)

    def close(self, gracefully: bool) -> None:
        """End the host groups and the monitor's thread; the exchange is its planning thread's to close.

        gracefully: servers are let go first; otherwise they notice that this rank has gone.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self.monitor.close)
            stack.callback(self.agreement.close)
            if self.control is not None:
                stack.callback(self.control.close, gracefully)
