"""Ranks of one machine meet on its loopback: torchrun's own rendezvous listens on all interfaces.

A store for each attempt, too: PyTorch's own is kept over restarts, with the addresses of the dead ranks in it (pytorch#167288).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from distattn.parallel.runtime.interfaces import LOOPBACK, listening_socket

# rdzv_backend of torchrun's `LaunchConfig`
RENDEZVOUS = "distattn-loopback"
_GLOO_INTERFACE, _INTERFACE = "GLOO_SOCKET_IFNAME", "lo"
# connections that the store may not have taken yet
_WAITING = 1024


@contextmanager
def gloo_on_loopback() -> Iterator[None]:
    """Ranks that are started meanwhile have gloo listen on the loopback, unless the environment names an interface."""
    named = os.environ.get(_GLOO_INTERFACE)
    os.environ[_GLOO_INTERFACE] = named or _INTERFACE
    try:
        yield
    finally:
        if named is None:
            del os.environ[_GLOO_INTERFACE]
        else:
            os.environ[_GLOO_INTERFACE] = named


class _LoopbackRendezvous(RendezvousHandler):
    """Of one agent alone, whose store its ranks use."""

    def __init__(self, parameters: RendezvousParameters):
        self._run = parameters.run_id
        self._closed = False

    def get_backend(self) -> str:
        return RENDEZVOUS

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        server = listening_socket(LOOPBACK, 0, _WAITING)
        port = server.getsockname()[1]
        store = dist.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, port))

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        self._closed = True

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run

    def shutdown(self) -> bool:
        self._closed = True
        return True


rendezvous_handler_registry.register(RENDEZVOUS, _LoopbackRendezvous)
