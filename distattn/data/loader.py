"""The packs of a plan, step by step, dealt out to the data-parallel shares of a run. Its state is one integer, the next step.

The contents of a step follow from the plan, whatever the number of shares. The share, the number of shares and the number of
steps read ahead decide only which share gets which packs, and when they are read.
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
    """An iterable over the steps of a plan that yields this share's packs of each: a list of `PlannedBatch`, the micro-batches.

    step: the next step to be yielded. A driver that takes steps ahead of training saves the number of steps that it has trained.
    end: the step before which the loader ends.

    Packs are dealt out by `deal_packs`; the packs of a share keep the plan's order. If the number of packs is not a multiple of
    the number of shares, some shares have more packs than others.
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
        """Open the plan, and check that its steps can be dealt out.

        rank, size: the share and the number of shares. steps: how many to yield; by default all steps of the plan. corpora: if
        they were opened with `check_tokens=False`, tokens are read without comparing them with their digests. ahead: how many
        steps ahead records are read and checked. even: refuse steps whose packs cannot be dealt out in equal numbers. drop_last:
        leave out the plan's last step if it is not full (`PackPlan.full_steps`), whatever the number of shares. vocabulary: token
        ids must be below it; they are checked when tokens are read. device: of the tensors that ranks read; pin_memory: whether
        they pass through pinned memory, if CUDA is available. corpus_ids: ranks also read `corpus_ids` (1, T), the number of each
        token's corpus in the plan's `sources`, and -1 for padding.

        Raises DistattnError for corpora or masks that the plan was not made of, for steps that it does not have, and if there are
        more shares than a step has packs. If a document that is kept whole takes the place of several packs, the loader may find
        only when it reads a step that the step has too few packs.
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
        # records that are being read ahead, by step
        self._started: dict[int, PendingRead[StepPacks]] = {}
        # the batch that was prepared is yielded again as long as there is a reference to it
        self._batches: weakref.WeakValueDictionary[tuple[int, int], PlannedBatch] = weakref.WeakValueDictionary()
        check_shares(self.plan, self.size, self.step, self.end, self.even)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let other processes open the plan and the files themselves, and go on from the same step."""
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
        """Yield this share's batches from `step` on. Increase `step` before each is yielded."""
        while self.step < self.end:
            batches = self.batches(self.step)
            self.step += 1
            yield batches

    def batches(self, step: int) -> list[PlannedBatch]:
        """Return this share's batches of any step of the plan. While a batch is referenced, iterating yields the same object.

        Raises DamagedDataError if the step's record is damaged, and DistattnError if the step cannot be dealt out.
        """
        return self.shares(step)[self.rank]

    def shares(self, step: int) -> list[list[PlannedBatch]]:
        """Return the batches of all shares of any step of the plan, without reading tokens."""
        record = self._record(step)
        packs = record.packs
        return [[self._batch(step, pack, packs[pack]) for pack in share] for share in self._deal(record)]

    @property
    def data_digest(self) -> str:
        """A digest of everything that the batches depend on."""
        return combined_digest(self.plan.digest, self.size)

    @property
    def labels_are_known(self) -> bool:
        """Whether labels can be counted without reading files. If there are masks, these must be read."""
        return not any(self._masks)

    def facts(self, step: int) -> list[list[BatchFacts]]:
        """Return what is known of the batches of each share of any step, without reading tokens."""
        return [
            [BatchFacts(batch.lengths, batch.digest, batch.valid_labels) for batch in share]
            for share in self.shares(step)
        ]

    def lengths(self, step: int) -> list[list[tuple[int, ...]]]:
        """Return the tokens of each piece of each micro-batch of each share of any step, which otherwise would be gathered."""
        record = self._record(step)
        packs = record.packs
        return [[tuple(packs[pack].lengths) for pack in share] for share in self._deal(record)]

    def state_dict(self) -> dict[str, Any]:
        """Return {"step": the next step, "plan": the plan's digest}."""
        return {"step": self.step, "plan": self.plan.digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; the share and the number of shares may differ.

        Raises DistattnError for the state of another plan, or of a step after the last.
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
        """Return the record of a step, and begin to read those of the next steps."""
        # a caller may still ask for the facts of the step that was yielded last
        for done in [done for done in self._started if done < self.step - 1]:
            del self._started[done]
        started = self._started.get(step)
        record = started.result() if started else self.plan.step(step)
        # a step that is looked up elsewhere says nothing about the step that will be needed next
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
    """Return the corpora in the plan's order. Raise DistattnError if the plan was made of others."""
    corpus_of = {corpus.name: corpus for corpus in corpora}
    planned = [source.name for source in plan.sources]
    if len(corpus_of) != len(corpora) or corpus_of.keys() != set(planned):
        raise DistattnError(
            f"{plan.path}: was made of the corpora {', '.join(planned)}; give these, not "
            f"{', '.join(corpus.name for corpus in corpora) or 'none'}."
        )
    for source in plan.sources:
        corpus = corpus_of[source.name]
        files = ", ".join(file.prefix for file in corpus.files)
        if not corpus.has_digest(source.digest):
            raise DistattnError(
                f"{plan.path}: was made of another corpus {source.name} (digest {source.digest}) than that of {files} "
                f"({corpus.digest}); give the same files in the same order, with .xxh3 if they had them, or make the plan anew."
            )
        check_planned_masks(plan.path, source.masks, corpus)
        for file in corpus.files:
            if file.dtype.kind not in "iu":
                raise DistattnError(f"{file.prefix}.idx: byte 17: has {file.dtype.name}; token ids are whole numbers.")
    return [corpus_of[name] for name in planned]
