"""Free ports that other processes are unlikely to take before a test uses them."""

import random
import socket

# this range is below the range from which Linux assigns ports by default
_LOWEST, _HIGHEST = 15000, 32000


def free_ports(count: int) -> list[int]:
    """Return `count` distinct loopback ports on which no process listens now."""
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
