"""Control messages, with which a group's first rank tells its servers what all ranks do next."""

from __future__ import annotations

from typing import NamedTuple

from distattn.batch.collectives import HostGroup
from distattn.batch.planner import AttentionShape
from distattn.ir.errors import DistattnError
from distattn.kernels.spec import ScoreMod

CLOSE, ANNOUNCE_STEP, RELEASE_STEP, NEW_SHAPE, FORWARD, BACKWARD = (
    "close",
    "announce step",
    "release step",
    "new shape",
    "forward",
    "backward",
)


class ControlMessage(NamedTuple):
    """A message that announces the next action of all ranks.

    kind: one of the constants above. number: the index of the step announced or released, or of the batch. shape, scale and
    softcap: the attention call's.
    """

    kind: str
    number: int = 0
    shape: AttentionShape | None = None
    scale: float = 1.0
    softcap: float = 0.0


class ControlChannel:
    """An ordered channel from the first rank of a group to its last `servers` ranks. Other ranks send nothing."""

    def __init__(self, host: HostGroup, servers: int):
        self._host = host
        self.servers = range(host.ranks - servers, host.ranks)

    def send(self, message: ControlMessage) -> None:
        """Send a message to all servers; this does nothing on ranks other than the first."""
        if self._host.rank == 0:
            for server in self.servers:
                self._host.send(message, server)

    def begin_pass(self, direction: str, batch: int, shape: AttentionShape, score: ScoreMod) -> None:
        """Announce a forward or backward pass of a batch. Raise DistattnError for ALiBi slopes, which messages do not carry."""
        if score.slopes_H is not None:
            raise DistattnError("ALiBi slopes do not reach ranks that only serve; use a group without servers.")
        self.send(ControlMessage(direction, batch, shape, score.scale, score.softcap))

    def receive(self) -> ControlMessage:
        """Return the next message; called on servers."""
        return ControlMessage(*self._host.receive(0, "a control message"))

    def close(self, gracefully: bool) -> None:
        """Close the channel. gracefully: True if the first rank is to release the servers first."""
        try:
            if gracefully and self._host.rank == 0:
                self.send(ControlMessage(CLOSE))
                self._host.flush()
        finally:
            self._host.close()
