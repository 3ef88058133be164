"""Loss by position and by corpus: shows whether, and up to which position, more context lowers the loss.

The sums stay on the device and are updated without synchronizing. Ranks communicate only when the sums are read.
"""

# T tokens on this rank, C corpora, B buckets of positions

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distattn.adapters import pytorch
from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.kernels.merge import accumulation_dtype
from distattn.parallel.runtime.communication.communicator import sendable_device


@dataclass(frozen=True)
class PositionBucket:
    """The tokens at positions `first` to `last` of their documents. loss: mean in nats, or None if there are no tokens."""

    first: int
    last: int
    tokens: int
    loss: float | None


@dataclass(frozen=True)
class CorpusLoss:
    """The tokens of one corpus. loss: mean in nats, or None if there are no tokens."""

    name: str
    tokens: int
    loss: float | None


@dataclass(frozen=True)
class LossTable:
    """Mean losses over a number of steps and all ranks.

    loss: mean over all tokens with a label and a finite loss; None if there are no such tokens. not_finite: number of
    tokens whose loss is not finite; no mean includes them. by_corpus: empty if the tokens' corpora are unknown.
    """

    loss: float | None
    tokens: int
    not_finite: int
    by_position: tuple[PositionBucket, ...]
    by_corpus: tuple[CorpusLoss, ...]


class LossByPosition:
    """Sums of token losses by position bucket and by corpus.

    The buckets are [0, 0], [1, 1], [2, 3], [4, 7] and so on in powers of two up to `context` tokens. The last bucket
    also holds all later positions. As in the model, positions count from the start of a document's piece in the pack.
    corpora: names, in the order of the corpus indices.
    """

    def __init__(self, context: int, corpora: Sequence[str] = (), device: torch.device | str = "cpu"):
        self.corpora = tuple(corpora)
        # first position of each bucket except the first bucket
        self._edges = [1 << power for power in range(max(context - 1, 0).bit_length())]
        self._edges_B = torch.tensor(self._edges, dtype=torch.int64, device=device)
        self._buckets = len(self._edges) + 1
        # rows: loss sums, token counts, and counts of tokens whose loss is not finite. The first block of buckets is
        # for tokens of unknown corpora. fp64 represents counts exactly up to 2^53.
        self._sums = torch.zeros(3, (len(self.corpora) + 1) * self._buckets, dtype=torch.float64, device=device)
        # sums over all ranks at the last call of `state`; never changed in place, since a checkpoint may be copying them
        self._total = torch.zeros_like(self._sums)

    def add(self, losses_T: Tensor, labels_T: Tensor, positions_T: Tensor, corpus_ids_T: Tensor | None = None) -> None:
        """Add one micro-batch without synchronizing with the device.

        losses_T: each token's loss in nats, any float dtype. labels_T: -100 marks tokens without a label, whose loss is
        ignored. positions_T: each token's position in its document. corpus_ids_T: each token's corpus index, -1 if
        unknown. The tensors may have any shape with T elements.
        """
        losses_T, labels_T, positions_T = losses_T.detach().flatten(), labels_T.flatten(), positions_T.flatten()
        place_T = torch.bucketize(positions_T, self._edges_B, right=True)
        if corpus_ids_T is not None and self.corpora:
            place_T = place_T + (corpus_ids_T.flatten() + 1) * self._buckets
        counts_T = labels_T != IGNORE_INDEX
        finite_T = counts_T & losses_T.isfinite()
        kept_T = torch.where(finite_T, losses_T, 0).double()
        rows_3T = torch.stack([kept_T, finite_T.double(), (counts_T & ~finite_T).double()])
        self._sums.index_add_(1, place_T, rows_3T)

    def add_batch(self, losses_T: Tensor, batch: Mapping[str, Any]) -> None:
        """Call `add` for a local batch of the driver. The batch has `corpus_ids` if `PackLoader(corpus_ids=True)` read it."""
        self.add(losses_T, batch["labels"], batch["position_ids"], batch.get("corpus_ids"))

    def reset(self) -> None:
        """Reset all sums to zero."""
        self._sums.zero_()
        self._total = torch.zeros_like(self._total)

    def state(self, group: dist.ProcessGroup | None = None) -> Tensor:
        """Return the sums over all ranks of the group, or of this rank alone if group is None. A collective call.

        The result is float64, equal on all ranks, never changed later, and its shape does not depend on the number of
        ranks. `load` continues from it. Calls at the same steps return the same bits even if the run was resumed in
        between. The group's ranks must hold different tokens.
        """
        new = self._sums.clone()
        self._sums.zero_()
        if group is not None and dist.get_world_size(group) > 1:
            new = new.to(sendable_device(group))
            dist.all_reduce(new, group=group)
        self._total = self._total + new.to(self._total.device)
        return self._total

    def load(self, state: Tensor) -> None:
        """Continue from a result of `state`. All ranks pass the same tensor."""
        self._sums.zero_()
        self._total = state.to(self._total.device, copy=True)

    def reduce(self, group: dist.ProcessGroup | None = None) -> LossTable:
        """Return the table over all ranks of the group, keeping the sums. Synchronizes with the device. See `state`."""
        sums, tokens, not_finite = self.state(group).cpu().view(3, len(self.corpora) + 1, self._buckets).unbind()
        edges = [0, *self._edges]
        by_position = tuple(
            PositionBucket(first, last - 1, int(count), _mean(total, count))
            for first, last, total, count in zip(
                edges, [*self._edges, 2 * edges[-1] or 1], sums.sum(0).tolist(), tokens.sum(0).tolist(), strict=True
            )
        )
        by_corpus = zip(self.corpora, sums.sum(1).tolist()[1:], tokens.sum(1).tolist()[1:], strict=True)
        return LossTable(
            _mean(float(sums.sum()), float(tokens.sum())),
            int(tokens.sum()),
            int(not_finite.sum()),
            by_position,
            tuple(CorpusLoss(name, int(count), _mean(total, count)) for name, total, count in by_corpus),
        )


def token_losses(model: torch.nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return each token's loss in a local batch (T,), in nats, without the batch's loss scale; 0 for unlabelled tokens."""
    logits_TV = pytorch.logits_of(model, batch).flatten(0, -2)
    accumulated_TV = logits_TV.to(accumulation_dtype(logits_TV.dtype))
    return F.cross_entropy(accumulated_TV, batch["labels"].flatten(), ignore_index=IGNORE_INDEX, reduction="none")


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None
