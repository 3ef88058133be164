"""The words by which ranks with a model tell ranks that only serve what comes next."""

# H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

import struct
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from distattn.batch.planner import Shape
from distattn.ir.errors import DistattnError
from distattn.ir.plan import DTYPE_BYTES
from distattn.kernels.spec import ScoreMod

STOP, TELL, OVER, PREPARE, FORWARD, BACKWARD = range(6)
_PHASES = {"prepare": PREPARE, "forward": FORWARD, "backward": BACKWARD}
_DTYPES = list(DTYPE_BYTES)
_WORD = "<8q2d"
_NOTHING = (1, 1, 1, 1, 0, 0, 0.0, 0.0)


class Word(NamedTuple):
    """What the ranks of the pool do next. number: of the batch for a pass or a program, of the step when one is told or over."""

    phase: int
    number: int
    shape: Shape
    scale: float
    softcap: float


class Words:
    """From the pool's first rank to its servers, on a group that nothing else uses."""

    def __init__(self, group: dist.ProcessGroup, servers: int, patience: timedelta):
        self.group, self.rank, self.patience = group, dist.get_rank(group), patience
        ranks = dist.get_world_size(group)
        self.servers = range(ranks - servers, ranks)
        self._sent: list[tuple[Any, torch.Tensor]] = []

    def say(self, phase: str, batch: int, shape: Shape, score: ScoreMod) -> None:
        """A pass ("forward", "backward") begins, or a program is made ready ("prepare"). Only the first rank speaks."""
        if score.slopes_H is not None:
            raise DistattnError("ALiBi slopes do not reach ranks that only serve; use a pool without servers.")
        numbers = (*shape[:4], _DTYPES.index(shape.dtype), shape.window or 0)
        self._send(struct.pack(_WORD, _PHASES[phase], batch, *numbers, score.scale, score.softcap))

    def tell(self, step: int) -> None:
        """All ranks tell each other of a step now."""
        self._send(struct.pack(_WORD, TELL, step, *_NOTHING))

    def over(self, step: int) -> None:
        """The batches of a step will not be used any more."""
        self._send(struct.pack(_WORD, OVER, step, *_NOTHING))

    def stop(self) -> None:
        """There will be no more."""
        self._send(struct.pack(_WORD, STOP, 0, *_NOTHING))
        for work, _ in self._sent:
            work.wait(self.patience)

    def assemble(self) -> None:
        """Every rank is here; raises DistattnError naming those that are not within the pool's patience."""
        try:
            dist.monitored_barrier(self.group, self.patience, wait_all_ranks=True)
        except RuntimeError as error:
            raise DistattnError(f"a rank of the pool does not answer: {error}") from None

    def listen(self) -> Word:
        """The next word."""
        data = torch.empty(struct.calcsize(_WORD), dtype=torch.uint8)
        try:
            dist.recv(data, dist.get_global_rank(self.group, 0), self.group)
        except RuntimeError as error:
            raise DistattnError(f"the pool's first rank has gone without a word: {error}") from None
        phase, number, *numbers, scale, softcap = struct.unpack(_WORD, bytes(data.tolist()))
        heads, kv_heads, head_dim, v_head_dim, dtype, window = numbers
        shape = Shape(heads, kv_heads, head_dim, v_head_dim, _DTYPES[dtype], window or None)
        return Word(phase, number, shape, scale, softcap)

    def _send(self, word: bytes) -> None:
        if self.rank == 0:
            data = torch.frombuffer(bytearray(word), dtype=torch.uint8)
            # a server that does not listen shall not hold up the others here
            self._sent = [(work, data) for work, data in self._sent if not work.is_completed()]
            for server in self.servers:
                self._sent.append((dist.isend(data, dist.get_global_rank(self.group, server), self.group), data))
