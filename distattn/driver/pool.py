"""`Pool`: data- and context-parallel ranks that compute each other's attention.

Every rank has its own documents. All of them together are one token axis, on which attention is shared out anew every
step; everything else stays where the data came. All ranks make the same number of attention calls: who has run out of data
joins with none.
"""

# T tokens on this rank

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist

from distattn.batch.packed_batch import IGNORE_INDEX, Rows
from distattn.batch.packed_batch import layout_options as checked_options
from distattn.batch.planner import Axis, Planner, Shape, ShardedBatch
from distattn.cluster.spec import AnyCluster
from distattn.driver.control_channel import Words
from distattn.driver.rank_speeds import Speeds
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout, make_layout
from distattn.ir.mask import Mask
from distattn.ir.plan import Plan, select_rows
from distattn.kernels.registry import Kernel
from distattn.kernels.spec import ScoreMod
from distattn.ops.executable import Watch, open_transport
from distattn.parallel.make_plan import STRATEGIES, check_names
from distattn.parallel.runtime.transport import duplicate_group
from distattn.parallel.tables.cost import CostModel

_FOREVER = timedelta(days=30)
# batches of one step are numbered from a multiple of this
_BATCHES = 1 << 20
# rows of a kernel's tile, for what passes cost
_BLOCK = 128
# the documents of each block of ranks that have one batch together
Documents = tuple[tuple[int, ...], ...]


class Told(NamedTuple):
    """What a rank tells the others of a step: the documents of its micro-batches, their labels, and how fast it has been.

    ended: it has no more steps. content: a digest of its tokens, where others are to have the same.
    """

    documents: list[tuple[int, ...]]
    labels: int
    ended: bool
    speed: float | None = None
    content: str = ""


class Heard(NamedTuple):
    """A step as all ranks told it: its number (of all steps told so far), what each told, and what was made of it ahead."""

    number: int
    told: list[Told]
    made: Any


class Pool(Planner):
    """Shares out the attention of all ranks of a group, each with its own documents.

    group: the data-parallel x context-parallel ranks with one tensor-parallel index; the default group by default.
    context_parallel: so many neighbouring ranks get the same batch and split it by `layout`. servers: the last so many ranks
    have no model and run `serve` instead; layers: the shapes of the model's attention layers, which servers then prepare
    for before they are asked. adaptive: attention is shared out by measured speeds, or by a log of them (see `Speeds`).
    patience: seconds after which a rank that does not answer is named. verify_every: of so many steps the plans of one are
    proven before they run, those of the first in any case. The others as in `ContextParallel`.
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
        cluster: AnyCluster | None = None,
        options: Mapping[str, object] | None = None,
        capacity: int | None = None,
        verify_every: int = 100,
    ):
        settings = {name: value for name, value in locals().items() if name not in ("self", "group", "__class__")}
        self._open(group, settings, None)

    def _open(self, group: dist.ProcessGroup | None, settings: dict[str, Any], host: dist.ProcessGroup | None) -> None:
        """host: of a rank that only serves, and has been told the settings on it."""
        for_all = ("strategy", "inner", "kernel", "backward", "wire", "cluster", "options", "capacity", "verify_every")
        layout, inner, context_parallel = settings["layout"], settings["inner"], settings["context_parallel"]
        of_layout = checked_options(layout, settings["layout_options"], inner)

        def axis(documents: Documents) -> tuple[Mask, Layout]:
            return pooled(documents, context_parallel, self.ranks, layout, of_layout, inner)

        given = {name: settings[name] for name in for_all}
        check_names(given["strategy"], given["backward"], given["options"])
        if given["capacity"] is not None and _takes(given["strategy"], "max_buffer_bytes"):
            given["options"] = {"max_buffer_bytes": given["capacity"], **(given["options"] or {})}
        super().__init__(group, axis, **given)
        self._check(settings)
        servers, patience = settings["servers"], timedelta(seconds=settings["patience"])
        self.context_parallel, self.servers, self._layout = context_parallel, servers, (layout, of_layout, inner)
        self.models, self.layers = self.ranks - servers, tuple(settings["layers"])
        adaptive = settings["adaptive"]
        self.speeds = Speeds(adaptive, self.ranks) if adaptive else None
        self._teller = ThreadPoolExecutor(1, "distattn-pool")
        self._patience, self._device = patience, torch.device("cpu")
        # steps told so far, and those whose batches may be used
        self._steps, self._current = 0, set[int]()
        self.words: Words | None = None
        if self.group is not None:
            # what ranks tell each other travels beside everything else, on the host
            self._host = host or duplicate_group(self.group, _FOREVER, backend="gloo")
            if servers and host is None:
                _compare(settings, self._host)
            open_transport(self.group, patience)
            if servers:
                self.words = Words(duplicate_group(self.group, _FOREVER, backend="gloo"), servers, patience)

    @staticmethod
    def joined(group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> Pool:
        """The pool of a rank that only serves, as the others have made it."""
        if not (dist.is_available() and dist.is_initialized()):
            raise DistattnError("a server needs torch.distributed; call init_process_group first.")
        host = duplicate_group(group or cast(dist.ProcessGroup, dist.group.WORLD), _FOREVER, backend="gloo")
        pool = Pool.__new__(Pool)
        pool._open(group, _compare(None, host), host)
        for shape in pool.layers:
            pool.need(shape, device or torch.device("cpu"))
        return pool

    def steps(self, loader: Iterable[Any]) -> Iterator[list[dict[str, Any]]]:
        """For each step its micro-batches, as many as the rank with most has; as many steps as the longest loader.

        loader yields a batch, or a list of batches (micro-batches): `input_ids` (B, S), optional `labels` and
        `document_lengths` as in `ContextParallel.shard`; ranks of one context-parallel block the same. Each comes back as
        there: `input_ids`, `labels` and `position_ids` (1, T), `loss_scale` = 1 / valid labels of all ranks and micro-batches
        of the step, and `context_parallel` for the model. Documents are told to the others one step ahead, and plans
        are made meanwhile. With servers, a step's batches are used before the next step is asked for. Loops may be left, and
        be inside one another, on all ranks alike.
        """
        for rows, heard in self.told(loader, self._batches_of):
            scale = self.loss_scale(heard.told)
            padded = itertools.islice(itertools.chain(rows, itertools.repeat(None)), len(heard.made))
            yield [
                {**self.part(own), "loss_scale": scale, "context_parallel": batch}
                for own, batch in zip(padded, heard.made, strict=True)
            ]

    def told(
        self, loader: Iterable[Any], make: Callable[[int, list[Told]], Any], same: Sequence[int] | None = None
    ) -> Iterator[tuple[list[Rows], Heard]]:
        """For each step of the loader, this rank's micro-batches and what all ranks tell of theirs, heard a step ahead.

        make(number, told) is called as soon as it is heard, on a thread. same: of each rank, the rank whose data it has as well.
        """
        twins = [rank - rank % self.context_parallel for rank in range(self.models)] if same is None else same
        given = iter(loader)
        ahead = self._tell(next(given, None), make, twins)
        number = -1
        try:
            while True:
                rows, heard = ahead[1], self._heard(ahead[2], twins)
                number = ahead[0]
                if all(rank.ended for rank in heard.told):
                    return
                ahead = self._tell(next(given, None), make, twins)
                yield rows, heard
                self._over(number)
        finally:
            self._over(number)
            self._over(ahead[0])

    def loss_scale(self, told: list[Told]) -> float:
        """1 / valid labels of the step."""
        return 1.0 / max(sum(rank.labels for rank in told[: self.models : self.context_parallel]), 1)

    def hear(self) -> Future[Heard]:
        """For ranks that only serve: the next step, with its batches."""
        speed = None if self.speeds is None else self.speeds.measured()
        self._steps += 1
        return self._teller.submit(self._exchange, self._steps - 1, Told([], 0, True, speed), self._batches_of)

    def current(self, batch: int) -> bool:
        """Whether the step of a batch of that number is not over."""
        return batch // _BATCHES in self._current

    def watch(self, batch: ShardedBatch, plan: Plan, shape: Shape) -> Watch | None:
        """Who is told of the batch's passes: servers, and the clock."""
        return _Watch(self, batch.number, plan, shape) if self.servers or self.speeds is not None else None

    def close(self) -> None:
        """Let servers go, and end the pool's threads. Every rank calls it."""
        if self.words is not None and self.rank < self.models:
            self.words.stop()
        self._teller.shutdown()
        self.worker.shutdown()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()

    def _check(self, settings: dict[str, Any]) -> None:
        strategy, servers, context_parallel = (settings[name] for name in ("strategy", "servers", "context_parallel"))
        if not 0 <= servers < self.ranks:
            raise DistattnError(f"servers is 0 to {self.ranks - 1} of the pool's {self.ranks} ranks, not {servers}.")
        if context_parallel < 1 or (self.ranks - servers) % context_parallel:
            raise DistattnError(
                f"context_parallel {context_parallel} does not divide the {self.ranks - servers} ranks with a model."
            )
        if servers and (settings["backward"] or STRATEGIES[strategy].backward) == "keep":
            raise DistattnError('servers keep nothing from pass to pass; use backward "refetch-home".')
        if settings["adaptive"] and not _takes(strategy, "speeds"):
            raise DistattnError(f'strategy {strategy} does not share out by speed; adaptive needs "cad".')

    def _tell(
        self, step: Any, make: Callable[[int, list[Told]], Any], twins: Sequence[int]
    ) -> tuple[int, list[Rows], Future[Heard]]:
        given = [] if step is None else [step] if isinstance(step, Mapping) else step
        rows = [Rows.of(batch) for batch in given]
        if rows:
            self._device = rows[0].ids_N.device
        speed = None if self.speeds is None else self.speeds.measured()
        # ranks that are to have the same data are compared
        content = "".join(own.digest() for own in rows) if len(set(twins)) < len(twins) else ""
        told = Told([own.lengths for own in rows], sum(own.labels for own in rows), step is None, speed, content)
        number, self._steps = self._steps, self._steps + 1
        self._current.add(number)
        if self.words is not None:
            self.words.tell(number)
        return number, rows, self._teller.submit(self._exchange, number, told, make)

    def _over(self, number: int) -> None:
        if number in self._current:
            self._current.remove(number)
            if self.words is not None:
                self.words.over(number)

    def _exchange(self, number: int, told: Told, make: Callable[[int, list[Told]], Any]) -> Heard:
        everyone: list[Any] = [told]
        if self.group is not None:
            everyone = [None] * self.ranks
            # names who is missing, which a gather does not
            dist.monitored_barrier(self._host, self._patience, wait_all_ranks=True)
            dist.all_gather_object(everyone, told, group=self._host)
        return Heard(number, everyone, make(number, everyone))

    def _heard(self, answer: Future[Heard], twins: Sequence[int]) -> Heard:
        try:
            heard = answer.result()
        except RuntimeError as error:
            raise DistattnError(f"a rank of the pool does not answer: {error}") from None
        for rank, twin in enumerate(twins):
            mine, theirs = heard.told[rank], heard.told[twin]
            if (mine.documents, mine.labels, mine.content) != (theirs.documents, theirs.labels, theirs.content):
                raise DistattnError(
                    f"rank {rank} of the pool is to have the same batches as rank {twin}, and has others."
                )
        return heard

    def _batches_of(self, number: int, told: list[Told]) -> list[ShardedBatch]:
        count = max((len(rank.documents) for rank in told), default=0)
        if not count:
            return []
        blocks = [rank.documents for rank in told[: self.models : self.context_parallel]]
        each = [tuple(own[index] if index < len(own) else () for own in blocks) for index in range(count)]
        return self.numbered(number, each, told)

    def numbered(self, number: int, documents: Sequence[Documents | None], told: list[Told]) -> list[Any]:
        """Batches of a step with these documents; none where there are no documents. Every so many steps are proven."""
        options = () if self.speeds is None else self.speeds.options([rank.speed for rank in told])
        proven = number % self.verify_every == 0
        return [
            None if own is None else ShardedBatch(self, Axis(own, options), number * _BATCHES + index, proven)
            for index, own in enumerate(documents)
        ]

    def part(self, rows: Rows | None) -> dict[str, Any]:
        """`input_ids`, `labels` and `position_ids` (1, T) of this rank; a padding token where it has no micro-batch."""
        if rows is None:
            nothing = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
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
                mine = select_rows(table.tasks, table.tasks["rank"] == pool.rank)
                price = CostModel.for_cluster(None, direction, plan.call.head_dim, _BLOCK)
                self.work[direction] = int(price.task_costs(plan.call, mine).sum())

    def prepares(self) -> None:
        self._say("prepare", ScoreMod(1.0))
        if self.pool.words is not None:
            self.pool.words.assemble()

    def begins(self, direction: str, score: ScoreMod) -> None:
        self._say(direction, score)
        if self.pool.speeds is not None:
            self.pool.speeds.passed(self.work[direction])

    def _say(self, phase: str, score: ScoreMod) -> None:
        pool = self.pool
        if pool.words is None or pool.rank >= pool.models:
            return
        if not pool.current(self.number):
            raise DistattnError(
                "this batch is of a step that is over: with servers, use it before asking for the next step."
            )
        pool.words.say(phase, self.number, self.shape, score)

    def kernel(self, kernel: Kernel) -> Kernel:
        return kernel if self.pool.speeds is None else self.pool.speeds.timed(kernel)


def _takes(strategy: str, option: str) -> bool:
    return STRATEGIES[strategy].takes(option)


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
    return make_layout(layout, lengths, ranks, Mask.documents(lengths, inner), **options)


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
