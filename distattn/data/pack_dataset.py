"""The packs of a plan as a PyTorch dataset, for trainers with their own data loader."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from distattn.data.files.corpus import Corpus
from distattn.data.loader import PackLoader
from distattn.data.packing.pack_plan import PackPlan
from distattn.ir.errors import DistattnError


class PackDataset(Dataset[dict[str, Any]]):
    """A dataset whose item i is pack i of a plan: token ids, labels and document lengths, ready for `ContextParallel.shard`.

    Use it with a trainer that draws items in order, such as `ContextParallelTrainer` with train_sampling_strategy="sequential",
    per_device_train_batch_size=1, and a data_collator that returns the only row. The trainer must use as many packs per step
    (over all shares) as the plan has. Every rank reads whole packs; with `PackLoader` it would read only its own tokens.
    """

    def __init__(self, plan: PackPlan | str | Path, corpora: Sequence[Corpus], *, steps: int | None = None):
        """Open the plan. steps: the number of steps to use; by default all full steps.

        Raises DistattnError if documents may be kept whole, because then the number of packs varies between steps.
        """
        self._given, self._steps = (plan, list(corpora)), steps
        # worker processes read the items and must not touch a GPU; the trainer's loader pins the memory
        self._loader = PackLoader(plan, corpora, rank=0, size=1, steps=steps, pin_memory=False)
        self.plan = self._loader.plan
        if self.plan.rule.long_documents == "keep":
            raise DistattnError(
                f'{self.plan.path}: with long_documents = "keep" steps have different numbers of packs; use PackLoader, or "cut".'
            )
        changes = [first for first, _ in self.plan.rule.context if first < self._loader.end]
        # the first step of each context length, then the end of all steps; `_before` has the number of packs before each
        self._first = [*changes, self._loader.end]
        counts = [
            (end - begin) * self.plan.rule.packs_at(begin) for begin, end in zip(changes, self._first[1:], strict=True)
        ]
        self._before = [0, *accumulate(counts)]
        last = self._loader.end - 1
        missing = self.plan.rule.packs_at(last) - len(self.plan.step(last).packs)
        if missing and steps is not None:
            raise DistattnError(f"{self.plan.path}: step {last:,} lacks {missing:,} packs; take fewer steps.")
        self._packs = self._before[-1] - (self.plan.rule.packs_at(last) if missing else 0)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return only the arguments for pickling: a loader's worker processes open the plan and the files themselves."""
        return partial(PackDataset, steps=self._steps), self._given

    def __len__(self) -> int:
        """Return the number of packs."""
        return self._packs

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return `input_ids` and `shift_labels`, int64 (1, N), and `document_lengths`. Raise IndexError after the last pack."""
        if not 0 <= number < self._packs:
            raise IndexError(f"there is no pack {number}; there are {self._packs}.")
        part = bisect_right(self._before, number) - 1
        first = self._first[part]
        step, pack = divmod(number - self._before[part], self.plan.rule.packs_at(first))
        batch = self._loader.batches(first + step)[pack]
        ids, labels = batch.read_tensors(np.arange(batch.tokens))
        return {"input_ids": ids[None], "shift_labels": labels[None], "document_lengths": torch.tensor(batch.lengths)}
