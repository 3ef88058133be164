"""Connections from rank 0 of a group to every other rank. If a rank exits for any reason, its peer notices at once.

Gloo is not suitable: if a peer exits during a send, the send may wait for the whole timeout, which must be longer than the
slowest write. This happened in 2 of 335 kills (benchmarks/LOG.md).

Rank 0 listens on one address, and the others connect. Both ends prove that they know a key, which a collective of the group has
distributed and which is stored nowhere. A message has a digest that depends on the key, and is unpickled only if it matches.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import pickle
import secrets
import socket
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from distattn.checkpoints.owner import machine_digest
from distattn.ir.errors import DistattnError, LostRankError, named_ranks
from distattn.parallel.runtime.communication.collective_calls import default_store, run_collective
from distattn.parallel.runtime.communication.communicator import sendable_device, timeout_of
from distattn.parallel.runtime.communication.network_interfaces import LOOPBACK, listening_socket, reachable_address

_KEY_BYTES, _RANK_BYTES, _DIGEST_BYTES = 32, 4, 32
# seconds for connecting to rank 0 and exchanging proofs
_CONNECT_SECONDS = 10.0
# detect a lost machine by probes: the first after 60 s of silence, then one every 15 s; give up after two minutes
_KEEPALIVE = {
    socket.TCP_KEEPIDLE: 60,
    socket.TCP_KEEPINTVL: 15,
    socket.TCP_KEEPCNT: 4,
    socket.TCP_USER_TIMEOUT: 120_000,
}
# how many times this process has called `connect_to_root` for each group
_OPENED: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


class RankConnection:
    """A connection for picklable values between two ranks that share a key. A value with a wrong digest is never unpickled.

    rank, other: the group ranks of this end and of the other end. They are part of the digests, so that a message cannot
    be replayed in the other direction.
    """

    def __init__(self, connection: Connection, key: bytes, rank: int, other: int):
        self._connection, self._key, self._rank, self._other = connection, key, rank, other
        self._sent = self._received = 0

    def send(self, value: Any) -> None:
        """Send a value. Raises OSError if the other rank is gone."""
        data = pickle.dumps(value)
        self._connection.send_bytes(self._digest(self._rank, self._sent, data) + data)
        self._sent += 1

    def recv(self) -> Any:
        """Return the next value. Raises EOFError or OSError if the other rank is gone or a message has a wrong digest."""
        message = self._connection.recv_bytes()
        digest, data = message[:_DIGEST_BYTES], message[_DIGEST_BYTES:]
        if not hmac.compare_digest(digest, self._digest(self._other, self._received, data)):
            raise ConnectionError("a message does not match its digest")
        self._received += 1
        return pickle.loads(data)

    def poll(self, timeout: float) -> bool:
        """Return whether a value arrives, or the connection ends, within `timeout` seconds."""
        return self._connection.poll(timeout)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _digest(self, sender: int, number: int, data: bytes) -> bytes:
        return _proof(self._key, b"message", sender, number.to_bytes(8, "little"), data)


def connect_to_root(group: dist.ProcessGroup) -> dict[int, RankConnection]:
    """Return connections, keyed by group rank: on rank 0 to all others, on the others to rank 0. Collective over the group.

    Raises LostRankError naming the ranks that do not connect within the group's timeout, and DistattnError if rank 0 has no
    address that ranks on other machines can reach.
    """
    number = _OPENED[group] = _OPENED.get(group, 0) + 1
    members = hashlib.sha1(str(dist.get_process_group_ranks(group)).encode()).hexdigest()[:12]
    store = dist.PrefixStore(f"distattn/checkpoints {number} of {group.group_name} {members}", default_store())
    rank, ranks, timeout = dist.get_rank(group), dist.get_world_size(group), timeout_of(group)

    def meet() -> tuple[bool, bytes]:
        # wait on the host first, since a wait on a device has no timeout
        store.set(f"machine/{rank}", machine_digest())
        all_machines = [f"machine/{other}" for other in range(ranks)]
        store.wait(all_machines, timeout)
        return len(set(store.multi_get(all_machines))) == 1, _shared_key(group, timeout)

    here, key = run_collective(group, "opening the checkpoints", meet)
    if rank == 0:
        return _accept_all(store, here, key, ranks, timeout)
    return {0: _connect(store, key, rank, timeout)}


def _shared_key(group: dist.ProcessGroup, timeout: timedelta) -> bytes:
    """Return random bytes from rank 0. They are broadcast in the group, since the job's store answers any process that asks."""
    drawn = secrets.token_bytes(_KEY_BYTES) if dist.get_rank(group) == 0 else bytes(_KEY_BYTES)
    key = torch.frombuffer(bytearray(drawn), dtype=torch.uint8).to(sendable_device(group))
    dist.broadcast(key, group_src=0, group=group, async_op=True).wait(timeout)
    return key.cpu().numpy().tobytes()


def _accept_all(store: dist.Store, here: bool, key: bytes, ranks: int, timeout: timedelta) -> dict[int, RankConnection]:
    """Accept the connections of all other ranks. here: True if all ranks are on this machine."""
    deadline = time.monotonic() + timeout.total_seconds()
    connections: dict[int, RankConnection] = {}
    try:
        address = LOOPBACK if here else reachable_address()
    except DistattnError as error:
        store.set("root", json.dumps({"refused": str(error)}))
        raise
    with listening_socket(address, 0, ranks) as server:
        store.set("root", json.dumps({"address": address, "port": server.getsockname()[1]}))
        while len(connections) < ranks - 1:
            try:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                opened, _ = server.accept()
                rank = _within(opened, _admit, key)
            except OSError as error:
                if time.monotonic() < deadline:
                    # the connection was cut or is not from a rank; continue, since a rank tries again
                    continue
                for connection in connections.values():
                    connection.close()
                missing = named_ranks(set(range(1, ranks)) - connections.keys())
                raise LostRankError(
                    f"{missing} of the group did not take part in opening the checkpoints ({error})."
                ) from None
            if rank in connections:
                # the rank has abandoned its earlier connection
                connections[rank].close()
            connections[rank] = RankConnection(_kept_alive(opened), key, 0, rank)
    return connections


def _connect(store: dist.Store, key: bytes, rank: int, timeout: timedelta) -> RankConnection:
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        store.wait(["root"], timeout)
        where = json.loads(store.get("root"))
    except RuntimeError as lost:
        why = str(lost).strip().partition("\n")[0]
        raise LostRankError(f"rank 0 of the group did not take part in opening the checkpoints ({why}).") from None
    if "refused" in where:
        raise DistattnError(f"rank 0 of the group: {where['refused']}")
    while True:
        try:
            opened = socket.create_connection((where["address"], where["port"]), _CONNECT_SECONDS)
            _within(opened, _introduce, key, rank)
            return RankConnection(_kept_alive(opened), key, rank, 0)
        except OSError as refused:
            if time.monotonic() > deadline:
                raise LostRankError(
                    f"rank 0 of the group cannot be reached at {where['address']}, port {where['port']} ({refused}); if that is "
                    "the wrong interface, name the right one in GLOO_SOCKET_IFNAME."
                ) from None
        time.sleep(0.5)


def _within(opened: socket.socket, handshake: Callable[..., int], *arguments: Any) -> int:
    """Return a handshake's result. If the handshake fails or times out, close the connection and raise OSError."""
    deadline = time.monotonic() + _CONNECT_SECONDS
    try:
        return handshake(opened, deadline, *arguments)
    except OSError:
        opened.close()
        raise


def _admit(opened: socket.socket, deadline: float, key: bytes) -> int:
    """Return the rank that has connected to rank 0, once it has proven that it knows the key."""
    challenge = secrets.token_bytes(_KEY_BYTES)
    opened.sendall(challenge)
    reply = _receive(opened, _RANK_BYTES + _KEY_BYTES + _DIGEST_BYTES, deadline)
    rank, their_challenge = int.from_bytes(reply[:_RANK_BYTES], "little"), reply[_RANK_BYTES:-_DIGEST_BYTES]
    if not hmac.compare_digest(reply[-_DIGEST_BYTES:], _proof(key, b"rank", rank, challenge, their_challenge)):
        raise ConnectionError("it does not know the key")
    opened.sendall(_proof(key, b"root", rank, challenge, their_challenge))
    return rank


def _introduce(opened: socket.socket, deadline: float, key: bytes, rank: int) -> int:
    """Prove to rank 0 that this rank knows the key, and require the same proof from rank 0. Return `rank`."""
    challenge, their_challenge = secrets.token_bytes(_KEY_BYTES), _receive(opened, _KEY_BYTES, deadline)
    proof = _proof(key, b"rank", rank, their_challenge, challenge)
    opened.sendall(rank.to_bytes(_RANK_BYTES, "little") + challenge + proof)
    root_proof = _proof(key, b"root", rank, their_challenge, challenge)
    if not hmac.compare_digest(_receive(opened, _DIGEST_BYTES, deadline), root_proof):
        raise ConnectionError("the process that answers there does not know the key")
    return rank


def _proof(key: bytes, kind: bytes, rank: int, *content: bytes) -> bytes:
    """Return the HMAC-SHA256 of the content. kind: determines the sizes of all parts of the content except the last."""
    digest = hmac.new(key, kind + b"\0" + rank.to_bytes(_RANK_BYTES, "little"), "sha256")
    for part in content:
        digest.update(part)
    return digest.digest()


def _receive(opened: socket.socket, size: int, deadline: float) -> bytes:
    """Receive `size` bytes. Raises OSError if they do not arrive in time."""
    content = b""
    while len(content) < size:
        opened.settimeout(max(deadline - time.monotonic(), 0.001))
        part = opened.recv(size - len(content))
        if not part:
            raise ConnectionError("it was closed")
        content += part
    return content


def _kept_alive(opened: socket.socket) -> Connection:
    opened.settimeout(None)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        opened.setsockopt(socket.IPPROTO_TCP, option, value)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(opened.detach())
