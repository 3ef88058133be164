"""The reference for a run on several ranks: one process that computes one document at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from distattn.batch.packed_batch import IGNORE_INDEX


def loss_by_document(
    logits_of: Callable[[torch.Tensor], torch.Tensor], batches: Sequence[Mapping[str, Any]]
) -> torch.Tensor:
    """Return the sum of the token losses of all documents, divided by the number of valid labels. The result is
    differentiable.

    logits_of: maps the token ids (1, L) of one document to logits (L, V). batches: mappings with input_ids (1, N),
    document_lengths and optionally labels (1, N).
    """
    losses, valid = [], 0
    for batch in batches:
        ids_1N, lengths = batch["input_ids"], list(batch["document_lengths"])
        labels_1N = batch.get("labels", ids_1N)
        for ids, labels in zip(ids_1N.split(lengths, 1), labels_1N.split(lengths, 1), strict=True):
            successors = labels[0, 1:]
            logits = logits_of(ids)[:-1]
            losses.append(F.cross_entropy(logits, successors, ignore_index=IGNORE_INDEX, reduction="sum"))
            valid += int((successors != IGNORE_INDEX).sum())
    return torch.stack(losses).sum() / max(valid, 1)
