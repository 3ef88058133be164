"""What ranks tell each other about a checkpoint: everybody gets rank 0's answer, or the same failure."""

import json
import os
import socket
from datetime import timedelta

import pytest
import torch.distributed as dist
from processes import run_on_ranks

from distattn.checkpoints import rank_sockets
from distattn.checkpoints.rank_exchange import RankExchange, RankFailure
from distattn.ir.errors import DamagedDataError, LostRankError


def answers(rank):
    exchange = RankExchange(dist.group.WORLD)
    found = [exchange.decide(lambda: rank * 10, lambda results: [sum(results) + r for r in range(len(results))])]
    # more than a socket holds at once
    found.append(len(exchange.decide(lambda: bytes(3_000_000), lambda results: [b"".join(results)] * 3)))
    exchange.close()
    return found


def test_every_rank_gets_its_answer():
    assert run_on_ranks(3, answers) == [[30, 9_000_000], [31, 9_000_000], [32, 9_000_000]]


def failures(rank):
    exchange, found = RankExchange(dist.group.WORLD), []

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
        found.append((failure.kind, failure.rank, failure.what, type(failure.raised()).__name__))
    # and nothing is out of step
    assert exchange.decide(lambda: rank, lambda results: [results] * 3) == [0, 1, 2]
    exchange.close()
    return found


def test_every_rank_hears_of_the_same_failure():
    wanted = [
        ("files", 1, "a/file: No space left", "DistattnError"),
        ("damaged", 2, "file: is damaged.", "DamagedDataError"),
        ("error", 0, "KeyError: 'x'", "DistattnError"),
    ]
    assert run_on_ranks(3, failures) == [wanted] * 3


def one_does_not_come(rank):
    rank_sockets.timeout_of = lambda group: timedelta(seconds=2)
    if rank == 2:
        return ""
    try:
        RankExchange(dist.group.WORLD)
    except LostRankError as error:
        return str(error)
    return ""


def test_a_rank_that_does_not_come_is_named():
    first, second, _ = run_on_ranks(3, one_does_not_come)
    assert first.startswith("rank 2 of the group did not come to open the checkpoints")
    # it has done its part, and hears of it when it next asks
    assert second == ""


def with_strangers(rank):
    """Somebody who does not know the key, and one who says nothing, connect before rank 1 does."""
    rank_sockets._CONNECT_SECONDS = 0.2
    if rank == 1:
        connect = rank_sockets._connect

        def connect_after_strangers(store, *given):
            store.wait(["root"], timedelta(seconds=60))
            port = json.loads(store.get("root"))["port"]
            strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
            strangers[0].sendall(bytes(36))
            strangers[1].sendall(b"GET / HTTP/1.0\r\n\r\n")
            connection = connect(store, *given)
            for stranger in strangers:
                stranger.close()
            return connection

        rank_sockets._connect = connect_after_strangers
    exchange = RankExchange(dist.group.WORLD)
    return exchange.decide(os.getpid, lambda results: [results] * 2)


def test_strangers_are_not_let_in():
    first, second = run_on_ranks(2, with_strangers)
    assert first == second and len(set(first)) == 2


def from_another_machine(rank):
    if rank == 1:
        rank_sockets.machine_digest = lambda: "other"
    return RankExchange(dist.group.WORLD).decide(lambda: rank, lambda results: [results] * 2)


def test_ranks_of_other_machines_find_rank_0_by_its_name():
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        pytest.skip("the name of this machine does not resolve")
    assert run_on_ranks(2, from_another_machine) == [[0, 1], [0, 1]]
