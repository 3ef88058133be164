"""A run of recurrent layers, for which tokens may move to another layout before the first and back after the last."""

# T tokens of this rank, U in the layout of the run, C channels

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.batch.local_batch import LocalBatch
from distattn.batch.packed_batch import padded
from distattn.batch.planner import AttentionShape
from distattn.batch.pooled_layout import BatchBlock
from distattn.cluster.spec import ClusterSpec
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout
from distattn.ir.op import Op, op_of
from distattn.ir.plan import dtype_name
from distattn.ops.executable import Executable
from distattn.parallel.run_layout import RUN_LAYOUT, wants_relayout
from distattn.parallel.runtime.relaid_rows import RowMoves, move_rows


class RecurrentRun:
    """The layers of a run take `batch` in place of the model's, and rows that `enter` gave; `leave` gives the model's back.

    Everything between the two that works token by token (norms, projections, MLPs) needs no change. Positions are not moved:
    recurrent layers have none.

        run = recurrent_run(batch, "gated_delta_rule", layers=3, width=4096, heads=32, head_dim=128)
        x = run.enter(x)
        for layer in layers:
            x = layer(x, run.batch)
        x = run.leave(x)
    """

    def __init__(self, batch: LocalBatch, layout: str | None):
        """layout: of the run, by name; None where rows stay."""
        self.batch = batch if layout is None else _RelaidBatch(batch, layout)
        self._model, self.is_relaid = batch, layout is not None

    def enter(self, x_TC: Tensor) -> Tensor:
        """Rows (U, C) where the run has them, from the model's (T, C), with gradients. A collective call of all ranks."""
        return self._move(x_TC, inward=True)

    def leave(self, x_UC: Tensor) -> Tensor:
        """The inverse of `enter`."""
        return self._move(x_UC, inward=False)

    @torch.compiler.disable
    def _move(self, x: Tensor, inward: bool) -> Tensor:
        if not isinstance(self.batch, _RelaidBatch):
            return x
        planner = self._model.planner
        home = planner.lay_out(self._model.key.documents)[1]
        moves = _row_moves(home, planner.layout_of(self._model.key, self.batch.layout), planner.ranks.rank)
        moves = moves if inward else moves.reversed()
        rows, pad_to = sum(map(len, moves.sends.values())), planner.config.pad_to
        if len(x) not in (rows, padded(rows, pad_to)):
            raise DistattnError(f"a run of layers moves the {rows} rows of this rank (or as padded), not {len(x)}.")
        moved = move_rows(x[:rows], moves, planner.ranks.transport(x.device))
        if len(x) != padded(rows, pad_to):
            return moved
        return F.pad(moved, (0, 0) * (x.dim() - 1) + (0, padded(moves.rows, pad_to) - moves.rows))


def recurrent_run(
    batch: LocalBatch,
    op: Op | str,
    *,
    layers: int,
    width: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    v_head_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> RecurrentRun:
    """The run of `layers` recurrent layers in a row: re-laid to contiguous slices where that is faster, in simulation.

    width: channels of the hidden states that would move. heads are those of values, kv_heads (by default as many) those of
    queries and keys. Without a described cluster nothing is known of time, and rows stay; so they do where a rank has no tokens.
    All ranks find the same; documents that are new take the time of planning two such layers.
    """
    cluster = batch.planner.config.cluster
    if not isinstance(cluster, ClusterSpec):
        return RecurrentRun(batch, None)
    home = batch.planner.lay_out(batch.key.documents)[1]
    if not home.shard_sizes().all():
        # ranks without tokens may be servers, which compute attention only
        return RecurrentRun(batch, None)
    shape = AttentionShape(heads, kv_heads or heads, head_dim, v_head_dim or head_dim, dtype_name(dtype), op=op_of(op))
    return RecurrentRun(batch, RUN_LAYOUT if _wants_relayout(home, cluster, shape, layers, width) else None)


@lru_cache(maxsize=8)
def _wants_relayout(home: Layout, cluster: ClusterSpec, shape: AttentionShape, layers: int, width: int) -> bool:
    names = ("op", "heads", "kv_heads", "head_dim", "v_head_dim", "dtype")
    settings = {name: getattr(shape, name) for name in names}
    return wants_relayout(home, layers=layers, width=width, cluster=cluster, **settings)


@lru_cache(maxsize=8)
def _row_moves(home: Layout, there: Layout, rank: int) -> RowMoves:
    return RowMoves.of(home, there, rank)


class _RelaidBatch(LocalBatch):
    """A batch whose rows lie as another layout has them. Its plans are made and cached with the batch's own."""

    def __init__(self, batch: LocalBatch, layout: str):
        super().__init__(batch.planner, batch.key, batch.number, batch.proven, batch._block)
        self.layout, self._batch, self.stands_in = layout, batch, batch.stands_in

    @property
    def own_tokens(self) -> int:
        layout = self.planner.layout_of(self.key, self.layout)
        return 0 if self.stands_in else len(layout.tokens(self.planner.ranks.rank))

    @property
    def block(self) -> BatchBlock:
        """See `LocalBatch`. Raises DistattnError where tokens of a block's documents may lie on other ranks."""
        block, ranks = super().block, self.planner.lay_out(self.key.documents)[1].ranks
        if len(block.ranks) < ranks:
            raise DistattnError(
                "a run of re-laid layers has no states of documents where ranks have batches of their own; give the layer the "
                "model's batch, outside of the run."
            )
        return block

    def executable(self, shape: AttentionShape, device: torch.device) -> Executable:
        self._batch.used = self._batch.mixed = True
        return self._batch.executable(shape._replace(layout=self.layout), device)
