"""Ports that hardly anybody else takes before a test has them."""

import random
import socket

# below those that Linux gives whoever asks for any, by default
_LOWEST, _HIGHEST = 15000, 32000


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback that nobody listens on now."""
    found: set[int] = set()
    while len(found) < count:
        port = random.SystemRandom().randrange(_LOWEST, _HIGHEST)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.add(port)
    return list(found)
