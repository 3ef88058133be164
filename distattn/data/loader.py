"""The packs of a plan, step by step, dealt out to the data-parallel shares of a run. Its state is one integer, the next step.

What a step has is the plan's, whatever the number of shares: the share, the number of shares and what is read ahead decide only
who gets which packs, and when they are read.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distattn.batch.packed_batch import BatchFacts
from distattn.data.block_digests import combined_digest
from distattn.data.corpus import Corpus
from distattn.data.label_masks import check_planned_masks
from distattn.data.pack_plan import Pack, PackPlan, StepPacks
from distattn.data.planned_batch import PlannedBatch
from distattn.data.reading_thread import ReadingThread, Started
from distattn.data.shares import check_counts, check_shares, deal_packs
from distattn.ir.errors import DistattnError


class PackLoader:
    """Iterates over the steps of a plan, and yields this share's packs of each: a list of `PlannedBatch`, the micro-batches.

    step: the next step to be yielded. A driver that takes steps ahead of training saves the number of steps that it has trained.
    end: the step before which the loader ends.

    Packs are dealt out by `deal_packs`; those of a share keep the plan's order. Where the number of shares does not divide that
    of the packs, shares have unequally many.
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
        """rank, size: the share and the number of shares. steps: how many to yield; by default all that the plan has.

        corpora: opened with `check_tokens=False`, their tokens are read without comparing them with digests.
        ahead: steps whose records are read and checked before they are asked for. even: refuse steps whose packs cannot be dealt
        out in equal numbers. drop_last: leave out the plan's last step where it is not full (`PackPlan.full_steps`), whatever the
        number of shares. vocabulary: token ids are below it; looked at when tokens are read. device: of what ranks read;
        pin_memory: whether through pinned memory, where CUDA is available. corpus_ids: ranks also read `corpus_ids` (1, T), the
        number of each token's corpus in the plan's `sources`, -1 of padding.

        Raises DistattnError naming what cannot be: corpora or masks that the plan was not made of, steps that it does not have,
        and more shares than a step has packs. Where a document kept whole takes the place of several packs, a step may turn out
        to have too few packs only when it is read.
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
        # of steps that were begun ahead
        self._started: dict[int, Started[StepPacks]] = {}
        # the same batch is yielded that was prepared, as long as somebody holds it
        self._batches: weakref.WeakValueDictionary[tuple[int, int], PlannedBatch] = weakref.WeakValueDictionary()
        check_shares(self.plan, self.size, self.step, self.end, self.even)

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes open the plan and the files themselves, and go on from the same step."""
        settings: dict[str, Any] = dict(
            start_step=self.step, steps=self.end - self.step, ahead=self.ahead, even=self.even
        )
        settings |= dict(vocabulary=self._vocabulary, device=self._device, pin_memory=self._pins)
        settings |= dict(corpus_ids=self._corpus_ids)
        return partial(PackLoader, rank=self.rank, size=self.size, **settings), (self.plan, self._corpora)

    def __iter__(self) -> Iterator[list[PlannedBatch]]:
        """Yield this share's batches from `step` on, and count `step` up before each is given out."""
        while self.step < self.end:
            batches = self.batches(self.step)
            self.step += 1
            yield batches

    def batches(self, step: int) -> list[PlannedBatch]:
        """This share's batches of any step of the plan. As long as somebody holds a batch, iterating yields the same object.

        Raises DamagedDataError where the step's record is damaged, DistattnError where it cannot be dealt out.
        """
        return self.shares(step)[self.rank]

    def shares(self, step: int) -> list[list[PlannedBatch]]:
        """The batches of all shares of any step of the plan. Nothing of their tokens is read."""
        record = self._record(step)
        packs = record.packs
        return [[self._batch(step, pack, packs[pack]) for pack in share] for share in self._deal(record)]

    @property
    def known_by(self) -> str:
        """A digest of all that batches depend on."""
        return combined_digest(self.plan.digest, self.size)

    @property
    def labels_are_known(self) -> bool:
        """Whether labels are counted without reading; where there are masks, these are read."""
        return not any(self._masks)

    def facts(self, step: int) -> list[list[BatchFacts]]:
        """Of any step, what is known of the batches of each share without reading tokens."""
        return [
            [BatchFacts(batch.lengths, batch.digest, batch.valid_labels) for batch in share]
            for share in self.shares(step)
        ]

    def lengths(self, step: int) -> list[list[tuple[int, ...]]]:
        """Of any step the tokens of each piece of each micro-batch of each share: what otherwise would be gathered."""
        record = self._record(step)
        packs = record.packs
        return [[tuple(packs[pack].lengths) for pack in share] for share in self._deal(record)]

    def state_dict(self) -> dict[str, Any]:
        """{"step": the next step, "plan": the plan's digest}."""
        return {"step": self.step, "plan": self.plan.digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, by whatever share of whatever number.

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
        """The record of a step. Those of the next steps are begun."""
        # of the one that was yielded last somebody may ask the facts
        for done in [done for done in self._started if done < self.step - 1]:
            del self._started[done]
        started = self._started.get(step)
        record = started.result() if started else self.plan.step(step)
        # what is looked up far away says nothing of what will be needed next
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
    """The corpora in the plan's order. Raises DistattnError where they are not what the plan was made of."""
    given = {corpus.name: corpus for corpus in corpora}
    planned = [source.name for source in plan.sources]
    if len(given) != len(corpora) or given.keys() != set(planned):
        raise DistattnError(
            f"{plan.path}: was made of the corpora {', '.join(planned)}; give these, not "
            f"{', '.join(corpus.name for corpus in corpora) or 'none'}."
        )
    for source in plan.sources:
        corpus = given[source.name]
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
    return [given[name] for name in planned]
