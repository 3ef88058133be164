"""The address of the interface at which other ranks reach this machine, for sockets that must not listen on all interfaces."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from distattn.ir.errors import DistattnError
from distattn.parallel.runtime.communication.collective_calls import default_store

LOOPBACK = "127.0.0.1"
# Linux's ioctl for an interface's IPv4 address, and its table of IPv6 addresses
_SIOCGIFADDR = 0x8915
_IPV6_TABLE = Path("/proc/net/if_inet6")
# the scope of globally valid IPv6 addresses
_GLOBAL_SCOPE = "00"


def reachable_address() -> str:
    """Return the numeric address at which ranks on other machines can reach this machine.

    It is the address of the first interface named in GLOO_SOCKET_IFNAME. If that variable is not set, it is the address of
    the interface that reaches the job's store or, failing that, the address that this machine's name resolves to, as in gloo.
    Raise DistattnError if no address is found.
    """
    if names := os.environ.get("GLOO_SOCKET_IFNAME"):
        name = names.split(",")[0].strip()
        address = interface_address(name)
        if address is None:
            raise DistattnError(f"GLOO_SOCKET_IFNAME: {name} has no address here; name an interface of `ip addr`.")
        return address
    for address in (*_towards_store(), *resolve_host(socket.gethostname())):
        if not ipaddress.ip_address(address).is_loopback:
            return address
    raise DistattnError(
        f"{socket.gethostname()}: no address is known under which other machines reach this one; name the interface between "
        "the machines in GLOO_SOCKET_IFNAME."
    )


def interface_address(name: str) -> str | None:
    """Return an interface's IPv4 address, its global IPv6 address if it has no IPv4 address, or None if it has neither."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            reply = fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
            return socket.inet_ntoa(reply[20:24])
        except (OSError, struct.error):
            pass
    for line in _IPV6_TABLE.read_text("ascii").splitlines() if _IPV6_TABLE.exists() else ():
        digits, _, _, scope, _, owner = line.split()
        if owner == name and scope == _GLOBAL_SCOPE:
            return str(ipaddress.IPv6Address(int(digits, 16)))
    return None


def resolve_host(host: str) -> list[str]:
    """Return the numeric addresses that a name resolves to, or [] if it does not resolve."""
    try:
        return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, None)))
    except OSError:
        return []


def listening_socket(address: str, port: int, waiting: int) -> socket.socket:
    """Open a socket that listens on one address only. port: 0 for any free port. waiting: the backlog. Raise OSError if the
    address or port cannot be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=waiting)


def _towards_store() -> Iterator[str]:
    """Yield the address from which this machine sends to the job's store, if it is a TCPStore."""
    store = default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return
    yield from addresses_towards(store.host, store.port)


def addresses_towards(host: str, port: int) -> Iterator[str]:
    """Yield the addresses from which this machine sends to `host`, a name or an address."""
    for address in resolve_host(host):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                # this sends nothing: the system only chooses an interface
                probe.connect((address, port))
            except OSError:
                continue
            yield probe.getsockname()[0]
