"""`ContextParallel`, the driver: it turns a loader's batches into local batches, plans their attention, and scales losses.

A packed batch determines a mask and a layout, which determine this rank's local batch. Data is either replicated (all ranks of
the group hold the same batch and split it) or per rank (each rank, or block of ranks, has its own documents, and attention is
shared over all of them). Everything else is the same in both cases.
"""

# T tokens on this rank

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distattn.batch.awaited_result import AwaitedResult
from distattn.batch.local_batch import LocalBatch
from distattn.batch.packed_batch import IGNORE_INDEX, Batch, PackedBatch, padded
from distattn.batch.planner import AttentionShape, BatchKey, Planned, Planner
from distattn.batch.pooled_layout import BlockLayouts, Documents
from distattn.driver.communicators import SINGLE_RANK, Communicators
from distattn.driver.control_channel import ANNOUNCE_STEP, NEW_SHAPE, RELEASE_STEP, ControlMessage
from distattn.driver.global_loader import GlobalLoader, GlobalStepInfos
from distattn.driver.gradient_probe import NOT_PROBED, OTHER_COUNT, GradientProbeTarget, Reduction, probe, probe_ids
from distattn.driver.loss_sums import sum_over_loss_group
from distattn.driver.pass_observer import BatchObserver
from distattn.driver.rank_speeds import RankSpeeds
from distattn.driver.rank_table import RankTable
from distattn.driver.step_exchange import GatheredStep, StepExchange, agree_on_plan
from distattn.driver.steps_ahead import StepLoop, StepsAhead
from distattn.ir.errors import DistattnError, LostRankError
from distattn.ir.plan import Plan
from distattn.parallel.attention_config import AttentionConfig
from distattn.parallel.runtime.arenas import ARENAS
from distattn.parallel.runtime.communication.communicator import new_group, timeout_of
from distattn.parallel.runtime.communication.transport import Transport

Result = TypeVar("Result")
_LOG = logging.getLogger("distattn")
# the first batch of step s has index s * _BATCHES_PER_STEP
_BATCHES_PER_STEP = 1 << 20
# number of `shard_step` calls whose batches remain usable with servers: the running step and one sharded ahead
_LIVE_STEPS = 2


class ContextParallel:
    """A driver that splits attention over the ranks of a process group, batch by batch.

    group: by default the default process group, or a single rank without torch.distributed. loss_group: all ranks whose tokens
    make up the loss, including data-parallel replicas; by default the group's ranks with a model. settings: fields of
    `AttentionConfig`; `strategy` is required. They override the values of `config`. The constructor is a collective call of the
    loss group. It raises DistattnError for unknown settings, and for settings that differ between ranks.

        with ContextParallel(group, strategy="ring") as cp:
            for micro_batches in cp.steps(loader):
                for batch in micro_batches:
                    local_loss(model, batch).backward()
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        loss_group: dist.ProcessGroup | None = None,
        config: AttentionConfig | None = None,
        **settings: Any,
    ):
        self._open(group, loss_group, AttentionConfig.of(config, **settings))

    def _open(
        self, group: dist.ProcessGroup | None, loss_group: dist.ProcessGroup | None, config: AttentionConfig | None
    ) -> None:
        """Connect to the other ranks. config: None on server ranks, which use the first rank's settings."""
        for name, value in (("group", group), ("loss_group", loss_group)):
            if not isinstance(value, (dist.ProcessGroup, type(None))):
                raise DistattnError(
                    f"{name} must be a process group of torch.distributed, not a {type(value).__name__}."
                )
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        if group is None and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
            raise DistattnError(
                f"this is one of {os.environ['WORLD_SIZE']} processes (WORLD_SIZE), but torch.distributed is not initialized: "
                "call torch.distributed.init_process_group first."
            )
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ranks = 1 if group is None else dist.get_world_size(group)
        if config is not None:
            config.block_ranks(self.ranks)
            config.check_kernel()
        exchange = group if loss_group is None else loss_group
        self._table = table = RankTable.gather(config, group, exchange)
        self.config: AttentionConfig = table.config
        self.block_ranks = self.config.block_ranks(self.ranks)
        self.models = self.ranks - self.config.servers
        self._communicators: Communicators | None = None
        if group is not None and len(table.members) > 1:
            seconds = self.config.timeout
            timeout = timeout_of(group) if seconds is None else timedelta(seconds=seconds)
            self._communicators = Communicators(table.name, table.members, group, self.config.servers, timeout)
        host = None if self._communicators is None else self._communicators.exchange
        self.messages = None if self._communicators is None else self._communicators.messages
        self._exchange = StepExchange(host, table.first_of_block, table.sharing, table.members)
        self.loss_group = self._loss_group(loss_group)
        self._layouts = BlockLayouts(self.ranks, self.block_ranks, self.config)
        self.planner = Planner(self.config, self, self._layouts.of_batch, self._layouts.is_one_block)
        self.speeds = RankSpeeds(self.config.adaptive, self.ranks) if self.config.adaptive else None
        # the factor for the trainer's losses that makes its gradients sums over ranks
        self._factor = 1.0
        # whether the factor has been measured; the number of micro-batches per step for which it holds, None for any number
        self._probed, self._micro_batches = False, None
        self._device = torch.device("cpu")
        # steps whose batches may be used; those of them that `shard_step` sharded, oldest first
        self._live: set[int] = set()
        self._sharded: deque[int] = deque()
        self._ahead, self._closed = StepsAhead(), False

    # ---- called by trainers

    def shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return this rank's part of a batch, as `shard_step` does for a step of one micro-batch.

        batch: `input_ids` (B, S), and optionally `labels` of the same shape (default: the ids; -100 for no label) or
        `shift_labels` (already shifted: each token has its successor's label). At most one key marks documents:
        `document_lengths`, integers that sum to B * S; `position_ids` (1 or B, S), which restart at 0 in each document, as
        packing collators produce them; or `attention_mask` (B, S), whose zeros are padding before or after a row's tokens.
        Without such a key, every row is a document. Padding is removed, and rows are laid end to end on one axis. Other keys
        are refused.

        The result has `input_ids`, `position_ids` and `labels` (1, T), the labels shifted so that each token has its successor's
        label. It also has `loss_scale`, the factor for the *sum* of this rank's token losses (the trainer's factor, see the
        method `loss_scale`, divided by the step's valid labels over the loss group), and `context_parallel`, the `LocalBatch` to
        pass to the model. A rank without tokens gets unlabelled padding, because models refuse empty batches. `pad_to` pads all
        ranks.
        """
        return self.shard_step([batch])[0]

    def shard_step(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Shard all micro-batches of one optimizer step as `shard` does, but scale losses by the valid labels of the entire step.

        All ranks of the loss group call this together. Batches that ranks must share are compared. With data per rank, ranks may
        have different numbers of micro-batches: all get as many as the rank with the most, with padding in place of missing
        micro-batches. With servers, a step's batches must be used before the second step after it is sharded.
        """
        try:
            batches = None if isinstance(micro_batches, (Mapping, str, torch.Tensor)) else list(micro_batches)
        except TypeError:
            batches = None
        if batches is None:
            raise DistattnError(
                "shard_step takes a list of batches, the micro-batches of a step (shard takes one batch), not a "
                f"{type(micro_batches).__name__}."
            )
        packed = [PackedBatch.of(batch) for batch in batches]
        if not packed and self.config.data == "replicated":
            raise DistattnError("a step has at least one micro-batch.")
        number, future = self._announce(packed)
        self._sharded.append(number)
        while len(self._sharded) > _LIVE_STEPS:
            self._release(self._sharded.popleft())
        return self._local_batches(packed, future.result())

    def steps(self, loader: Iterable[Any], *, even: bool = False) -> Iterator[list[dict[str, Any]]]:
        """Yield the micro-batches of each step of a loader, sharded one step ahead, until the longest loader has ended.

        loader: yields batches that `shard` accepts, or lists of them (micro-batches). With a `PackLoader` each rank reads only
        its own tokens, and ranks need not exchange facts about steps. While a step runs, the next step is announced to the other
        ranks, and its plans are made and compared. Batches are copied, so a loader may reuse its tensors. Loops may be nested and
        left early, in the same way on all ranks: the next loop of this driver over the same iterator starts with the step that
        was read ahead. A loader's error is raised after the step before it. With servers, use a step's batches before requesting
        the next step. even: raise DistattnError on all ranks if their numbers of micro-batches differ, for trainers that count
        micro-batches themselves.
        """
        if not hasattr(loader, "__iter__") or isinstance(loader, (Mapping, str)):
            raise DistattnError(
                f"steps takes an iterable of batches, or of lists of them, not a {type(loader).__name__}."
            )
        for packed, step in self._gathered_steps(loader):
            counts = [len(info.documents) for info in self._table.of_models(step.infos)]
            if even and len(set(counts)) > 1:
                raise DistattnError(
                    f"ranks have different numbers of micro-batches in a step, {min(counts)} to {max(counts)}: give all of them "
                    "the same number, or drop the last incomplete step."
                )
            yield self._local_batches(packed, step)

    def loss_scale(self, target: GradientProbeTarget | None = None) -> float:
        """Return the factor by which to multiply this trainer's losses so that its gradients are sums over ranks.

        With a target (each adapter has one for its trainer), measure the trainer's reduction with two synthetic backward passes,
        and use the factor in the `loss_scale` of all later batches; this is a collective call. Without a target, return the
        current factor (initially 1). Raise DistattnError, naming ranks and parameters, if the trainer leaves any of them out,
        reduces gradients by different factors or clips them, or if ranks start with different weights. See `gradient_probe`.
        """
        if target is not None:
            if not isinstance(target, GradientProbeTarget):
                raise DistattnError(
                    "loss_scale takes the ProbeTarget of your trainer's adapter, such as "
                    f"distattn.adapters.pytorch.ProbeTarget(model), not a {type(target).__name__}."
                )
            reduction = self.reduction(target)
            self._factor = 1.0 if reduction is None else reduction.factor
            self._micro_batches = getattr(target, "micro_batches_per_step", None)
        return self._factor

    def reduction(self, target: GradientProbeTarget) -> Reduction | None:
        """Measure how a trainer reduces gradients over the loss group; return None on ranks without an output layer."""
        # the probe's own step has one micro-batch
        micro_batches, self._micro_batches, self._probed = self._micro_batches, None, True
        try:
            return probe(target, self._probe_batch, self.loss_group)
        finally:
            self._micro_batches = micro_batches

    def mean_loss(self, losses: Sequence[torch.Tensor]) -> float:
        """Return a step's loss per token, for logs: the sum over micro-batches and the loss group. A collective call.

        losses: the losses of this rank's micro-batches, as used in the backward pass; the factor of `loss_scale` is divided out.
        """
        items = losses if isinstance(losses, (list, tuple)) else ()
        if not items or not all(isinstance(loss, torch.Tensor) and loss.numel() == 1 for loss in items):
            raise DistattnError(
                "mean_loss takes the losses of a step's micro-batches: a list of tensors of one number."
            )
        total = torch.stack([loss.detach().double().reshape(()) for loss in losses]).sum() / self._factor
        return float(sum_over_loss_group(self, total, "the mean of a loss"))

    @property
    def data_parallel_size(self) -> int:
        """The number of shares of the loss group's data: one for each block of ranks that hold the same batch."""
        return len(self._table.blocks)

    @property
    def data_parallel_rank(self) -> int:
        """The index of this rank's share of the data."""
        return self._table.blocks.index(self._table.first_of_block[self._table.rank])

    def batch_group(self) -> dist.ProcessGroup | None:
        """Return the group of ranks with the same batch as this rank. A collective call unless these are the entire group."""
        if self.group is None or self.block_ranks == self.ranks:
            return self.group
        first = self.rank - self.rank % self.block_ranks
        return new_group(dist.get_process_group_ranks(self.group)[first : first + self.block_ranks])

    def close(self) -> None:
        """Stop threads, close communicators, release servers and free arenas. A collective call, except after an error."""
        self.__exit__(*sys.exc_info())

    def __enter__(self) -> ContextParallel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        # after a verdict, all ranks already know about the error
        if error is not None and self._communicators is not None and self._communicators.monitor.verdict is None:
            self._communicators.monitor.report(f"{type(error).__name__}: {error}")
        self._close(gracefully=error is None)

    # ---- called by servers and loss sums

    def begin(self, activity: str) -> None:
        """Record the start of an activity that all ranks of the loss group run equally often, so that late ranks can be named."""
        if self._communicators is not None:
            self._communicators.monitor.enter(activity)

    def guarded(self, work: Callable[[], Result], activity: str) -> Result:
        """Run `work`, a collective call of the loss group. If it fails, raise LostRankError naming the rank to blame."""
        if self._communicators is None:
            return work()
        assert self.loss_group is not None
        return self._communicators.guarded(work, activity, dist.get_process_group_ranks(self.loss_group))

    @property
    def wait_timeout(self) -> timedelta | None:
        """The longest wait for other ranks that leaves time to name a lost rank; None for a single rank."""
        return None if self._communicators is None else self._communicators.monitor.wait_timeout

    def _gathered_steps(self, loader: Iterable[Any]) -> Iterator[tuple[list[Batch], GatheredStep]]:
        """Yield this rank's packed micro-batches and the gathered step, for each step of a loader, one step ahead."""
        loop = StepLoop(loader, self._ahead)
        # a pack plan tells nothing about servers or speeds, so ranks must exchange facts about them
        ask = bool(self.config.servers) or self.speeds is not None
        step_infos = GlobalStepInfos(loader, self._table, ask) if isinstance(loader, GlobalLoader) else None
        packed = loop.next()
        number, future = self._announce(packed, step_infos)
        running = failure = None
        try:
            while True:
                step, current = future.result(), packed
                if running is None and step_infos is not None:
                    step_infos.confirm(step.infos)
                running = number
                if all(info.ended for info in self._table.of_models(step.infos)):
                    return
                try:
                    packed = loop.next()
                except Exception as error:
                    # raise this error after the current step, which is complete
                    failure = error
                else:
                    number, future = self._announce(packed, step_infos)
                    loop.hold(packed, None if step_infos is None else step_infos.rewind)
                yield current or [], step
                if failure is not None:
                    raise failure
                if not loop.take_back():
                    self._release(number)
                    if step_infos is not None:
                        raise step_infos.refusal()
                    packed = loop.next()
                    number, future = self._announce(packed, step_infos)
                self._release(running)
        except GeneratorExit:
            loop.leave()
            raise
        finally:
            # closing a generator must not raise; a later wait names the lost rank
            with contextlib.suppress(LostRankError):
                if running is not None:
                    self._release(running)
                self._release(number)

    def serve_step(self) -> AwaitedResult[GatheredStep]:
        """Return a future of the next step with its batches; called by server ranks."""
        return self._exchange.announce(None, self._batches_of_step, self.planner, self._measured_speed())

    def _loss_scale_of(self, step: GatheredStep) -> float:
        """Return the trainer's factor divided by the step's number of valid labels, where each batch counts once."""
        return self._factor / max(sum(step.infos[rank].valid_labels for rank in self._table.blocks), 1)

    def _local_shard(self, packed: Batch | None) -> dict[str, Any]:
        """Return this rank's `input_ids`, `labels` and `position_ids` (1, T) of a micro-batch; padding if `packed` is None."""
        if packed is None:
            tokens = padded(0, self.config.pad_to)
            padding = torch.zeros(1, tokens, dtype=torch.int64, device=self._device)
            return {"input_ids": padding, "labels": padding + IGNORE_INDEX, "position_ids": padding}
        layout = self._layouts.of_block(packed.lengths)
        return dict(packed.local_shard(layout, self.rank % self.block_ranks, self.config.pad_to))

    # ---- called by the planner and executables

    def transport(self, device: torch.device) -> Transport:
        """Return the transport for a device. See `PlanningRanks.transport`."""
        return SINGLE_RANK if self._communicators is None else self._communicators.transports.on(device)

    def begin_shape(self, batch: LocalBatch, shape: AttentionShape) -> None:
        """Notify servers of a new shape. See `PlanningRanks.begin_shape`."""
        self._check_live(batch)
        control = None if self._communicators is None else self._communicators.control
        if control is not None and self.rank < self.models:
            control.send(ControlMessage(NEW_SHAPE, batch.number, shape))

    def agree(self, make: Callable[[], Planned]) -> Planned:
        """Make a plan and compare it with the other ranks' plans. See `PlanningRanks.agree`."""
        return agree_on_plan(None if self._communicators is None else self._communicators.agreement, make)

    def gather(self, value: Any, activity: str) -> list[Any]:
        """Gather a value from every rank. See `PlanningRanks.gather`."""
        return [value] if self._communicators is None else self._communicators.agreement.all_gather(value, activity)

    def observer(self, batch: LocalBatch, plan: Plan, shape: AttentionShape) -> BatchObserver | None:
        """Return an observer that notifies servers of passes and measures speeds. See `PlanningRanks.observer`."""
        control = None if self._communicators is None else self._communicators.control
        if control is None and self.speeds is None:
            return None
        sends = control if self.rank < self.models else None
        return BatchObserver(batch.number, shape, plan, self.rank, sends, self.speeds, lambda: self._check_live(batch))

    # ---- internal

    def _close(self, gracefully: bool) -> None:
        if self._closed:
            return
        self._closed = True
        # run these callbacks in reverse order, each even if others raise
        with contextlib.ExitStack() as stack:
            for end in (self._ahead.clear, ARENAS.free, self.planner.close, self._exchange.close):
                stack.callback(end)
            if self._communicators is not None:
                stack.callback(self._communicators.close, gracefully)

    def _announce(
        self, packed: Sequence[Batch] | None, step_infos: GlobalStepInfos | None = None
    ) -> tuple[int, AwaitedResult[GatheredStep]]:
        if self._closed:
            raise DistattnError("this ContextParallel has been closed.")
        if packed:
            self._device = packed[0].device
        number = self._exchange.steps
        self._live.add(number)
        if self._communicators is not None and self._communicators.control is not None:
            self._communicators.control.send(ControlMessage(ANNOUNCE_STEP, number))

        def read_and_make(step: GatheredStep) -> list[LocalBatch]:
            for batch in packed or ():
                batch.read_ahead(self._layouts.of_block(batch.lengths), self.rank % self.block_ranks)
            return self._batches_of_step(step)

        speed = self._measured_speed()
        loader, infos = ("", None) if step_infos is None else (step_infos.name, step_infos.next(packed))
        return number, self._exchange.announce(packed, read_and_make, self.planner, speed, loader, infos)

    def _release(self, number: int) -> None:
        """Release a step whose batches will not be used any more."""
        if number in self._live:
            self._live.remove(number)
            if self._communicators is not None and self._communicators.control is not None and not self._closed:
                self._communicators.control.send(ControlMessage(RELEASE_STEP, number))

    def _batches_of_step(self, step: GatheredStep) -> list[LocalBatch]:
        """Build a step's batches, as many as the rank with the most has, each with the documents of all ranks that share
        attention."""
        count = max(len(info.documents) for info in step.infos)
        if not count:
            # the loaders have ended: no speeds are recorded for this step
            return []
        speeds = [step.infos[rank].speed for rank in self._table.sharing]
        options = () if self.speeds is None else self.speeds.options(speeds)
        proven, first = step.number % self.config.verify_every == 0, step.number * _BATCHES_PER_STEP
        blocks = [step.infos[rank].documents for rank in self._table.sharing[: self.models : self.block_ranks]]
        # replicas must run the same number of passes, so a replica without documents gets an unlabelled token
        stand_in = ((1,), *((),) * (len(blocks) - 1))
        batches = []
        for index in range(count):
            documents: Documents = tuple(packs[index] if index < len(packs) else () for packs in blocks)
            documents = documents if any(documents) else stand_in
            block = self._layouts.block_of(self.rank, documents)
            batches.append(LocalBatch(self.planner, BatchKey(documents, options), first + index, proven, block))
        return batches

    def _local_batches(self, packed: Sequence[Batch], step: GatheredStep) -> list[dict[str, Any]]:
        self._check_scale(len(step.batches))
        scale, out = self._loss_scale_of(step), []
        for index, batch in enumerate(step.batches):
            part = self._local_shard(micro_batch := packed[index] if index < len(packed) else None)
            batch.positions, batch.stands_in = part["position_ids"], micro_batch is None
            batch.longest_document = max(micro_batch.lengths if micro_batch else (), default=1)
            out.append({**part, "loss_scale": scale, "context_parallel": batch})
        return out

    def _check_scale(self, micro_batches: int) -> None:
        """Raise DistattnError if the scale was measured for another number of micro-batches; warn once if it was not measured."""
        if not torch.is_grad_enabled():
            return
        if self._micro_batches not in (None, micro_batches):
            raise DistattnError(OTHER_COUNT.format(micro_batches, self._micro_batches))
        if self._probed or self.loss_group is None or dist.get_world_size(self.loss_group) == 1:
            return
        self._probed = True
        if self._table.rank == 0:
            _LOG.warning(NOT_PROBED)

    def _probe_batch(self, ranks: int, rows: int, device: torch.device) -> dict[str, Any]:
        # blocks get different tokens, so that their gradients can be told apart; no id may be below `ranks`, not even padding
        first = self._table.members[self._table.first_of_block[self._table.rank]]
        batch = self.shard({"input_ids": probe_ids(self.block_ranks, first, ranks, rows).to(device)})
        return {**batch, "input_ids": batch["input_ids"].clamp(min=ranks)}

    def _check_live(self, batch: LocalBatch) -> None:
        if self.config.servers and self.rank < self.models and batch.number // _BATCHES_PER_STEP not in self._live:
            raise DistattnError(
                "this batch is of a step that is over: with servers, use it before asking for the next step."
            )

    def _measured_speed(self) -> float | None:
        return None if self.speeds is None else self.speeds.measured()

    def _loss_group(self, loss_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        if loss_group is not None or not self.config.servers or self.group is None or self.rank >= self.models:
            return self.group if loss_group is None else loss_group
        return new_group(dist.get_process_group_ranks(self.group)[: self.models])
