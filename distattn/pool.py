"""`Pool`: data- and context-parallel ranks that compute each other's attention.

Every rank has its own documents. All of them together are one token axis, on which attention is shared out anew every
step; everything else stays where the data came. All ranks make the same number of attention calls: who has run out of data
joins with none.
"""

# T tokens on this rank

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist

from distattn.batches import Axis, Planner, Shape, ShardedBatch
from distattn.cluster.describe import Machines
from distattn.errors import DistattnError
from distattn.kernels.dispatch import Kernel
from distattn.kernels.score import Score
from distattn.layout import Layout, lay_out
from distattn.mask import Mask
from distattn.parallel.make_plan import STRATEGIES
from distattn.parallel.transport import group_beside
from distattn.parallel.work import Price
from distattn.plan import Plan, take
from distattn.programs import Watch, open_transport
from distattn.rows import IGNORE_INDEX, Rows
from distattn.rows import layout_options as checked_options
from distattn.serving import Words
from distattn.speeds import Speeds

_FOREVER = timedelta(days=30)
# rows of a kernel's tile, for what passes cost
_BLOCK = 128
# the documents of each block of ranks that have one batch together
Documents = tuple[tuple[int, ...], ...]


class Told(NamedTuple):
    """What a rank tells the others of a step: the documents of its micro-batches, their labels, and how fast it has been.

    ended: it has no more steps. last: nor will there be others, the pool is closing.
    """

    documents: list[tuple[int, ...]]
    labels: int
    ended: bool
    speed: float | None = None
    last: bool = False


class Pool(Planner):
    """Shares out the attention of all ranks of a group, each with its own documents.

    group: the data-parallel x context-parallel ranks with one tensor-parallel index; the default group by default.
    context_parallel: so many neighbouring ranks get the same batch and split it by `layout`. servers: the last so many ranks
    have no model and run `serve` instead; layers: the shapes of the model's attention layers, which servers then prepare
    for before they are asked. adaptive: attention is shared out by measured speeds, or by a log of them (see `Speeds`).
    patience: seconds after which a rank that does not answer is named. The others as in `ContextParallel`.
    Sum gradients over the ranks with a model: losses are scaled for that.

        with Pool(group) as pool:
            for micro_batches in pool.steps(loader):
                for batch in micro_batches:
                    local_loss(model, batch).backward()
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        strategy: str = "cad",
        context_parallel: int = 1,
        layout: str = "zigzag",
        layout_options: Mapping[str, int] | None = None,
        servers: int = 0,
        layers: Sequence[Shape] = (),
        adaptive: bool | Sequence[Sequence[int] | None] = False,
        patience: float = 600.0,
        inner: str | tuple[int, int] = "causal",
        kernel: str | None = None,
        backward: str | None = None,
        wire: str | None = None,
        cluster: Machines | None = None,
        options: Mapping[str, object] | None = None,
        capacity: int | None = None,
        verify_every: int = 100,
        host: dist.ProcessGroup | None = None,
    ):
        """host: a gloo group of the same ranks; one is made by default."""
        settings = {
            name: value for name, value in locals().items() if name not in ("self", "group", "host", "__class__")
        }
        of_layout = checked_options(layout, layout_options, inner)

        def axis(documents: Documents) -> tuple[Mask, Layout]:
            return pooled(documents, context_parallel, self.ranks, layout, of_layout, inner)

        how: dict[str, Any] = dict(strategy=strategy, kernel=kernel, backward=backward, cluster=cluster)
        super().__init__(group, axis, wire=wire, options=options, capacity=capacity, verify_every=verify_every, **how)
        self._check(strategy, backward, servers, context_parallel, adaptive)
        self.context_parallel, self.servers, self._layout = context_parallel, servers, (layout, of_layout, inner)
        self.models, self.layers = self.ranks - servers, tuple(layers)
        self.speeds = Speeds(adaptive, self.ranks) if adaptive else None
        self._teller = ThreadPoolExecutor(1, "distattn-pool")
        # ranks that only serve wait between steps for as long as it takes
        self._patience = timedelta(seconds=patience) if self.rank < self.models else _FOREVER
        if self.group is not None:
            # what ranks tell each other travels beside everything else, on the host
            self._host = host or group_beside(self.group, _FOREVER, backend="gloo")
            if servers and host is None:
                _compare(settings, self._host)
            open_transport(self.group, timedelta(seconds=patience))
            if servers:
                self.words = Words(group_beside(self.group, _FOREVER, backend="gloo"), servers)

    @staticmethod
    def joined(group: dist.ProcessGroup | None = None) -> Pool:
        """The pool of a rank that only serves, as the others have made it."""
        if not (dist.is_available() and dist.is_initialized()):
            raise DistattnError("a server needs torch.distributed; call init_process_group first.")
        host = group_beside(group or cast(dist.ProcessGroup, dist.group.WORLD), _FOREVER, backend="gloo")
        pool = Pool(group, **_compare(None, host), host=host)
        pool.needs.update((shape, torch.device("cpu")) for shape in pool.layers)
        return pool

    def steps(self, loader: Iterable[Any]) -> Iterator[list[dict[str, Any]]]:
        """For each step its micro-batches, as many as the rank with most has; as many steps as the longest loader.

        loader yields a batch, or a list of batches (micro-batches): `input_ids` (B, S), optional `labels` and
        `document_lengths` as in `ContextParallel.shard`; ranks of one context-parallel block the same. Each comes back as
        there: `input_ids`, `labels` and `position_ids` (1, T), `loss_scale` = 1 / valid labels of all ranks and micro-batches
        of the step, and `context_parallel` for the model. Documents are told to the others one step ahead, and plans
        are made meanwhile.
        """
        for rows, told in self.told(loader):
            batches = self._batches_of(told)
            scale = self.loss_scale(told)
            padded = itertools.islice(itertools.chain(rows, itertools.repeat(None)), len(batches))
            yield [
                {**self.part(own), "loss_scale": scale, "context_parallel": batch}
                for own, batch in zip(padded, batches, strict=True)
            ]

    def told(self, loader: Iterable[Any]) -> Iterator[tuple[list[Rows], list[Told]]]:
        """For each step of the loader, this rank's micro-batches and what all ranks tell of theirs, heard a step ahead."""
        given = iter(loader)
        ahead = self._tell(next(given, None))
        while True:
            rows, told = ahead[0], self._heard(ahead[1])
            if all(rank.ended for rank in told):
                return
            ahead = self._tell(next(given, None))
            yield rows, told

    def loss_scale(self, told: list[Told]) -> float:
        """1 / valid labels of the step."""
        return 1.0 / max(sum(rank.labels for rank in told[: self.models : self.context_parallel]), 1)

    def hear_step(self) -> dict[int, ShardedBatch] | None:
        """For ranks that only serve: the next step's batches by number; none if there was no step, None if the pool closes."""
        speed = None if self.speeds is None else self.speeds.measured()
        told = self._exchange(Told([], 0, True, speed))
        if any(rank.last for rank in told):
            return None
        return {batch.number: batch for batch in self._batches_of(told)}

    def watch(self, batch: ShardedBatch, plan: Plan, shape: Shape) -> Watch | None:
        """Who is told of the batch's passes: servers, and the clock."""
        return _Watch(self, batch.number, plan, shape) if self.servers or self.speeds is not None else None

    def close(self) -> None:
        """Let servers go, and end the pool's threads. Every rank calls it."""
        if self.servers and self.rank < self.models:
            self._teller.submit(self._exchange, Told([], 0, True, last=True)).result()
            self.words.stop()
        self._teller.shutdown()
        self.worker.shutdown()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()

    def _check(
        self, strategy: str, backward: str | None, servers: int, context_parallel: int, adaptive: object
    ) -> None:
        if not 0 <= servers < self.ranks:
            raise DistattnError(f"servers is 0 to {self.ranks - 1} of the pool's {self.ranks} ranks, not {servers}.")
        if context_parallel < 1 or (self.ranks - servers) % context_parallel:
            raise DistattnError(
                f"context_parallel {context_parallel} does not divide the {self.ranks - servers} ranks with a model."
            )
        if servers and (backward or STRATEGIES[strategy].backward) == "keep":
            raise DistattnError('servers keep nothing from pass to pass; use backward "refetch-home".')
        if adaptive and "speeds" not in inspect.signature(STRATEGIES[strategy].forward).parameters:
            raise DistattnError(f'strategy {strategy} does not share out by speed; adaptive needs "cad".')

    def _tell(self, step: Any) -> tuple[list[Rows], Future[list[Told]]]:
        given = [] if step is None else [step] if isinstance(step, Mapping) else step
        rows = [Rows.of(batch) for batch in given]
        speed = None if self.speeds is None else self.speeds.measured()
        told = Told([own.lengths for own in rows], sum(own.labels for own in rows), step is None, speed)
        return rows, self._teller.submit(self._exchange, told)

    def _exchange(self, told: Told) -> list[Told]:
        if self.group is None:
            return [told]
        everyone: list[Any] = [None] * self.ranks
        # names who is missing, which a gather does not
        dist.monitored_barrier(self._host, self._patience, wait_all_ranks=True)
        dist.all_gather_object(everyone, told, group=self._host)
        return everyone

    def _heard(self, answer: Future[list[Told]]) -> list[Told]:
        try:
            return answer.result()
        except RuntimeError as error:
            raise DistattnError(f"a rank of the pool does not answer: {error}") from None

    def _batches_of(self, told: list[Told]) -> list[ShardedBatch]:
        count = max((len(rank.documents) for rank in told), default=0)
        if not count:
            return []
        options = () if self.speeds is None else self.speeds.options([rank.speed for rank in told])
        blocks = [rank.documents for rank in told[: self.models : self.context_parallel]]
        each = [tuple(own[number] if number < len(own) else () for own in blocks) for number in range(count)]
        return [self.batch(Axis(documents, options)) for documents in each]

    def part(self, rows: Rows | None) -> dict[str, Any]:
        """`input_ids`, `labels` and `position_ids` (1, T) of this rank; a padding token where it has no micro-batch."""
        if rows is None:
            nothing = torch.zeros(1, 1, dtype=torch.int64)
            return {"input_ids": nothing, "labels": nothing + IGNORE_INDEX, "position_ids": nothing}
        own = _laid_out(rows.lengths, self.context_parallel, *self._layout)
        return rows.part(own, self.rank % self.context_parallel)


class _Watch:
    """Tells servers of a batch's passes, and the clock what they cost."""

    def __init__(self, pool: Pool, batch: int, plan: Plan, shape: Shape):
        self.pool, self.number, self.shape = pool, batch, shape
        self.alternates = not pool.servers
        self.work: dict[str, int] = {}
        if pool.speeds is not None:
            for direction, table in (("forward", plan.forward), ("backward", plan.backward)):
                mine = take(table.tasks, table.tasks["rank"] == pool.rank)
                price = Price.on(None, direction, plan.call.head_dim, _BLOCK)
                self.work[direction] = int(price.of_tasks(plan.call, mine).sum())

    def prepares(self) -> None:
        self._say("prepare", Score(1.0))

    def begins(self, direction: str, score: Score) -> None:
        self._say(direction, score)
        if self.pool.speeds is not None:
            self.pool.speeds.passed(self.work[direction])

    def _say(self, phase: str, score: Score) -> None:
        if self.pool.servers and self.pool.rank < self.pool.models:
            self.pool.words.say(phase, self.number, self.shape, score)

    def kernel(self, kernel: Kernel) -> Kernel:
        return kernel if self.pool.speeds is None else self.pool.speeds.timed(kernel)


def pooled(
    documents: Documents,
    context_parallel: int,
    ranks: int,
    layout: str,
    options: Mapping[str, Any],
    inner: str | tuple[int, int],
) -> tuple[Mask, Layout]:
    """The axis of all blocks of ranks, end to end, and who owns what; ranks beyond the blocks own nothing."""
    lengths = [length for block in documents for length in block]
    parts = []
    token = 0
    for number, block in enumerate(documents):
        if block:
            chunks = _laid_out(block, context_parallel, layout, options, inner).chunks
            order = np.argsort(chunks["row"], kind="stable")
            own = np.stack([chunks["rank"] + number * context_parallel, chunks["t0"] + token, chunks["t1"] + token])
            parts.append(own[:, order])
            token += sum(block)
    return Mask.documents(lengths, inner), Layout(lengths, ranks, *np.concatenate(parts, 1))


def _laid_out(
    lengths: tuple[int, ...], ranks: int, layout: str, options: Mapping[str, Any], inner: str | tuple[int, int]
) -> Layout:
    if ranks == 1:
        return Layout.contiguous(lengths, 1)
    return lay_out(layout, lengths, ranks, Mask.documents(lengths, inner), **options)


def _compare(settings: dict[str, Any] | None, host: dist.ProcessGroup) -> dict[str, Any]:
    """The settings of the pool's first rank; refuses other ones. None: this rank is to be told. A collective call."""
    everyone: list[Any] = [None] * dist.get_world_size(host)
    dist.all_gather_object(everyone, settings, group=host)
    for rank, told in enumerate(everyone):
        if told is not None and told != everyone[0]:
            name = next(name for name in told if told[name] != everyone[0][name])
            raise DistattnError(f"rank {rank} of the pool has {name} = {told[name]!r}, rank 0 {everyone[0][name]!r}.")
    if everyone[0] is None:
        raise DistattnError("the pool's first rank has to have a model; servers are its last ranks.")
    serving = sum(told is None for told in everyone)
    if serving != everyone[0]["servers"]:
        raise DistattnError(f"{serving} ranks serve, the pool was made with servers={everyone[0]['servers']}.")
    return everyone[0]
