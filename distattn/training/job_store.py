"""The store through which a job's ranks rendezvous. Rank 0 hosts it and listens only on the given address.

PyTorch's own rendezvous by environment variables listens on all interfaces.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from distattn.ir.errors import DistattnError
from distattn.parallel.runtime.communication.network_interfaces import listening_socket, resolve_host


def job_store() -> dict[str, Any]:
    """Return arguments for `torch.distributed.init_process_group` that join the job described by the environment.

    The environment has MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE, as torchrun sets them. With
    TORCHELASTIC_USE_AGENT_STORE torchrun's agent hosts the store, otherwise rank 0 does. Each restart uses another key prefix.
    Raises DistattnError if rank 0 cannot listen on the address.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store_arguments: dict[str, Any] = {"world_size": ranks, "timeout": default_pg_timeout}
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        store_arguments |= {"is_master": True, "master_listen_fd": _listen(host, port, ranks)}
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"distattn/attempt {attempt}", dist.TCPStore(host, port, **store_arguments))
    return {"store": store, "rank": rank, "world_size": ranks}


def _listen(host: str, port: int, ranks: int) -> int:
    """Return the file descriptor of a socket that listens on the address of `host`, a name of this machine."""
    addresses = resolve_host(host)
    if not addresses:
        raise DistattnError(f"MASTER_ADDR: {host} does not resolve; name an address of rank 0's machine.")
    try:
        return listening_socket(addresses[0], port, ranks).detach()
    except OSError as error:
        raise DistattnError(
            f"MASTER_ADDR: rank 0 cannot listen on {addresses[0]}, port {port} ({error.strerror}); name an address of rank 0's "
            "own machine, or start ranks by torchrun, whose agent holds the store."
        ) from None
