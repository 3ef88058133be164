"""The sockets on which processes wait for connections."""

import contextlib
from collections.abc import Iterator

import psutil


def listening_addresses(process: psutil.Process) -> list[tuple[str, int]]:
    """Return (address, port) of the TCP sockets on which a process waits for connections; none if it has just ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        connections = process.net_connections("tcp")
        # IPv6 sockets with IPv4 addresses are listed as IPv4
        return [
            (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
            for connection in connections
            if connection.status == psutil.CONN_LISTEN
        ]
    return []


def family_of(number: int) -> Iterator[psutil.Process]:
    """Yield a process and all its descendants."""
    first = psutil.Process(number)
    yield first
    yield from first.children(recursive=True)
