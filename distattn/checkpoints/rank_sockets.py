"""A connection from rank 0 of a group to each other rank: one that ends is noticed at once, whatever ended it.

Gloo will not do for this: where a peer ends at the moment of a send, the send may wait for its whole time-out, which must be
longer than the slowest write. It did so in 2 of 335 kills (benchmarks/LOG.md).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import time
import weakref
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from distattn.checkpoints.owner import machine_digest
from distattn.ir.errors import LostRankError, named_ranks
from distattn.parallel.runtime.attendance import default_store
from distattn.parallel.runtime.communicator import timeout_of

_KEY_BYTES, _RANK_BYTES = 32, 4
# that a connection to one of rank 0's addresses may take, in seconds
_CONNECT_SECONDS = 10.0
# a machine that is gone is noticed by its silence: probed after so many seconds, so often, given up after two minutes
_KEEPALIVE = {
    socket.TCP_KEEPIDLE: 60,
    socket.TCP_KEEPINTVL: 15,
    socket.TCP_KEEPCNT: 4,
    socket.TCP_USER_TIMEOUT: 120_000,
}
# how many times this process has connected a group
_OPENED: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def connect_to_root(group: dist.ProcessGroup) -> dict[int, Connection]:
    """Connections by rank of the group: on rank 0 to all others, on these to rank 0. A collective call of the group's ranks.

    What they send is pickled; only ranks that know a key from the job's store are let in. Raises LostRankError naming the ranks
    that do not come within the group's time-out.
    """
    number = _OPENED[group] = _OPENED.get(group, 0) + 1
    members = hashlib.sha1(str(dist.get_process_group_ranks(group)).encode()).hexdigest()[:12]
    store = dist.PrefixStore(f"distattn/checkpoints {number} of {group.group_name} {members}", default_store())
    rank, ranks, timeout = dist.get_rank(group), dist.get_world_size(group), timeout_of(group)
    return _accept_all(store, ranks, timeout) if rank == 0 else {0: _connect(store, rank, timeout)}


def _accept_all(store: dist.Store, ranks: int, timeout: timedelta) -> dict[int, Connection]:
    ends, key = time.monotonic() + timeout.total_seconds(), secrets.token_bytes(_KEY_BYTES)
    found: dict[int, Connection] = {}
    with _server(ranks) as server:
        where = {
            "addresses": _addresses(),
            "port": server.getsockname()[1],
            "machine": machine_digest(),
            "key": key.hex(),
        }
        store.set("root", json.dumps(where))
        while len(found) < ranks - 1:
            try:
                server.settimeout(max(ends - time.monotonic(), 0.001))
                opened, _ = server.accept()
                hello = _receive_hello(opened)
            except OSError as error:
                if time.monotonic() < ends:
                    # somebody else's, or cut: the rank tries again
                    continue
                for connection in found.values():
                    connection.close()
                missing = named_ranks(set(range(1, ranks)) - found.keys())
                raise LostRankError(f"{missing} of the group did not come to open the checkpoints ({error}).") from None
            if hmac.compare_digest(hello[:_KEY_BYTES], key):
                found[int.from_bytes(hello[_KEY_BYTES:], "little")] = _wrapped(opened)
            else:
                opened.close()
    return found


def _connect(store: dist.Store, rank: int, timeout: timedelta) -> Connection:
    ends = time.monotonic() + timeout.total_seconds()
    error: Exception
    try:
        store.wait(["root"], timeout)
        where = json.loads(store.get("root"))
    except RuntimeError as lost:
        why = str(lost).strip().partition("\n")[0]
        raise LostRankError(f"rank 0 of the group did not come to open the checkpoints ({why}).") from None
    # the loopback works where no name resolves
    here = where["machine"] == machine_digest()
    addresses = ["127.0.0.1"] if here else where["addresses"]
    while True:
        for address in addresses:
            try:
                opened = socket.create_connection((address, where["port"]), _CONNECT_SECONDS)
                opened.sendall(bytes.fromhex(where["key"]) + rank.to_bytes(_RANK_BYTES, "little"))
                return _wrapped(opened)
            except OSError as refused:
                error = refused
        if time.monotonic() > ends:
            raise LostRankError(
                f"rank 0 of the group cannot be reached at {', '.join(addresses)}, port {where['port']} ({error})."
            ) from None
        time.sleep(0.5)


def _server(ranks: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=ranks, dualstack_ipv6=True)
        except OSError:
            # this machine has no addresses of that kind
            pass
    return socket.create_server(("", 0), backlog=ranks)


def _addresses() -> list[str]:
    """Of this machine, the one that faces the job's store first: what reaches the store reaches its network."""
    found = []
    store: Any = default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        for family, kind, _, _, address in socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM):
            try:
                # nothing is sent: the system only chooses an interface
                with socket.socket(family, kind) as probe:
                    probe.connect(address)
                    found.append(probe.getsockname()[0])
            except OSError:
                continue
    # on the machine of the store this is the loopback, of no use to others
    return [*(one for one in found if one not in ("127.0.0.1", "::1")), socket.getfqdn(), socket.gethostname()]


def _wrapped(opened: socket.socket) -> Connection:
    opened.settimeout(None)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        opened.setsockopt(socket.IPPROTO_TCP, option, value)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(opened.detach())


def _receive_hello(opened: socket.socket) -> bytes:
    """The key and the rank that a new connection begins with; it is closed where they do not come. Raises OSError."""
    content, size = b"", _KEY_BYTES + _RANK_BYTES
    try:
        opened.settimeout(_CONNECT_SECONDS)
        while len(content) < size:
            part = opened.recv(size - len(content))
            if not part:
                raise ConnectionError("it was closed")
            content += part
    except OSError:
        opened.close()
        raise
    return content
