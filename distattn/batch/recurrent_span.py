"""A span of recurrent layers, for which tokens may move to another layout before the first layer and back after the last."""

# T tokens on this rank, U tokens on this rank in the span's layout, C channels

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.batch.local_batch import LocalBatch, RelaidBatch
from distattn.batch.packed_batch import padded
from distattn.batch.planner import AttentionShape
from distattn.cluster.spec import ClusterSpec
from distattn.ir.arguments import checked
from distattn.ir.errors import DistattnError
from distattn.ir.op import Op, op_of
from distattn.ir.plan import Plan, dtype_name
from distattn.ops.executable import with_device_index
from distattn.parallel.runtime.communication.relaid_rows import move_rows
from distattn.parallel.span_layout import SPAN_LAYOUT, relayout_is_faster, relayout_may_be_faster


class RecurrentSpan:
    """A span of recurrent layers, whose rows `enter` moves to its layout and `leave` moves back.

    Pass the span's `batch` to its layers instead of the model's batch. Code between the two calls that works token by token
    (norms, projections, MLPs) needs no change. Positions are not moved, because recurrent layers do not use them.

        span = da.recurrent_span(batch, "gated_delta_rule", layers=3, width=4096, heads=32, head_dim=128)
        x = span.enter(x)
        for layer in layers:
            x = layer(x, span.batch)
        x = span.leave(x)
    """

    def __init__(self, batch: LocalBatch, layout: str | None):
        """Create a span over `batch`. layout: the name of the span's layout; None if rows stay in place."""
        self.batch = batch if layout is None else RelaidBatch(batch, layout)
        self._model, self._layout, self.is_relaid = batch, layout, layout is not None

    def enter(self, x_TC: Tensor) -> Tensor:
        """Move the model's rows (T, C) to the span's layout; return (U, C). Differentiable. A collective call."""
        return self._move(x_TC, inward=True)

    def leave(self, x_UC: Tensor) -> Tensor:
        """Move rows (U, C) back to the model's layout; return (T, C). The inverse of `enter`."""
        return self._move(x_UC, inward=False)

    @torch.compiler.disable
    def _move(self, x: Tensor, inward: bool) -> Tensor:
        if self._layout is None:
            return x
        planner = self._model.planner
        moves = self._model.row_moves(self._layout, x.device)
        moves = moves if inward else moves.reversed()
        rows, pad_to = sum(map(len, moves.sends.values())), planner.config.pad_to
        if len(x) not in (rows, padded(rows, pad_to)):
            raise DistattnError(f"a span of layers moves the {rows} rows of this rank (or as padded), not {len(x)}.")
        moved = move_rows(x[:rows], moves, planner.ranks.transport(x.device))
        if len(x) != padded(rows, pad_to):
            return moved
        return F.pad(moved, (0, 0) * (x.dim() - 1) + (0, padded(moves.rows, pad_to) - moves.rows))


@checked
def recurrent_span(
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
    device: torch.device | str | None = None,
) -> RecurrentSpan:
    """Return a span of `layers` consecutive recurrent layers. Rows move to contiguous slices if that is faster in simulation.

    width: channels of the hidden states that would move. heads: value heads. kv_heads: query and key heads, by default the same
    number. Rows stay in place if no cluster is described, because times are unknown in that case, or if a rank has no tokens. All
    ranks make the same choice, once per batch: they compare the plans of a layer in both layouts, unless moving tokens takes
    longer than it could save. device: the rows' device. If given, plans for later batches are made ahead on the planning thread,
    and a call with new arguments is collective.
    """
    cluster, op = batch.planner.config.cluster, op_of(op)
    if not isinstance(cluster, ClusterSpec) or isinstance(batch, RelaidBatch):
        return RecurrentSpan(batch, None)
    home = batch.planner.layout_of(batch.key, None)
    if not home.shard_sizes().all():
        # keep the layout: ranks without tokens may be servers, which compute only attention
        return RecurrentSpan(batch, None)
    shape = AttentionShape(heads, kv_heads or heads, head_dim, v_head_dim or head_dim, dtype_name(dtype), op=op)
    span_key = shape, layers, width
    if span_key not in batch.relaid_spans:
        here, there = _plan(batch, shape, device), batch.planner.layout_of(batch.key, SPAN_LAYOUT)
        is_faster = relayout_may_be_faster(here, there, layers=layers, width=width, cluster=cluster)
        if is_faster:
            relaid = _plan(batch, shape._replace(layout=SPAN_LAYOUT), device)
            is_faster = relayout_is_faster(here, relaid, layers=layers, width=width, cluster=cluster)
        batch.relaid_spans[span_key] = is_faster
    return RecurrentSpan(batch, SPAN_LAYOUT if batch.relaid_spans[span_key] else None)


def _plan(batch: LocalBatch, shape: AttentionShape, device: torch.device | str | None) -> Plan:
    if device is not None:
        # request the executable, which registers the shape, so that later batches are planned ahead
        batch.executable(shape, with_device_index(device))
    return batch.plan(*shape)
