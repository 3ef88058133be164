"""The sockets on which processes listen."""

import contextlib
from collections.abc import Iterator

import psutil


def listening_addresses(process: psutil.Process) -> list[tuple[str, int]]:
    """Return (address, port) of the TCP sockets on which a process listens, or an empty list if the process has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        connections = process.net_connections("tcp")
        # IPv4 addresses on IPv6 sockets are listed as IPv4
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
