"""Batches as data loaders give them, and the part of one that a rank gets."""

# N tokens on the axis, T tokens on this rank

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.errors import DistattnError
from distattn.intervals import whole_numbers
from distattn.layout import LAYOUTS, Layout
from distattn.mask import Mask

IGNORE_INDEX = -100
_KEYS = ("input_ids", "labels", "document_lengths", "attention_mask")


class Rows(NamedTuple):
    """A batch with its rows laid end to end: token ids and targets (each token's successor, -100 where none), (N,)."""

    ids_N: Tensor
    targets_N: Tensor
    lengths: tuple[int, ...]

    @staticmethod
    def of(batch: Mapping[str, Any]) -> Rows:
        """From `input_ids` (B, S), optional `labels`, `document_lengths` and `attention_mask` (see `ContextParallel.shard`)."""
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
        whole = Layout.contiguous(lengths, 1)
        return Rows(ids.reshape(-1), whole.shift_labels(labels.reshape(-1), ignore_index=IGNORE_INDEX), lengths)

    @property
    def labels(self) -> int:
        """How many tokens have a target."""
        return int((self.targets_N != IGNORE_INDEX).sum())

    def digest(self) -> str:
        """Of tokens and targets."""
        both = torch.stack([self.ids_N, self.targets_N]).cpu().numpy()
        return hashlib.blake2b(both.tobytes(), digest_size=16).hexdigest()

    def part(self, layout: Layout, rank: int) -> dict[str, Tensor]:
        """`input_ids`, `labels` and `position_ids` (1, T) of a rank; one padding token without a label where it has none."""
        positions = torch.from_numpy(layout.position_ids(rank)).to(self.ids_N.device)
        ids, targets = layout.shard(self.ids_N, rank), layout.shard(self.targets_N, rank)
        if not len(positions):
            ids, positions = ids.new_zeros(1), positions.new_zeros(1)
            targets = targets.new_full((1,), IGNORE_INDEX)
        return {"input_ids": ids[None], "labels": targets[None], "position_ids": positions[None]}


def layout_options(layout: str, options: Mapping[str, Any] | None, inner: str | tuple[int, int]) -> dict[str, Any]:
    """The options of a layout, checked; refuses layouts, options and inner masks that do not exist."""
    if layout not in LAYOUTS:
        raise DistattnError(f"layout {layout!r} does not exist; there are {', '.join(LAYOUTS)}.")
    given = dict(options or {})
    for name in given.keys() - inspect.signature(LAYOUTS[layout]).parameters.keys():
        raise DistattnError(f"layout {layout} has no option {name!r}.")
    # refuses what no document can be: better now than at the first batch
    Mask.documents([1], inner)
    return given


def _lengths(batch: Mapping[str, Any], ids: Tensor) -> tuple[int, ...]:
    given: Sequence[int] | None = batch.get("document_lengths")
    if given is None:
        return (ids.shape[1],) * ids.shape[0]
    lengths = tuple(whole_numbers(given, "document_lengths").tolist())
    if sum(lengths) != ids.numel():
        raise DistattnError(f"document_lengths add up to {sum(lengths)} tokens, input_ids has {ids.numel()}.")
    return lengths
