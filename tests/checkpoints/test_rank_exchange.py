"""Messages between ranks about a checkpoint: all ranks get rank 0's answer, or the same failure."""

import json
import os
import socket
import threading
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from processes import run_on_ranks

from distattn.checkpoints import rank_sockets
from distattn.checkpoints.rank_exchange import RankExchange, RankFailure
from distattn.checkpoints.rank_sockets import RankConnection
from distattn.ir.errors import DamagedDataError, DistattnError, LostRankError
from distattn.parallel.runtime.communication import collective_calls, network_interfaces


def answers(rank):
    exchange = RankExchange(dist.group.WORLD)
    results_ = [exchange.decide(lambda: rank * 10, lambda results: [sum(results) + r for r in range(len(results))])]
    # a result larger than a socket's buffer
    results_.append(len(exchange.decide(lambda: bytes(3_000_000), lambda results: [b"".join(results)] * 3)))
    exchange.close()
    return results_


def test_every_rank_gets_its_answer():
    assert run_on_ranks(3, answers) == [[30, 9_000_000], [31, 9_000_000], [32, 9_000_000]]


def failures(rank):
    exchange, seen = RankExchange(dist.group.WORLD), []

    def fail(who, error):
        if rank == who:
            raise error

    cases = [
        (lambda: fail(1, OSError(28, "No space left", "a/file")), lambda results: results),
        (lambda: fail(2, DamagedDataError("file: is damaged.")), lambda results: results),
        (lambda: None, lambda results: fail(0, KeyError("x"))),
    ]
    for work, decision in cases:
        with pytest.raises(RankFailure) as raised:
            exchange.decide(work, decision)
        failure = raised.value
        seen.append((failure.kind, failure.rank, failure.text, type(failure.raised()).__name__))
    # the ranks are still in step
    assert exchange.decide(lambda: rank, lambda results: [results] * 3) == [0, 1, 2]
    exchange.close()
    return seen


def test_every_rank_gets_the_same_failure():
    wanted = [
        ("files", 1, "a/file: No space left", "DistattnError"),
        ("damaged", 2, "file: is damaged.", "DamagedDataError"),
        ("error", 0, "KeyError: 'x'", "DistattnError"),
    ]
    assert run_on_ranks(3, failures) == [wanted] * 3


def one_does_not_come(rank):
    rank_sockets.timeout_of = lambda group: timedelta(seconds=8)
    collective_calls._LATER = 5.0
    if rank == 2:
        return ""
    try:
        RankExchange(dist.group.WORLD)
    except LostRankError as error:
        return str(error)
    return ""


def test_a_rank_that_does_not_come_is_named():
    first, second, _ = run_on_ranks(3, one_does_not_come)
    assert first.startswith("rank 2 did not take part in opening the checkpoints: killed, stopped or busy elsewhere")
    assert second.startswith("rank 2 did not take part")


def among_strangers(rank):
    """Connect strangers that send nothing, use a wrong key, or listen in place of rank 0. Return the process ids of
    the accepted ranks, and the errors that strangers cause.
    """
    refused = []
    if rank == 0:
        # use a short limit for the stranger that sends nothing. The other rank keeps the long limit, since the machine
        # may be busy
        rank_sockets._CONNECT_SECONDS = 0.2
    if rank == 1:
        connect = rank_sockets._connect

        def connect_after_strangers(store, key, rank_, timeout):
            store.wait(["root"], timedelta(seconds=60))
            where = json.loads(store.get("root"))
            # the key is not in the store
            assert sorted(where) == ["address", "port"] and where["address"] == "127.0.0.1"
            address = where["address"], where["port"]
            strangers = [socket.create_connection(address) for _ in range(3)]
            strangers[0].sendall(bytes(68))
            strangers[1].sendall(b"GET / HTTP/1.0\r\n\r\n")
            with socket.create_connection(address) as wrong, pytest.raises(OSError) as raised:
                rank_sockets._introduce(wrong, time.monotonic() + 60, bytes(32), 1)
            refused.append(str(raised.value))
            with socket.create_server(("127.0.0.1", 0)) as false:
                false_store = SimpleNamespace(
                    wait=lambda *args: None,
                    get=lambda name: json.dumps({"address": "127.0.0.1", "port": false.getsockname()[1]}),
                )
                threading.Thread(target=answer_falsely, args=(false,), daemon=True).start()
                with pytest.raises(LostRankError) as raised:
                    connect(false_store, key, rank_, timedelta(0))
            refused.append(str(raised.value))
            connection = connect(store, key, rank_, timeout)
            for stranger in strangers:
                stranger.close()
            return connection

        rank_sockets._connect = connect_after_strangers
    exchange = RankExchange(dist.group.WORLD)
    return exchange.decide(os.getpid, lambda results: [results] * 2), refused


def answer_falsely(server):
    opened, _ = server.accept()
    opened.sendall(bytes(32))
    opened.recv(1000)
    opened.sendall(bytes(32))


def test_strangers_are_neither_accepted_nor_trusted():
    (first, _), (second, refused) = run_on_ranks(2, among_strangers)
    assert first == second and len(set(first)) == 2
    closed, unknown = refused
    assert "closed" in closed or "reset" in closed
    assert "the process that answers there does not know the key" in unknown


def test_data_that_does_not_match_its_digest_is_never_unpickled():
    class Armed:
        def __reduce__(self):
            return exec, ("raise SystemExit('unpickled')",)

    ends = socket.socketpair()
    sending, receiving = (Connection(end.detach()) for end in ends)
    key = bytes(range(32))
    sender, receiver = RankConnection(sending, key, 1, 0), RankConnection(receiving, key, 0, 1)
    sender.send({"step": 3})
    assert receiver.recv() == {"step": 3}
    stranger = RankConnection(sending, bytes(32), 1, 0)
    stranger._sent = 1
    stranger.send(Armed())
    with pytest.raises(ConnectionError, match="does not match its digest"):
        receiver.recv()
    # a replayed message is refused too, and so is a message sent back in the other direction
    for side, sent in ((1, 0), (0, 1)):
        again = RankConnection(sending, key, side, 1 - side)
        again._sent = sent
        again.send(Armed())
        with pytest.raises(ConnectionError, match="does not match its digest"):
            receiver.recv()
    sending.close()
    with pytest.raises(EOFError):
        receiver.recv()


def from_another_machine(rank, interface):
    """Exchange messages between ranks that believe they are on two machines."""
    rank_sockets.machine_digest = lambda: f"machine {rank}"
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    if interface is None:
        # imitate a machine whose name resolves only to the loopback
        network_interfaces.resolve_host = lambda host: ["127.0.1.1"]
    try:
        return RankExchange(dist.group.WORLD).decide(lambda: rank, lambda results: [results] * 2)
    except DistattnError as error:
        return str(error)


def test_ranks_of_other_machines_come_by_the_interface_of_gloo():
    assert run_on_ranks(2, from_another_machine, "lo") == [[0, 1], [0, 1]]
    first, second = run_on_ranks(2, from_another_machine, None)
    assert "no address is known under which other machines reach this one; name the interface" in first
    assert second == f"rank 0 of the group: {first}"
    first, _ = run_on_ranks(2, from_another_machine, "nosuch0")
    assert first == "GLOO_SOCKET_IFNAME: nosuch0 has no address here; name an interface of `ip addr`."
