"""Ranks that only compute attention: `serve`, and the words by which ranks with a model tell them what comes next."""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

import struct
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from distattn.batches import Shape, ShardedBatch
from distattn.errors import DistattnError
from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.score import Score
from distattn.plan import DTYPE_BYTES

if TYPE_CHECKING:
    from distattn.pool import Heard

_STOP, _TELL, _OVER, _PREPARE, _FORWARD, _BACKWARD = range(6)
_PHASES = {"prepare": _PREPARE, "forward": _FORWARD, "backward": _BACKWARD}
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

    def say(self, phase: str, batch: int, shape: Shape, score: Score) -> None:
        """A pass ("forward", "backward") begins, or a program is made ready ("prepare"). Only the first rank speaks."""
        if score.slopes_H is not None:
            raise DistattnError("ALiBi slopes do not reach ranks that only serve; use a pool without servers.")
        numbers = (*shape[:4], _DTYPES.index(shape.dtype), shape.window or 0)
        self._send(struct.pack(_WORD, _PHASES[phase], batch, *numbers, score.scale, score.softcap))

    def tell(self, step: int) -> None:
        """All ranks tell each other of a step now."""
        self._send(struct.pack(_WORD, _TELL, step, *_NOTHING))

    def over(self, step: int) -> None:
        """The batches of a step will not be used any more."""
        self._send(struct.pack(_WORD, _OVER, step, *_NOTHING))

    def stop(self) -> None:
        """There will be no more."""
        self._send(struct.pack(_WORD, _STOP, 0, *_NOTHING))
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

    device = torch.device(device)
    counts = {_PREPARE: 0, _FORWARD: 0, _BACKWARD: 0}
    with Pool.joined(group, device) as pool:
        assert pool.words is not None
        steps: dict[int, Future[Heard]] = {}
        while (word := pool.words.listen()).phase != _STOP:
            if word.phase == _TELL:
                steps[word.number] = pool.hear()
            elif word.phase == _OVER:
                steps.pop(word.number, None)
            else:
                counts[word.phase] += 1
                batch = _batch(steps, word.number)
                if word.phase == _PREPARE:
                    batch.ready(word.shape, device)
                else:
                    join(batch, word.phase == _FORWARD, word.shape, device, (word.scale, word.softcap))
    return Served(counts[_FORWARD], counts[_BACKWARD])


def _batch(steps: dict[int, Future[Heard]], number: int) -> ShardedBatch:
    """The batch of that number, of the steps that are not over."""
    for heard in steps.values():
        for batch in _answer(heard).made:
            if batch.number == number:
                return batch
    raise DistattnError(f"batch {number} is of a step that is over, or that nobody has told of.")


def _answer(heard: Future[Heard]) -> Heard:
    try:
        return heard.result()
    except RuntimeError as error:
        raise DistattnError(f"the pool's other ranks are gone: {error}") from None


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
