"""Batches that Megatron's own loaders shard: rows and packs in its zigzag order, over the model's group or their own."""

# T tokens on this rank, B rows

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from distattn.batch.layer_overrides import Ways
from distattn.batch.planner import Axis, Planner, ShardedBatch
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.parallel.make_plan import check_names


class OwnBatches:
    """Finds the plan of what a layer is given; one for all layers of a spec. settings: as `ContextParallel` takes them."""

    def __init__(self, settings: dict[str, Any]):
        settings = dict(settings)
        self._ways = Ways(settings.pop("layers", None))
        if refused := settings.keys() & {"layout", "layout_options", "inner", "loss_group"}:
            raise DistattnError(
                f"Megatron's loaders decide on {sorted(refused)[0]}; give it to ContextParallel, and with_layouts."
            )
        check_names(settings["strategy"], settings.get("backward"), settings.get("options"))
        self._settings = settings
        self._planners: dict[dist.ProcessGroup, Planner] = {}
        self._rows: dict[tuple[int, int, dist.ProcessGroup], ShardedBatch] = {}
        self._pack: tuple[Any, ShardedBatch] | None = None

    def batch(self, shape: tuple[int, ...], packed: Any, group: dist.ProcessGroup) -> ShardedBatch:
        """Of (T, B) tokens; packed: Megatron's PackedSeqParams, if they are a pack."""
        tokens, rows = shape
        group, known = self._group_of(packed, group), (tokens, rows, group)
        ranks = dist.get_world_size(group)
        if packed is None or packed.qkv_format != "thd":
            if known not in self._rows:
                self._rows[known] = self._planner(group).batch(Axis((tokens * ranks,) * rows))
            return self._rows[known]
        # layers of one micro-batch come one after the other; a list of its lengths waits for the device, once
        if self._pack is None or self._pack[0] is not packed:
            ends = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
            edges = ends.tolist()
            lengths = tuple(b - a for a, b in zip(edges, edges[1:], strict=False) if b > a)
            if sum(lengths) != tokens * ranks:
                raise DistattnError(f"a pack of {sum(lengths)} tokens over {ranks} ranks, but this one has {tokens}.")
            self._pack = packed, self._planner(group).batch(Axis(lengths))
        return self._pack[1]

    def _group_of(self, packed: Any, group: dist.ProcessGroup) -> dist.ProcessGroup:
        size = getattr(packed, "local_cp_size", None)
        if size is None:
            return group
        if packed.cp_group is None or dist.get_world_size(packed.cp_group) != size:
            raise DistattnError(f"the batch is split over {size} ranks (local_cp_size) without a cp_group of as many.")
        return packed.cp_group

    def _planner(self, group: dist.ProcessGroup) -> Planner:
        if group not in self._planners:
            ranks = dist.get_world_size(group)
            self._planners[group] = Planner(
                group, lambda lengths: _zigzags(lengths, ranks), ways=self._ways, **self._settings
            )
        return self._planners[group]


def _zigzags(lengths: tuple[int, ...], ranks: int) -> tuple[Mask, Layout]:
    """Each document in 2 * ranks chunks, rank r with chunks r and 2 * ranks - 1 - r of every one, causal.

    Padding at a document's end is seen by nobody but padding, whose outputs have no loss.
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
                "shard with ContextParallel, which takes any length."
            )
        size = length // (2 * ranks)
        for rank in range(ranks):
            for chunk in (rank, 2 * ranks - 1 - rank):
                chunks[rank].append((start + chunk * size, start + (chunk + 1) * size))
        start += length
    return mask, Layout.from_chunks(lengths, chunks)
