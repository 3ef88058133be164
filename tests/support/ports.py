"""Ports that other processes hardly take before a test has them."""

import random
import socket

# below the range from which Linux assigns ports by default
_LOWEST, _HIGHEST = 15000, 32000


def free_ports(count: int) -> list[int]:
    """Return different ports of the loopback on which no process listens now."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(_LOWEST, _HIGHEST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.add(port)
    return list(ports)
