"""Where processes wait for connections."""

import contextlib
from collections.abc import Iterator

import psutil


def listening_addresses(process: psutil.Process) -> list[tuple[str, int]]:
    """(address, port) of the TCP sockets on which a process waits for connections; none of one that has just ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = process.net_connections("tcp")
        # IPv6 sockets of addresses of IPv4 are told as those
        return [
            (one.laddr.ip.removeprefix("::ffff:"), one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN
        ]
    return []


def family_of(number: int) -> Iterator[psutil.Process]:
    """A process and all that come of it."""
    first = psutil.Process(number)
    yield first
    yield from first.children(recursive=True)
