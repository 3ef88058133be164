"""Ranks that only compute attention: `serve`, and the words by which ranks with a model tell them what comes next."""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

import struct
import threading
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from distattn.batches import Shape, ShardedBatch
from distattn.errors import DistattnError
from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.score import Score
from distattn.plan import DTYPE_BYTES

if TYPE_CHECKING:
    from distattn.pool import Pool

_STOP, _PREPARE, _FORWARD, _BACKWARD = range(4)
_PHASES = {"prepare": _PREPARE, "forward": _FORWARD, "backward": _BACKWARD}
_DTYPES = list(DTYPE_BYTES)
_WORD = "<7q2d"


class Word(NamedTuple):
    """What the ranks of the pool do next: make a program ready, or a pass of a batch, for some shape; or nothing any more."""

    phase: int
    batch: int
    shape: Shape
    scale: float
    softcap: float


class Words:
    """From the pool's first rank to its servers, on a group that nothing else uses."""

    def __init__(self, group: dist.ProcessGroup, servers: int):
        self.group, self.rank = group, dist.get_rank(group)
        ranks = dist.get_world_size(group)
        self.servers = range(ranks - servers, ranks)

    def say(self, phase: str, batch: int, shape: Shape, score: Score) -> None:
        """A pass ("forward", "backward") begins, or a program is made ready ("prepare"). Only the first rank speaks."""
        if score.slopes_H is not None:
            raise DistattnError("ALiBi slopes do not reach ranks that only serve; use a pool without servers.")
        numbers = (*shape[:4], _DTYPES.index(shape.dtype))
        self._send(struct.pack(_WORD, _PHASES[phase], batch, *numbers, score.scale, score.softcap))

    def stop(self) -> None:
        """There will be no more."""
        self._send(struct.pack(_WORD, _STOP, *[0] * 6, 0.0, 0.0))

    def listen(self) -> Word:
        """The next word."""
        data = torch.empty(struct.calcsize(_WORD), dtype=torch.uint8)
        try:
            dist.recv(data, dist.get_global_rank(self.group, 0), self.group)
        except RuntimeError as error:
            raise DistattnError(f"the pool's first rank has gone without a word: {error}") from None
        phase, batch, *numbers, scale, softcap = struct.unpack(_WORD, bytes(data.tolist()))
        return Word(
            phase, batch, Shape(numbers[0], numbers[1], numbers[2], numbers[3], _DTYPES[numbers[4]]), scale, softcap
        )

    def _send(self, word: bytes) -> None:
        if self.rank == 0:
            data = torch.frombuffer(bytearray(word), dtype=torch.uint8)
            for server in self.servers:
                dist.send(data, dist.get_global_rank(self.group, server), self.group)


class Served(NamedTuple):
    """What a server did: passes it joined, forward and backward."""

    forward: int
    backward: int


def serve(group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> Served:
    """Compute attention for the other ranks of a pool until they close it. For its last ranks, without a model.

    The pool's other ranks make `Pool(group, servers=...)`; everything else this rank is told. Raises DistattnError when they are
    gone without a word, and what their plans raise.
    """
    from distattn.pool import Pool

    with Pool.joined(group) as pool:
        rounds = _Rounds(pool)
        counts = {_PREPARE: 0, _FORWARD: 0, _BACKWARD: 0}
        while (word := pool.words.listen()).phase != _STOP:
            counts[word.phase] += 1
            batch = rounds.batch(word.batch)
            if word.phase == _PREPARE:
                batch.ready(word.shape, torch.device(device))
            else:
                score = word.scale, word.softcap
                join(batch, word.phase == _FORWARD, word.shape, torch.device(device), score)
        rounds.join()
    return Served(counts[_FORWARD], counts[_BACKWARD])


def join(
    batch: ShardedBatch, forward: bool, shape: Shape, device: torch.device, score: tuple[float, float] = (1.0, 0.0)
) -> None:
    """Take part in one pass of a batch without tokens of one's own. score: scale and soft cap of the others' scores."""
    ready = batch.ready(shape, device)
    dtype = getattr(torch, shape.dtype)

    def nothing(heads: int, *width: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty((0, heads, *width), dtype=dtype, device=device)

    q, k, v = (
        nothing(shape.heads, shape.head_dim),
        nothing(shape.kv_heads, shape.head_dim),
        nothing(shape.kv_heads, shape.v_head_dim),
    )
    with torch.no_grad():
        if forward:
            torch.ops.distattn.forward(q, k, v, None, None, ready.handle, ready.kept, *score)
            return
        o = nothing(shape.heads, shape.v_head_dim)
        lse = torch.empty((shape.heads, 0), dtype=accumulation_dtype(dtype), device=device)
        kept = q.new_empty(ready.kept)
        torch.ops.distattn.backward(o, None, q, k, v, None, None, o, lse, kept, ready.handle, *score)


class _Rounds:
    """The batches of the last steps by their number, made as on all other ranks from what these tell; heard on a thread."""

    def __init__(self, pool: Pool):
        self.pool = pool
        # a step's last pass is over when the step after the next is told
        self._steps: deque[dict[int, ShardedBatch]] = deque(maxlen=3)
        self._news = threading.Condition()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._listen, name="distattn-rounds", daemon=True)
        self._thread.start()

    def batch(self, number: int) -> ShardedBatch:
        """That batch, once it has been told."""
        with self._news:
            self._news.wait_for(lambda: self._failure or any(number in step for step in self._steps))
            for step in self._steps:
                if number in step:
                    return step[number]
            raise DistattnError(f"the pool's other ranks are gone: {self._failure}")

    def join(self) -> None:
        """Wait until the pool closes."""
        self._thread.join()

    def _listen(self) -> None:
        try:
            while (heard := self.pool.hear_step()) is not None:
                with self._news:
                    if heard:
                        self._steps.append(heard)
                    self._news.notify_all()
        except Exception as error:
            with self._news:
                self._failure = error
                self._news.notify_all()
