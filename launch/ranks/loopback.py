"""Rendezvous of ranks on one machine's loopback, or at the first machine's address. torchrun's own listens on all interfaces.

Each attempt has a new store, since PyTorch keeps its store across restarts, with the dead ranks' addresses (pytorch#167288).
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from distattn.ir.errors import LostRankError
from distattn.parallel.runtime.communication.network_interfaces import (
    LOOPBACK,
    addresses_towards,
    interface_address,
    listening_socket,
    resolve_host,
)
from distattn.supervision.node_links import NodeAddress

# values of rdzv_backend in torchrun's `LaunchConfig`, for one machine and for several
RENDEZVOUS, NODES_RENDEZVOUS = "distattn-loopback", "distattn-nodes"
_GLOO_INTERFACE, _INTERFACE = "GLOO_SOCKET_IFNAME", "lo"
# backlog of the store's socket: maximum number of connections not yet accepted
_WAITING = 1024
# time limit for all nodes to connect
_LIMIT = timedelta(minutes=10)


@contextmanager
def gloo_on_loopback() -> Iterator[None]:
    """Make gloo listen on the loopback in ranks started within the block, unless the environment names an interface."""
    named = os.environ.get(_GLOO_INTERFACE)
    os.environ[_GLOO_INTERFACE] = named or _INTERFACE
    try:
        yield
    finally:
        if named is None:
            del os.environ[_GLOO_INTERFACE]
        else:
            os.environ[_GLOO_INTERFACE] = named


def own_place(endpoint: str) -> NodeAddress | None:
    """Return the address at which the other nodes of an attempt reach this machine; None if it is unknown.

    endpoint: host:port of the first node. The address belongs to gloo's configured interface, or else to the interface that
    faces the first node.
    """
    host, port = parse_rendezvous_endpoint(endpoint, -1)
    if names := os.environ.get(_GLOO_INTERFACE):
        address = interface_address(names.split(",")[0].strip())
    else:
        address = next(addresses_towards(host, port), None)
    return None if address is None else NodeAddress(socket.gethostname(), address, port)


class _LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of a single agent. The ranks use the agent's store."""

    def __init__(self, parameters: RendezvousParameters):
        self._run = parameters.run_id
        self._closed = False

    def get_backend(self) -> str:
        return RENDEZVOUS

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        server = listening_socket(LOOPBACK, 0, _WAITING)
        port = server.getsockname()[1]
        store = dist.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, port))

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        self._closed = True

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run

    def shutdown(self) -> bool:
        self._closed = True
        return True


class _NodesRendezvous(_LoopbackRendezvous):
    """The rendezvous of agents on several nodes, each of which knows its number. The first agent hosts the store."""

    def __init__(self, parameters: RendezvousParameters):
        super().__init__(parameters)
        self._host, self._port = parse_rendezvous_endpoint(parameters.endpoint, -1)
        self._node, self._nodes = parameters.config["rank"], parameters.max_nodes

    def get_backend(self) -> str:
        return NODES_RENDEZVOUS

    def next_rendezvous(self) -> RendezvousInfo:
        held: dict[str, Any] = {}
        if self._node == 0:
            held = {"is_master": True, "master_listen_fd": _socket_of(self._host, self._port).detach()}
        try:
            store = dist.TCPStore(self._host, self._port, self._nodes, timeout=_LIMIT, **held)
        except dist.DistError as error:
            place, minutes = f"{self._host}:{self._port}", f"{_LIMIT.total_seconds() / 60:.0f} minutes"
            missing = (
                f"some of {self._nodes} nodes did not reach {place} within {minutes}"
                if self._node == 0
                else f"node {self._node} cannot reach node 0 at {place} within {minutes}"
            )
            reason = str(error).strip().splitlines()[0]
            raise LostRankError(
                f"{missing}: check the network between them, and that all have started ({reason})."
            ) from None
        where = RendezvousStoreInfo(self._host, self._port)
        return RendezvousInfo(dist.PrefixStore(self._run, store), self._node, self._nodes, where)


def _socket_of(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address of `host`, a name of this machine. Raises OSError if the port is taken.

    The socket listens on all interfaces if the name does not resolve here to an address by which other machines reach this
    machine: if it resolves to nothing, to another machine, or to the loopback, as /etc/hosts makes it on some systems.
    """
    for address in resolve_host(host)[:1]:
        if host in (address, "localhost") or not ipaddress.ip_address(address).is_loopback:
            with suppress(OSError):
                return listening_socket(address, port, _WAITING)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, backlog=_WAITING, dualstack_ipv6=True)
    return listening_socket("0.0.0.0", port, _WAITING)


rendezvous_handler_registry.register(RENDEZVOUS, _LoopbackRendezvous)
rendezvous_handler_registry.register(NODES_RENDEZVOUS, _NodesRendezvous)
