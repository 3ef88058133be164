"""Load a plan's packs step by step and split them over a run's data-parallel shares. The only state is the next step, an integer.

The plan alone determines the contents of a step. The number of shares only decides which share gets which packs, and the number
of steps read ahead only when they are read.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distattn.batch.packed_batch import BatchFacts
from distattn.data.files.block_digests import combined_digest
from distattn.data.files.corpus import Corpus
from distattn.data.files.label_masks import check_planned_masks
from distattn.data.packing.pack_plan import Pack, PackPlan, StepPacks
from distattn.data.packing.shares import check_counts, check_shares, deal_packs
from distattn.data.planned_batch import PlannedBatch
from distattn.data.reading_thread import PendingRead, ReadingThread
from distattn.ir.errors import DistattnError


class PackLoader:
    """An iterable over a plan's steps that yields this share's packs of each step as a list of `PlannedBatch` micro-batches.

    step: the next step to yield. A driver that fetches steps ahead of training must save the number of steps trained instead
    of this value. end: the end of the steps to yield, exclusive.

    `deal_packs` assigns packs to shares; within a share they keep the plan's order. If the number of packs is not a multiple of
    the number of shares, some shares get more packs than others.
    """

    def __init__(
        self,
        plan: PackPlan | str | Path,
        corpora: Sequence[Corpus],
        *,
        rank: int,
        size: int,
        start_step: int = 0,
        steps: int | None = None,
        ahead: int = 2,
        even: bool = False,
        drop_last: bool = False,
        vocabulary: int | None = None,
        device: torch.device | str = "cpu",
        pin_memory: bool = True,
        corpus_ids: bool = False,
    ) -> None:
        """Open the plan, and check that its steps can be split over the shares.

        corpora: if opened with `check_tokens=False`, tokens are read without comparing them with their digests. rank, size: this
        share's number, and the number of shares. start_step, steps: the first step, and the number of steps to yield; by default
        all that remain in the plan. ahead: how many steps ahead to read and check step records. even: refuse steps whose packs
        cannot be split evenly. drop_last: leave out the plan's last step if it is not full (`PackPlan.full_steps`), regardless of
        the number of shares. vocabulary: check token ids against this limit (exclusive) when they are read. device: the device of
        the returned tensors. pin_memory: read through pinned memory if CUDA is available. corpus_ids: also return `corpus_ids`
        (1, T), the index of each token's corpus in the plan's `sources`, and -1 for padding.

        Raises DistattnError if the plan was made with other corpora or masks, if it does not have the requested steps, or if a
        step has fewer packs than there are shares. If a document kept whole replaces several packs, the loader may not notice
        that a step has too few packs until it reads the step.
        """
        self.plan = plan if isinstance(plan, PackPlan) else PackPlan.open(plan)
        self.rank, self.size, self.ahead, self.even = rank, size, ahead, even
        if not 0 <= rank < size:
            raise DistattnError(f"rank {rank} of {size} shares: ranks are 0 to size - 1.")
        if ahead < 0:
            raise DistattnError(f"ahead is {ahead}; it must be 0 or more steps.")
        last = self.plan.full_steps if drop_last else self.plan.steps
        full = "full steps" if drop_last else "steps"
        if not last:
            raise DistattnError(
                f"{self.plan.path}: has one step, which is not full, and drop_last leaves it out; leave out drop_last, or plan "
                "fewer tokens_per_step."
            )
        if not 0 <= start_step <= last:
            raise DistattnError(
                f"start_step {start_step:,}: {self.plan.path} has {last:,} {full}; begin with one of them."
            )
        self.step = start_step
        self.end = last if steps is None else start_step + steps
        if not start_step <= self.end <= last:
            raise DistattnError(
                f"steps: {steps:,} from step {start_step:,} on, but {self.plan.path} has {last:,} {full}; "
                "ask for fewer, or make a plan with more."
            )
        self._corpora = _corpora_of(self.plan, corpora)
        self._masks = [corpus.masks for corpus in self._corpora]
        self._vocabulary, self._device, self._pins = vocabulary, device, pin_memory
        self._corpus_ids = corpus_ids
        self._thread = ReadingThread()
        # records being read ahead, by step
        self._started: dict[int, PendingRead[StepPacks]] = {}
        # the same batch object is returned for as long as there is a reference to it
        self._batches: weakref.WeakValueDictionary[tuple[int, int], PlannedBatch] = weakref.WeakValueDictionary()
        check_shares(self.plan, self.size, self.step, self.end, self.even)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return only the arguments for pickling: another process opens the files itself, and starts at the same step."""
        make = partial(
            PackLoader,
            rank=self.rank,
            size=self.size,
            start_step=self.step,
            steps=self.end - self.step,
            ahead=self.ahead,
            even=self.even,
            vocabulary=self._vocabulary,
            device=self._device,
            pin_memory=self._pins,
            corpus_ids=self._corpus_ids,
        )
        return make, (self.plan, self._corpora)

    def __iter__(self) -> Iterator[list[PlannedBatch]]:
        """Yield this share's batches from `step` on. `step` is incremented before each yield."""
        while self.step < self.end:
            batches = self.batches(self.step)
            self.step += 1
            yield batches

    def batches(self, step: int) -> list[PlannedBatch]:
        """Return this share's batches of any step of the plan. While a batch is referenced, iterating yields the same object.

        Raises DamagedDataError if the step's record is damaged, and DistattnError if the step cannot be split over the shares.
        """
        return self.shares(step)[self.rank]

    def shares(self, step: int) -> list[list[PlannedBatch]]:
        """Return the batches of any step of the plan, one list for each share, without reading tokens."""
        record = self._record(step)
        packs = record.packs
        return [[self._batch(step, pack, packs[pack]) for pack in share] for share in self._deal(record)]

    @property
    def data_digest(self) -> str:
        """A digest of everything that determines the batches."""
        return combined_digest(self.plan.digest, self.size)

    @property
    def labels_are_known(self) -> bool:
        """True if labels can be counted without reading files, that is, if there are no masks."""
        return not any(self._masks)

    def facts(self, step: int) -> list[list[BatchFacts]]:
        """Return the lengths, digest and label count of each share's batches in any step, without reading tokens."""
        return [
            [BatchFacts(batch.lengths, batch.digest, batch.valid_labels) for batch in share]
            for share in self.shares(step)
        ]

    def lengths(self, step: int) -> list[list[tuple[int, ...]]]:
        """Return the piece lengths in any step, indexed by share, micro-batch and piece, without communication between ranks."""
        record = self._record(step)
        packs = record.packs
        return [[tuple(packs[pack].lengths) for pack in share] for share in self._deal(record)]

    def state_dict(self) -> dict[str, Any]:
        """Return {"step": the next step, "plan": the plan's digest}."""
        return {"step": self.step, "plan": self.plan.digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state returned by `state_dict`. The share and the number of shares may differ.

        Raises DistattnError if the state belongs to another plan, or if its step is after the plan's last one.
        """
        if state.keys() != {"step", "plan"}:
            raise DistattnError(f"a loader's state has step and plan, not {', '.join(map(str, state)) or 'nothing'}.")
        if state["plan"] != self.plan.digest:
            raise DistattnError(
                f"{self.plan.path}: is another plan (digest {self.plan.digest}) than the one the state is of ({state['plan']}); "
                "use the plan that the run began with."
            )
        if not 0 <= state["step"] <= self.end:
            raise DistattnError(
                f"{self.plan.path}: the state's next step is {state['step']:,}, but this loader ends after step {self.end:,}."
            )
        self.step = int(state["step"])
        check_shares(self.plan, self.size, self.step, self.end, self.even)

    def _record(self, step: int) -> StepPacks:
        """Return the record of a step, and start reading the records of the next steps."""
        # keep the step yielded last, because a caller may still ask for its facts
        for done in [done for done in self._started if done < self.step - 1]:
            del self._started[done]
        started = self._started.get(step)
        record = started.result() if started else self.plan.step(step)
        # do not read ahead for a lookup far from the current step, which does not say what will be needed next
        if self.step <= step <= self.step + self.ahead:
            for later in range(step + 1, min(step + 1 + self.ahead, self.end)):
                if later not in self._started:
                    self._started[later] = self._thread.start(partial(self.plan.step, later))
        return record

    def _batch(self, step: int, number: int, pack: Pack) -> PlannedBatch:
        batch = self._batches.get((step, number))
        if batch is None:
            digest = combined_digest(self.plan.digest, step, number)
            batch = PlannedBatch(
                pack,
                self._corpora,
                digest,
                masks=self._masks,
                thread=self._thread,
                vocabulary=self._vocabulary,
                device=self._device,
                pin_memory=self._pins,
                corpus_ids=self._corpus_ids,
            )
            self._batches[step, number] = batch
        return batch

    def _deal(self, record: StepPacks) -> list[list[int]]:
        shares = deal_packs(record, self.size)
        counts = [len(share) for share in shares]
        check_counts(self.plan, self.size, record.step, sum(counts), self.even and max(counts) != min(counts))
        return shares


def _corpora_of(plan: PackPlan, corpora: Sequence[Corpus]) -> list[Corpus]:
    """Return the corpora in the plan's order. Raise DistattnError if the plan was made from other corpora."""
    corpus_of = {corpus.name: corpus for corpus in corpora}
    planned = [source.name for source in plan.sources]
    if len(corpus_of) != len(corpora) or corpus_of.keys() != set(planned):
        raise DistattnError(
            f"{plan.path}: was made from the corpora {', '.join(planned)}; give these, not "
            f"{', '.join(corpus.name for corpus in corpora) or 'none'}."
        )
    for source in plan.sources:
        corpus = corpus_of[source.name]
        files = ", ".join(file.prefix for file in corpus.files)
        if not corpus.has_digest(source.digest):
            raise DistattnError(
                f"{plan.path}: was made from another corpus {source.name} (digest {source.digest}) than that of {files} "
                f"({corpus.digest}); give the same files in the same order, with .xxh3 if they had them, or make the plan again."
            )
        check_planned_masks(plan.path, source.masks, corpus)
        for file in corpus.files:
            if file.dtype.kind not in "iu":
                raise DistattnError(f"{file.prefix}.idx: byte 17: has {file.dtype.name}; token ids are whole numbers.")
    return [corpus_of[name] for name in planned]
