"""`ContextParallel`: what a trainer uses. It shards batches, makes and caches their plans, and knows the loss scale."""

# T tokens on this rank, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distattn.cluster.topology import Cluster
from distattn.errors import DistattnError
from distattn.functional import attention
from distattn.intervals import whole_numbers
from distattn.kernels.dispatch import choose_kernel, load_kernel
from distattn.layout import LAYOUTS, Layout, lay_out
from distattn.mask import Mask
from distattn.parallel.make_plan import check_names, make_plan
from distattn.plan import Plan
from distattn.programs import Prepared, Use, demand_of, lower_once, prepare

IGNORE_INDEX = -100
_KEYS = ("input_ids", "labels", "document_lengths", "attention_mask")


class ContextParallel:
    """Splits every batch over the ranks of a process group, by one strategy and layout.

    group defaults to the default process group, or one rank without torch.distributed. layout is a name of LAYOUTS with
    its options; inner is what a document attends to in itself (see `Mask.documents`). kernel as in `attention`; backward,
    cluster and options as in `make_plan`; capacity as in `prepare`. Raises DistattnError for names that do not exist.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        strategy: str,
        layout: str = "zigzag",
        layout_options: Mapping[str, int] | None = None,
        inner: str | tuple[int, int] = "causal",
        kernel: str | None = None,
        backward: str | None = None,
        cluster: Cluster | None = None,
        options: Mapping[str, object] | None = None,
        capacity: int | None = None,
    ):
        check_names(strategy, backward, options)
        if layout not in LAYOUTS:
            raise DistattnError(f"layout {layout!r} does not exist; there are {', '.join(LAYOUTS)}.")
        if kernel is not None:
            load_kernel(kernel)
        of_layout: dict[str, Any] = dict(layout_options or {})
        for name in of_layout.keys() - inspect.signature(LAYOUTS[layout]).parameters.keys():
            raise DistattnError(f"layout {layout} has no option {name!r}.")
        # refuses what no document can be: better now than at the first batch
        Mask.documents([1], inner)
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self.group, self.kernel, self.capacity = group, kernel, capacity
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ranks = 1 if group is None else dist.get_world_size(group)

        def axis(lengths: tuple[int, ...]) -> tuple[Mask, Layout]:
            mask = Mask.documents(lengths, inner)
            return mask, lay_out(layout, lengths, self.ranks, mask, **of_layout)

        def plan(lengths: tuple[int, ...], shape: Shape) -> Plan:
            mask, laid_out = self.axis(lengths)
            how: dict[str, Any] = dict(strategy=strategy, backward=backward, cluster=cluster, options=options)
            return make_plan(mask, laid_out, **how, **shape._asdict())

        # fixed-length batches meet the same axis again and again; packed ones never do
        self.axis = lru_cache(maxsize=8)(axis)
        self.plan = lru_cache(maxsize=8)(plan)
        # what layers have asked for so far: the next batch's programs are made ahead
        self.needs: set[tuple[Shape, torch.device]] = set()
        self.worker = ThreadPoolExecutor(1, "distattn-plans")

    def shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of a batch that every rank holds whole.

        batch: `input_ids` (B, S), optional `labels` of the same shape (each token its own label, -100 where none; the
        ids by default), optional `document_lengths` (whole numbers that add up to B * S; by default every row is one
        document), optional `attention_mask` without zeros. Rows are laid end to end on one axis. Other keys, and
        padding, are refused.

        Returns `input_ids`, `position_ids` (1, T), `labels` (1, T) shifted so that each token has its successor's
        label, `loss_scale` = 1 / valid labels on all ranks (multiply the *sum* of this rank's token losses by it, and
        *sum* gradients over ranks), and `context_parallel`, to be passed on to the model.
        A rank without tokens gets one padding token without a label, because models refuse empty batches.
        """
        if unknown := batch.keys() - _KEYS:
            raise DistattnError(
                f"batch has {', '.join(sorted(unknown))}; shard knows {', '.join(_KEYS)} and makes positions itself."
            )
        padding = batch.get("attention_mask")
        if padding is not None and not bool((padding != 0).all()):
            raise DistattnError("attention_mask marks padding; leave padding out and give document_lengths instead.")
        ids = batch["input_ids"]
        labels = batch.get("labels", ids)
        if ids.dim() != 2 or labels.shape != ids.shape:
            raise DistattnError(
                f"input_ids and labels are (batch, tokens) alike, not {tuple(ids.shape)}, {tuple(labels.shape)}."
            )
        lengths = _lengths(batch, ids)
        mask, layout = self.axis(lengths)
        targets = layout.shift_labels(labels.reshape(-1), ignore_index=IGNORE_INDEX)
        positions = torch.from_numpy(layout.position_ids(self.rank)).to(ids.device)
        local = layout.shard(ids.reshape(-1), self.rank), layout.shard(targets, self.rank), positions
        if not len(positions):
            local = ids.new_zeros(1), labels.new_full((1,), IGNORE_INDEX), positions.new_zeros(1)
        return {
            "input_ids": local[0][None],
            "labels": local[1][None],
            "position_ids": local[2][None],
            "loss_scale": 1.0 / max(int((targets != IGNORE_INDEX).sum()), 1),
            "context_parallel": ShardedBatch(self, lengths),
        }


class Shape(NamedTuple):
    """What one attention layer asks for, beside the batch."""

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str


class ShardedBatch:
    """The axis one batch was laid out on: what attention layers need of it. Travels with the batch, not with the model.

    Plans and programs for the shapes that earlier batches asked for are made on a thread, from the moment it exists.
    """

    def __init__(self, parent: ContextParallel, lengths: tuple[int, ...]):
        self.parent, self.lengths = parent, lengths
        self._prepared: dict[tuple[Shape, torch.device], Prepared] = {}
        self._plans = {need: parent.worker.submit(self._lowered, *need) for need in parent.needs}

    def attention(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, scale: float | None = None, **modifiers: Any
    ) -> Tensor:
        """`distattn.attention` of this rank's tokens (T, heads, dim), with the plan for these shapes."""
        shape = Shape(q_THD.shape[1], k_TKD.shape[1], q_THD.shape[2], v_TKE.shape[2], str(q_THD.dtype)[6:])
        ready = self._ready(shape, q_THD.device)
        if ready.lowered.program.tokens:
            return attention(q_THD, k_TKD, v_TKE, ready, scale=scale, **modifiers)
        # the padding token of a rank without tokens attends to nothing, but others may need this rank's help
        o_THE = attention(q_THD[:0], k_TKD[:0], v_TKE[:0], ready, scale=scale, **modifiers)
        return F.pad(o_THE, (0, 0, 0, 0, 0, len(q_THD)))

    def plan(self, heads: int, kv_heads: int, head_dim: int, v_head_dim: int, dtype: str) -> Plan:
        """The plan of this batch for one shape of call; layers of the same shape share it."""
        return self.parent.plan(self.lengths, Shape(heads, kv_heads, head_dim, v_head_dim, dtype))

    def _ready(self, shape: Shape, device: torch.device) -> Prepared:
        need, parent = (shape, device), self.parent
        if need not in self._prepared:
            parent.needs.add(need)
            plan = self._plans[need].result() if need in self._plans else self.plan(*shape)
            how: dict[str, Any] = dict(kernel=parent.kernel, device=device, capacity=parent.capacity)
            self._prepared[need] = prepare(plan, parent.group, **how)
        return self._prepared[need]

    def _lowered(self, shape: Shape, device: torch.device) -> Plan:
        """On the thread: plan, proof and program, so that nothing is left but to agree with the other ranks."""
        plan = self.plan(*shape)
        kernel = choose_kernel(self.parent.kernel, demand_of(plan.call, device))
        lower_once(plan, Use(self.parent.rank, kernel, device))
        return plan


def _lengths(batch: Mapping[str, Any], ids: Tensor) -> tuple[int, ...]:
    given: Sequence[int] | None = batch.get("document_lengths")
    if given is None:
        return (ids.shape[1],) * ids.shape[0]
    lengths = tuple(whole_numbers(given, "document_lengths").tolist())
    if sum(lengths) != ids.numel():
        raise DistattnError(f"document_lengths add up to {sum(lengths)} tokens, input_ids has {ids.numel()}.")
    return lengths
