"""`ContextParallel`: what a trainer uses. It shards batches, makes and caches their plans, and knows the loss scale."""

# T tokens on this rank

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from distattn.batch.layer_overrides import Ways
from distattn.batch.packed_batch import IGNORE_INDEX, Rows
from distattn.batch.packed_batch import layout_options as checked_options
from distattn.batch.planner import Axis, Planner
from distattn.cluster.spec import AnyCluster
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout, make_layout
from distattn.ir.mask import Mask

if TYPE_CHECKING:
    from distattn.driver.gradient_probe import Reduction, Trainer


# of so many steps the ranks compare the tokens of one, the first in any case
_COMPARED = 100


class ContextParallel(Planner):
    """Splits every batch over the ranks of a process group, by one strategy and layout.

    group defaults to the default process group, or one rank without torch.distributed. loss_group: all ranks whose tokens
    make up the loss, data-parallel replicas included; the group itself by default. layout is a name of LAYOUTS with
    its options; inner is what a document attends to in itself (see `Mask.documents`). layers: of some layers, by number
    (0, 1, ...) or kind ("window", "full"), how they are computed otherwise: a mapping with strategy, and maybe backward,
    options, layout and layout_options; tokens are re-laid inside those layers' calls. kernel as in `attention`; backward,
    wire, cluster and options as in `make_plan`; capacity as in `prepare`; verify_every and pad_to as in `Planner`. Raises
    DistattnError for names that do not exist.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        strategy: str,
        loss_group: dist.ProcessGroup | None = None,
        layout: str = "zigzag",
        layout_options: Mapping[str, int] | None = None,
        inner: str | tuple[int, int] = "causal",
        layers: Mapping[int | str, Mapping[str, Any]] | None = None,
        kernel: str | None = None,
        backward: str | None = None,
        wire: str | None = None,
        cluster: AnyCluster | None = None,
        options: Mapping[str, object] | None = None,
        capacity: int | None = None,
        verify_every: int = 1,
        pad_to: int = 1,
    ):
        of_layout = checked_options(layout, layout_options, inner)

        def axis(lengths: tuple[int, ...]) -> tuple[Mask, Layout]:
            mask = Mask.documents(lengths, inner)
            return mask, make_layout(layout, lengths, self.ranks, mask, **of_layout)

        how: dict[str, Any] = dict(strategy=strategy, inner=inner, ways=Ways(layers), kernel=kernel, backward=backward)
        how |= dict(
            wire=wire, cluster=cluster, options=options, capacity=capacity, verify_every=verify_every, pad_to=pad_to
        )
        super().__init__(group, axis, **how)
        self.loss_group = self.group if loss_group is None else loss_group
        # by which a trainer's losses are to be multiplied, so that its gradients are sums over ranks
        self._factor = 1.0
        self._steps = 0

    def shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of a batch that every rank of the group holds whole.

        batch: `input_ids` (B, S), optional `labels` of the same shape (each token its own label, -100 where none; the
        ids by default) or `shift_labels` (each token its successor's already, as is). What attends to what is said by one
        of: nothing, every row is a document; `document_lengths`, whole numbers that add up to B * S; `position_ids` (1 or B,
        S), which begin anew at 0 with each document, as packing collators make them; `attention_mask` (B, S), whose zeros are
        padding before or after a row's tokens. Padding is left out. Rows are laid end to end on one axis. Other keys are
        refused.

        Returns `input_ids`, `position_ids` (1, T), `labels` (1, T) shifted so that each token has its successor's
        label, `loss_scale` (multiply the *sum* of this rank's token losses by it: 1 / valid labels of the loss group,
        times what `loss_scale` found for the trainer; a number, or a tensor where the loss group is larger than the
        group), and `context_parallel`, to be passed on to the model.
        A rank without tokens gets padding without a label, because models refuse empty batches; `pad_to` pads all ranks.
        """
        return self.shard_step([batch])[0]

    def shard_step(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`shard` for all micro-batches of one optimizer step: losses are scaled by the valid labels of all of them.

        All ranks of the loss group call this together. Ranks of the group compare the tokens of every hundredth step.
        """
        rows = [Rows.of(batch) for batch in micro_batches]
        if self._steps % _COMPARED == 0:
            self._compare(rows)
        self._steps += 1
        parts: list[dict[str, Any]] = [own.part(self.axis(own.lengths)[1], self.rank, self.pad_to) for own in rows]
        scale = self._scale(rows, parts)
        batches = [self.batch(Axis(own.lengths)) for own in rows]
        for batch, part in zip(batches, parts, strict=True):
            batch.positions = part["position_ids"]
            part |= {"loss_scale": scale, "context_parallel": batch}
        return parts

    def loss_scale(self, trainer: Trainer | None = None) -> float:
        """The factor by which this trainer's losses are to be multiplied, so that its gradients are sums over ranks.

        With a trainer (see `distattn.adapters`), how it reduces gradients is probed by one synthetic backward pass, and the
        factor goes into the `loss_scale` of all later batches; all ranks call it. Without, what was found last (1 at first).
        Raises DistattnError where the trainer leaves ranks out, or weighs them unequally. See `distattn.driver.gradient_probe`.
        """
        if trainer is not None:
            found = self.reduction(trainer)
            self._factor = 1.0 if found is None else found.factor
        return self._factor

    def reduction(self, trainer: Trainer) -> Reduction | None:
        """How a trainer reduces gradients over the loss group: what `loss_scale` is taken from. None on ranks without logits."""
        from distattn.driver.gradient_probe import probe

        return probe(self, trainer)

    def _compare(self, rows: Sequence[Rows]) -> None:
        """Ranks that split a sequence have to hold the same tokens and targets."""
        if self.group is None or self.ranks == 1:
            return
        everyone = gathered(sum(int(own.digest(), 16) for own in rows) % (1 << 63), self.group)
        odd = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
        if odd:
            raise DistattnError(
                f"rank {odd[0]} of the group holds another batch than rank 0; ranks that split a sequence get the same "
                "batches, so give each group one share of the data."
            )

    def _scale(self, rows: Sequence[Rows], parts: Sequence[Mapping[str, Any]]) -> Any:
        if self.loss_group is self.group:
            return self._factor / max(sum(own.labels for own in rows), 1)
        if not parts:
            raise DistattnError("a step wants at least one micro-batch.")
        # each rank's own tokens: replicas of the whole batch are counted once
        valid = sum((part["labels"] != IGNORE_INDEX).sum() for part in parts)
        assert isinstance(valid, torch.Tensor)
        told = sendable(valid, self.loss_group)
        dist.all_reduce(told, group=self.loss_group)
        return self._factor / told.to(valid.device).clamp(min=1).double()


def sendable(number: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The number on a device that the group's backend can send from: NCCL sends from GPUs only."""
    return number.cuda() if dist.get_backend(group) == "nccl" else number


def gathered(number: int, group: dist.ProcessGroup | None) -> list[int]:
    """Of every rank of a group, which all call it."""
    mine = sendable(torch.tensor([number]), group)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.cat(everyone).tolist()
