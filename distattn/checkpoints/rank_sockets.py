"""A connection from rank 0 of a group to each other rank: one that ends is noticed at once, whatever ended it.

Gloo will not do for this: where a peer ends at the moment of a send, the send may wait for its whole time-out, which must be
longer than the slowest write. It did so in 2 of 335 kills (benchmarks/LOG.md).

Rank 0 listens on one address while the others connect. Both ends prove that they know a key, which the group's own collective
has brought to its ranks and which is written nowhere. A message has a digest by that key, and is unpickled only if it matches.
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
from distattn.parallel.runtime.collective_calls import default_store, run_collective
from distattn.parallel.runtime.communicator import sendable_device, timeout_of
from distattn.parallel.runtime.network_interfaces import LOOPBACK, listening_socket, reachable_address

_KEY_BYTES, _RANK_BYTES, _DIGEST_BYTES = 32, 4, 32
# that a connection to rank 0, and the proofs over it, may take, in seconds
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


class RankConnection:
    """Picklable values between two ranks that know a key: a value whose digest does not match is never unpickled.

    own, other: the numbers of the two ranks in the group, so that no message passes for one of the other direction, or of before.
    """

    def __init__(self, connection: Connection, key: bytes, own: int, other: int):
        self._connection, self._key, self._own, self._other = connection, key, own, other
        self._sent = self._received = 0

    def send(self, value: Any) -> None:
        """Send a value. Raises OSError where the other rank is gone."""
        data = pickle.dumps(value)
        self._connection.send_bytes(self._digest(self._own, self._sent, data) + data)
        self._sent += 1

    def recv(self) -> Any:
        """The next value. Raises EOFError or OSError where the other rank is gone, or something else has come."""
        message = self._connection.recv_bytes()
        digest, data = message[:_DIGEST_BYTES], message[_DIGEST_BYTES:]
        if not hmac.compare_digest(digest, self._digest(self._other, self._received, data)):
            raise ConnectionError("what came does not match its digest")
        self._received += 1
        return pickle.loads(data)

    def poll(self, timeout: float) -> bool:
        """Whether a value comes, or the connection ends, within so many seconds."""
        return self._connection.poll(timeout)

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def _digest(self, sender: int, number: int, data: bytes) -> bytes:
        return _proof(self._key, b"message", sender, number.to_bytes(8, "little"), data)


def connect_to_root(group: dist.ProcessGroup) -> dict[int, RankConnection]:
    """Connections by rank of the group: on rank 0 to all others, on these to rank 0. A collective call of the group's ranks.

    Raises LostRankError naming the ranks that do not come within the group's time-out, DistattnError where rank 0 knows no
    address that ranks of other machines reach.
    """
    number = _OPENED[group] = _OPENED.get(group, 0) + 1
    members = hashlib.sha1(str(dist.get_process_group_ranks(group)).encode()).hexdigest()[:12]
    store = dist.PrefixStore(f"distattn/checkpoints {number} of {group.group_name} {members}", default_store())
    rank, ranks, timeout = dist.get_rank(group), dist.get_world_size(group), timeout_of(group)

    def meet() -> tuple[bool, bytes]:
        # on the host, before anything waits on a device without a time-out
        store.set(f"machine/{rank}", machine_digest())
        everyone = [f"machine/{other}" for other in range(ranks)]
        store.wait(everyone, timeout)
        return len(set(store.multi_get(everyone))) == 1, _shared_key(group, timeout)

    here, key = run_collective(group, "the opening of checkpoints", meet)
    if rank == 0:
        return _accept_all(store, here, key, ranks, timeout)
    return {0: _connect(store, key, rank, timeout)}


def _shared_key(group: dist.ProcessGroup, timeout: timedelta) -> bytes:
    """Bytes that rank 0 has drawn, and that go through the group itself: the job's store answers whoever asks."""
    drawn = secrets.token_bytes(_KEY_BYTES) if dist.get_rank(group) == 0 else bytes(_KEY_BYTES)
    key = torch.frombuffer(bytearray(drawn), dtype=torch.uint8).to(sendable_device(group))
    dist.broadcast(key, group_src=0, group=group, async_op=True).wait(timeout)
    return key.cpu().numpy().tobytes()


def _accept_all(store: dist.Store, here: bool, key: bytes, ranks: int, timeout: timedelta) -> dict[int, RankConnection]:
    """here: whether all ranks are on this machine."""
    ends = time.monotonic() + timeout.total_seconds()
    found: dict[int, RankConnection] = {}
    try:
        address = LOOPBACK if here else reachable_address()
    except DistattnError as error:
        store.set("root", json.dumps({"refused": str(error)}))
        raise
    with listening_socket(address, 0, ranks) as server:
        store.set("root", json.dumps({"address": address, "port": server.getsockname()[1]}))
        while len(found) < ranks - 1:
            try:
                server.settimeout(max(ends - time.monotonic(), 0.001))
                opened, _ = server.accept()
                rank = _within(opened, _admit, key)
            except OSError as error:
                if time.monotonic() < ends:
                    # somebody else's, or cut: the rank tries again
                    continue
                for connection in found.values():
                    connection.close()
                missing = named_ranks(set(range(1, ranks)) - found.keys())
                raise LostRankError(f"{missing} of the group did not come to open the checkpoints ({error}).") from None
            if rank in found:
                # it has given up the one before
                found[rank].close()
            found[rank] = RankConnection(_kept_alive(opened), key, 0, rank)
    return found


def _connect(store: dist.Store, key: bytes, rank: int, timeout: timedelta) -> RankConnection:
    ends = time.monotonic() + timeout.total_seconds()
    try:
        store.wait(["root"], timeout)
        where = json.loads(store.get("root"))
    except RuntimeError as lost:
        why = str(lost).strip().partition("\n")[0]
        raise LostRankError(f"rank 0 of the group did not come to open the checkpoints ({why}).") from None
    if "refused" in where:
        raise DistattnError(f"rank 0 of the group: {where['refused']}")
    while True:
        try:
            opened = socket.create_connection((where["address"], where["port"]), _CONNECT_SECONDS)
            _within(opened, _introduce, key, rank)
            return RankConnection(_kept_alive(opened), key, rank, 0)
        except OSError as refused:
            if time.monotonic() > ends:
                raise LostRankError(
                    f"rank 0 of the group cannot be reached at {where['address']}, port {where['port']} ({refused}); if that is "
                    "the wrong interface, name the right one in GLOO_SOCKET_IFNAME."
                ) from None
        time.sleep(0.5)


def _within(opened: socket.socket, handshake: Callable[..., int], *given: Any) -> int:
    """What a handshake over a new connection returns; the connection is closed where it fails, or takes long. Raises OSError."""
    ends = time.monotonic() + _CONNECT_SECONDS
    try:
        return handshake(opened, ends, *given)
    except OSError:
        opened.close()
        raise


def _admit(opened: socket.socket, ends: float, key: bytes) -> int:
    """Rank 0's part: the number of the rank that has connected, once it has proven that it knows the key."""
    own = secrets.token_bytes(_KEY_BYTES)
    opened.sendall(own)
    given = _receive(opened, _RANK_BYTES + _KEY_BYTES + _DIGEST_BYTES, ends)
    rank, theirs = int.from_bytes(given[:_RANK_BYTES], "little"), given[_RANK_BYTES:-_DIGEST_BYTES]
    if not hmac.compare_digest(given[-_DIGEST_BYTES:], _proof(key, b"rank", rank, own, theirs)):
        raise ConnectionError("it does not know the key")
    opened.sendall(_proof(key, b"root", rank, own, theirs))
    return rank


def _introduce(opened: socket.socket, ends: float, key: bytes, rank: int) -> int:
    """The other ranks' part: they prove that they know the key, and ask for the same."""
    own, theirs = secrets.token_bytes(_KEY_BYTES), _receive(opened, _KEY_BYTES, ends)
    opened.sendall(rank.to_bytes(_RANK_BYTES, "little") + own + _proof(key, b"rank", rank, theirs, own))
    if not hmac.compare_digest(_receive(opened, _DIGEST_BYTES, ends), _proof(key, b"root", rank, theirs, own)):
        raise ConnectionError("what answers there does not know the key")
    return rank


def _proof(key: bytes, what: bytes, rank: int, *content: bytes) -> bytes:
    """HMAC-SHA256. what: the kind of the content, whose parts but the last have a size by its kind; the kinds' lengths differ."""
    digest = hmac.new(key, what + b"\0" + rank.to_bytes(_RANK_BYTES, "little"), "sha256")
    for part in content:
        digest.update(part)
    return digest.digest()


def _receive(opened: socket.socket, size: int, ends: float) -> bytes:
    """So many bytes. Raises OSError where they do not come in time."""
    content = b""
    while len(content) < size:
        opened.settimeout(max(ends - time.monotonic(), 0.001))
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
