"""`ContextParallel`: what a trainer uses. It shards batches, makes and caches their plans, and knows the loss scale."""

# T tokens on this rank

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from distattn.batches import Axis, Planner
from distattn.cluster.describe import Machines
from distattn.layout import Layout, lay_out
from distattn.mask import Mask
from distattn.rows import Rows
from distattn.rows import layout_options as checked_options


class ContextParallel(Planner):
    """Splits every batch over the ranks of a process group, by one strategy and layout.

    group defaults to the default process group, or one rank without torch.distributed. layout is a name of LAYOUTS with
    its options; inner is what a document attends to in itself (see `Mask.documents`). kernel as in `attention`; backward,
    wire, cluster and options as in `make_plan`; capacity as in `prepare`; verify_every as in `Planner`. Raises DistattnError for
    names that do not exist.
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
        wire: str | None = None,
        cluster: Machines | None = None,
        options: Mapping[str, object] | None = None,
        capacity: int | None = None,
        verify_every: int = 1,
    ):
        of_layout = checked_options(layout, layout_options, inner)

        def axis(lengths: tuple[int, ...]) -> tuple[Mask, Layout]:
            mask = Mask.documents(lengths, inner)
            return mask, lay_out(layout, lengths, self.ranks, mask, **of_layout)

        how: dict[str, Any] = dict(strategy=strategy, kernel=kernel, backward=backward, cluster=cluster)
        super().__init__(group, axis, wire=wire, options=options, capacity=capacity, verify_every=verify_every, **how)

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
        rows = Rows.of(batch)
        _, layout = self.axis(rows.lengths)
        return {
            **rows.part(layout, self.rank),
            "loss_scale": 1.0 / max(rows.labels, 1),
            "context_parallel": self.batch(Axis(rows.lengths)),
        }
