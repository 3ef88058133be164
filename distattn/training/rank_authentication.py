"""Proof that all ranks know the job's secret. It is needed because PyTorch's store, gloo and NCCL let any process join."""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.ir.errors import DistattnError, named_ranks
from distattn.parallel.runtime.communication.communicator import sendable_device
from distattn.parallel.runtime.communication.sealed_values import use_secret
from distattn.training.job_secret import read_secret

_BYTES = 32


def authenticate_ranks(file: Path) -> None:
    """Let all ranks of the default group prove to each other that they know the secret in `file`. A collective call.

    Every rank draws a random number, and every proof covers all of them, so no proof can be replayed. Nothing is
    unpickled before that. Ranks that know the secret raise DistattnError naming the ranks that do not.
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
            f"{named_ranks(unproven)} did not prove to know the secret in {file}: a process of another job or user, "
            "or one that reads another run folder."
        )
    use_secret(secret)


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
