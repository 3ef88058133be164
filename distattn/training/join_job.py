"""Let a rank join its job: ranks rendezvous through a store, and prove to each other that they know the job's secret.

PyTorch's own rendezvous through environment variables is not used, because it listens on all interfaces. The proof is
needed because PyTorch's store, gloo and NCCL let any process join.
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from distattn.ir.errors import DistattnError, named_ranks
from distattn.parallel.runtime.communication.communicator import sendable_device
from distattn.parallel.runtime.communication.network_interfaces import listening_socket, resolve_host
from distattn.parallel.runtime.communication.sealed_values import use_secret
from distattn.training.job_secret import read_secret

_BYTES = 32


def job_store() -> dict[str, Any]:
    """Return arguments for `torch.distributed.init_process_group` that join the job described by the environment.

    The environment has MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE, as torchrun sets them. If TORCHELASTIC_USE_AGENT_STORE is
    "True", torchrun's agent hosts the store; otherwise rank 0 hosts it and listens only on MASTER_ADDR. Each restart uses a
    different key prefix. Raises DistattnError if rank 0 cannot listen there.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store_arguments: dict[str, Any] = {"world_size": ranks, "timeout": default_pg_timeout}
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        store_arguments |= {"is_master": True, "master_listen_fd": _listen(host, port, ranks)}
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"distattn/attempt {attempt}", dist.TCPStore(host, port, **store_arguments))
    return {"store": store, "rank": rank, "world_size": ranks}


def authenticate_ranks(file: Path) -> None:
    """Let all ranks of the default group prove to each other that they know the secret in `file`. A collective call.

    Every rank draws a random number, and every proof covers all these numbers, so no proof can be replayed. Nothing is
    unpickled before the proofs have been checked. Ranks that know the secret raise DistattnError naming the ranks that
    do not.
    """
    # a rank that cannot read the secret still takes part, so that the other ranks can name it
    try:
        secret, error = read_secret(file), None
    except DistattnError as unreadable:
        secret, error = secrets.token_bytes(_BYTES), unreadable
    numbers = b"".join(_exchange(secrets.token_bytes(_BYTES)))
    proofs = _exchange(_proof(secret, dist.get_rank(), numbers))
    if error is not None:
        raise error
    unproven = [
        rank for rank, proof in enumerate(proofs) if not hmac.compare_digest(proof, _proof(secret, rank, numbers))
    ]
    if unproven:
        raise DistattnError(
            f"{named_ranks(unproven)} did not prove knowledge of the secret in {file}; check that every rank is a process "
            "of this job and user, and reads the same run folder."
        )
    use_secret(secret)


def _listen(host: str, port: int, ranks: int) -> int:
    """Return the file descriptor of a socket that listens on the address to which `host`, a name of this machine, resolves."""
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


def _proof(secret: bytes, rank: int, numbers: bytes) -> bytes:
    return hmac.digest(secret, rank.to_bytes(4, "little") + numbers, "sha256")


def _exchange(content: bytes) -> list[bytes]:
    """Return every rank's bytes, in rank order. All ranks must pass the same number of bytes."""
    mine: Tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    group = dist.group.WORLD
    assert group is not None
    mine = mine.to(sendable_device(group))
    from_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(from_ranks, mine)
    return [received.cpu().numpy().tobytes() for received in from_ranks]
