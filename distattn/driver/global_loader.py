"""Loaders that know the global batch of every step: with them ranks need not exchange facts about each step.

The loader of a pack plan is one (`distattn.data`). All ranks compare once that they read the same plan from the same step on;
from then on each rank computes what all others will have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from distattn.batch.packed_batch import Batch, BatchFacts
from distattn.driver.rank_table import RankTable
from distattn.driver.step_exchange import StepInfo
from distattn.ir.errors import DistattnError


@runtime_checkable
class GlobalLoader(Protocol):
    """A loader of one share of the data that knows the global batch: the batches of all shares, of any step.

    Iterating yields the micro-batches of a step of its own share. rank, size: number of the share, and how many there are. step:
    the next step that it yields. end: the step before which it ends. data_digest: a digest of everything that the batches depend
    on. labels_are_known: labels can be counted without reading.
    """

    rank: int
    size: int
    step: int
    end: int

    @property
    def data_digest(self) -> str: ...

    @property
    def labels_are_known(self) -> bool: ...

    def __iter__(self) -> Iterator[list[Any]]: ...

    def facts(self, step: int) -> list[list[BatchFacts]]:
        """Return the facts about the micro-batches of each share in a step."""
        ...


class GlobalStepInfos:
    """What all ranks of an exchange will tell of each step, as far as this rank knows it.

    Raises DistattnError where the loader is not that of this rank.
    """

    def __init__(self, loader: GlobalLoader, table: RankTable, same_batch: Sequence[int] | None, ask: bool):
        """same_batch: of each rank, the rank whose data it has, by default that of the table. ask: whatever the loader knows."""
        self._loader, self._table = loader, table
        self._share_of = share_numbers(same_batch or table.first_of_block, table.has_model)
        mine = self._share_of[table.rank], max(self._share_of) + 1
        if (loader.rank, loader.size) != mine:
            raise DistattnError(
                f"this loader reads share {loader.rank} of {loader.size}, but this rank has share {mine[0]} of {mine[1]}; "
                f"make it with rank={mine[0]}, size={mine[1]}."
            )
        # the loader goes on meanwhile
        self.name = f"{loader.data_digest} from step {loader.step} to {loader.end}"
        self._next = loader.step
        # whether ranks have to be asked, which they are until all have said that they read the same
        self._may_know, self._asks = loader.labels_are_known and not ask, True

    def confirm(self, infos: Sequence[StepInfo]) -> None:
        """Hear what all ranks have told of the first step. Raises DistattnError where they read other plans or other steps."""
        names = {info.loader: rank for rank, info in reversed(list(enumerate(infos))) if info.loader}
        if len(names) > 1:
            (one, first), (other, second) = sorted(names.items(), key=lambda item: item[1])[:2]
            members = self._table.members
            raise DistattnError(
                f"rank {members[second]} reads the plan {other}, rank {members[first]} {one}: begin all ranks with one plan and "
                "step."
            )
        self._asks = not self._may_know or any(not info.loader for info in self._table.of_models(list(infos)))

    def next(self, batches: Sequence[Batch] | None) -> list[StepInfo] | None:
        """What all ranks would tell of the next step, of which this one has these batches; None where they have to be asked.

        Raises DistattnError where the loader has given another step.
        """
        step, self._next = self._next, self._next + 1
        if self._asks:
            return None
        if step >= self._loader.end:
            infos = [StepInfo((), (), 0, ended=True) for _ in self._share_of]
        else:
            of_shares = [
                StepInfo(
                    tuple(batch.lengths for batch in share),
                    tuple(batch.digest for batch in share),
                    sum(batch.valid_labels for batch in share),
                )
                for share in self._loader.facts(step)
            ]
            infos = [of_shares[share] for share in self._share_of]
        mine = infos[self._table.rank]
        if mine.ended != (batches is None) or mine.digests != tuple(batch.digest for batch in batches or ()):
            raise self.refusal()
        return infos

    def refusal(self) -> DistattnError:
        """Return the error of a loop whose loader was used by something else."""
        return DistattnError(
            f"the loader has given another step than step {self._next - 1:,}: something else went on with it, such as a loop "
            "inside this one or load_state_dict; give each loop a loader of its own."
        )

    def rewind(self) -> None:
        """Let the loader go on with the step that was taken ahead and not given out."""
        self._loader.step = self._next - 1


def share_numbers(same_batch: Sequence[int], has_model: Sequence[bool]) -> list[int]:
    """Of each rank, the number of its share of the data; -1 for those that only serve. same_batch: of each, who else has its."""
    first = sorted({other for other, model in zip(same_batch, has_model, strict=True) if model})
    return [first.index(other) if model else -1 for other, model in zip(same_batch, has_model, strict=True)]
