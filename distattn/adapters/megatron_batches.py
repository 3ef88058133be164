"""Batches sharded by Megatron's own loaders: rows and packs in its zigzag order, over the model's or the batch's group."""

# T tokens on this rank, B rows

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from distattn.batch.collectives import HostGroup, shared_name
from distattn.batch.health import HealthMonitor
from distattn.batch.local_batch import LocalBatch
from distattn.batch.planner import AttentionShape, BatchKey, Planned, Planner
from distattn.driver.communicators import SINGLE_RANK, MonitoredTransports
from distattn.driver.step_exchange import agree_on_plan
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import Plan
from distattn.parallel.attention_config import AttentionConfig
from distattn.parallel.runtime.communication.communicator import timeout_of
from distattn.parallel.runtime.communication.transport import Transport

# keep the batches of at most this many row shapes, since there are many shapes if lengths vary
_MOST_ROWS = 64
# settings that Megatron's loaders determine, or that only ContextParallel supports
_OF_DRIVER = {"layout", "layout_options", "document_mask", "data", "context_parallel_size", "loss_group"}
_OF_DRIVER |= {"servers", "adaptive", "timeout"}


@dataclass
class PackedShard(PackedSeqParams):
    """A sharded batch that is passed through a model as if it were Megatron's description of a pack."""

    batch: Any = None

    @staticmethod
    def of(batch: Mapping[str, Any]) -> PackedShard:
        """Wrap a batch as sbhd with one row. Only the batch itself knows its documents."""
        return PackedShard(qkv_format="sbhd", batch=batch)


class MegatronBatches:
    """The plans for layers' inputs, shared by all layers of a spec. settings: fields of `AttentionConfig`.

    Megatron's loaders do not announce a batch before its first layer, so ranks compare their plans there, once per batch.
    """

    def __init__(self, settings: Mapping[str, Any]):
        if refused := settings.keys() & _OF_DRIVER:
            raise DistattnError(
                f"batches of Megatron's loaders take no {sorted(refused)[0]}; to set it, use ContextParallel and "
                "use_batch_positions."
            )
        self._config = AttentionConfig.of(None, **settings)
        self._config.check_kernel()
        self._planners: dict[dist.ProcessGroup, _GroupPlanner] = {}
        self._rows: dict[tuple[int, int, dist.ProcessGroup], LocalBatch] = {}
        self._pack: tuple[Any, LocalBatch] | None = None
        self._closed = False

    def batch(self, shape: tuple[int, ...], packed: Any, group: dist.ProcessGroup) -> LocalBatch:
        """Return the batch of inputs (T, B). packed: Megatron's PackedSeqParams, or a `PackedShard` for a sharded batch."""
        if isinstance(packed, PackedShard):
            sharded: LocalBatch = packed.batch["context_parallel"]
            return sharded
        tokens, rows = shape
        group = self._group_of(packed, group)
        key = tokens, rows, group
        if self._closed:
            raise DistattnError("this core attention has been closed.")
        ranks = dist.get_world_size(group)
        if packed is None or packed.qkv_format != "thd":
            if key not in self._rows:
                while len(self._rows) >= _MOST_ROWS:
                    del self._rows[next(iter(self._rows))]
                self._rows[key] = self._planner(group).batch((tokens * ranks,) * rows)
            return self._rows[key]
        # read the lengths only once per micro-batch, at its first layer, because the host waits for the device to read them
        if self._pack is None or self._pack[0] is not packed:
            ends = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
            edges = ends.tolist()
            lengths = tuple(b - a for a, b in zip(edges, edges[1:], strict=False) if b > a)
            if sum(lengths) != tokens * ranks:
                raise DistattnError(
                    f"the pack has {sum(lengths)} tokens for {ranks} ranks, which does not fit this rank's {tokens}."
                )
            self._pack = packed, self._planner(group).batch(lengths)
        return self._pack[1]

    def close(self) -> None:
        """End the threads and communicators. All ranks call this. A second call does nothing."""
        self._closed = True
        self._rows.clear()
        self._pack = None
        for planner in self._planners.values():
            planner.close()
        self._planners.clear()

    def _group_of(self, packed: Any, group: dist.ProcessGroup) -> dist.ProcessGroup:
        size = getattr(packed, "local_cp_size", None)
        if size is None:
            return group
        if packed.cp_group is None or dist.get_world_size(packed.cp_group) != size:
            raise DistattnError(
                f"the batch is split over {size} ranks (local_cp_size) without a cp_group of that size."
            )
        return packed.cp_group

    def _planner(self, group: dist.ProcessGroup) -> _GroupPlanner:
        if group not in self._planners:
            self._planners[group] = _GroupPlanner(self._config, group)
        return self._planners[group]


class _GroupPlanner:
    """A planner of batches over one of Megatron's groups, whose ranks all run the same layers in the same order."""

    def __init__(self, config: AttentionConfig, group: dist.ProcessGroup):
        self._group, self.rank = group, dist.get_rank(group)
        self.planner = Planner(config, self, lambda lengths: _zigzags(lengths, dist.get_world_size(group)))
        self._batches = 0
        members = dist.get_process_group_ranks(group)
        self._host = self._monitor = self._transports = None
        if len(members) > 1:
            name, timeout = shared_name(group), timeout_of(group)
            self._monitor = HealthMonitor(name, dist.get_rank(), members, timeout)
            self._host = HostGroup(name, members, self._monitor)
            self._transports = MonitoredTransports(group, self._monitor, members)

    def batch(self, lengths: tuple[int, ...]) -> LocalBatch:
        """Return the next batch. lengths: the lengths of its documents."""
        number = self._batches
        self._batches += 1
        return LocalBatch(self.planner, BatchKey(lengths), number, number % self.planner.config.verify_every == 0)

    def transport(self, device: torch.device) -> Transport:
        """Return the transport for a device. See `PlanningRanks.transport`."""
        return SINGLE_RANK if self._transports is None else self._transports.on(device)

    def begin_shape(self, batch: LocalBatch, shape: AttentionShape) -> None:
        """Announce nothing, since all ranks run the layers themselves. See `PlanningRanks.begin_shape`."""

    def agree(self, make: Callable[[], Planned]) -> Planned:
        """Agree on a plan with the other ranks. See `PlanningRanks.agree`."""
        return agree_on_plan(self._host, make)

    def gather(self, value: Any, label: str) -> list[Any]:
        """Gather a value from all ranks. See `PlanningRanks.gather`."""
        return [value] if self._host is None else self._host.all_gather(value, label)

    def observer(self, batch: LocalBatch, plan: Plan, shape: AttentionShape) -> None:
        """Return None, since passes are not observed. See `PlanningRanks.observer`."""

    def close(self) -> None:
        """End the host group, the communicators and the heartbeat thread. Collective."""
        self.planner.close()
        if self._host is not None and self._monitor is not None and self._transports is not None:
            self._host.close()
            self._transports.close(gracefully=True)
            self._monitor.close()


def _zigzags(lengths: tuple[int, ...], ranks: int) -> tuple[Mask, Layout]:
    """Return a causal mask, and a layout that gives rank r chunks r and 2 * ranks - 1 - r of every document's 2 * ranks chunks.

    Padding at a document's end is visible only to padding, whose outputs have no loss.
    """
    mask = Mask.documents(lengths)
    if ranks == 1:
        return mask, Layout.contiguous(lengths, 1)
    chunks: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    start = 0
    for number, length in enumerate(lengths):
        if length % (2 * ranks):
            raise DistattnError(
                f"document {number} has {length} tokens, and Megatron's order needs a multiple of {2 * ranks}; pad it, or "
                "shard with ContextParallel, which accepts any length."
            )
        size = length // (2 * ranks)
        for rank in range(ranks):
            for chunk in (rank, 2 * ranks - 1 - rank):
                chunks[rank].append((start + chunk * size, start + (chunk + 1) * size))
        start += length
    return mask, Layout.from_chunks(lengths, chunks)
