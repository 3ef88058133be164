"""Loaders that know every step of every rank beforehand: with them ranks need not tell each other what comes.

A pack plan is such a one (`distattn.data.loader`). All ranks compare once that they read the same plan from the same step on;
from then on what each of them will have is arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from distattn.batch.packed_batch import BatchFacts
from distattn.driver.step_exchange import StepInfo
from distattn.ir.errors import DistattnError


@runtime_checkable
class KnownSteps(Protocol):
    """A loader of one share of the data that knows the batches of all shares. Iterating yields a step's micro-batches.

    rank, size: the share, and of how many. step, end: the next step that it yields, and the one before which it ends. known_by: a
    digest of all that the batches depend on; empty where what they have is only known once they are read.
    """

    rank: int
    size: int
    step: int
    end: int

    @property
    def known_by(self) -> str: ...

    def __iter__(self) -> Iterator[list[Any]]: ...

    def facts(self, step: int) -> list[list[BatchFacts]]:
        """Of a step, the micro-batches of each share."""
        ...


class KnownInfos:
    """What all ranks of an exchange will tell of each step, as far as this rank knows it.

    share_of: of each rank, the share it reads. ask: ranks have to be asked all the same, since they tell more than that.
    Raises DistattnError where the loader is not that of this rank.
    """

    def __init__(self, loader: KnownSteps, share_of: Sequence[int], rank: int, ask: bool = False):
        mine = share_of[rank], max(share_of) + 1
        if (loader.rank, loader.size) != mine:
            raise DistattnError(
                f"this loader reads share {loader.rank} of {loader.size}, but this rank has share {mine[0]} of {mine[1]}; "
                "make it with the driver's data_parallel_rank and data_parallel_size."
            )
        self._loader, self._share_of, self._next = loader, share_of, loader.step
        # the loader goes on meanwhile
        self.name = f"{loader.known_by} from {loader.step} to {loader.end}" if loader.known_by and not ask else ""
        # whether all ranks have said that they know the same
        self._agreed = False

    def confirm(self, infos: Sequence[StepInfo]) -> None:
        """Hear what all ranks have told of the first step."""
        self._agreed = bool(self.name) and all(info.loader == self.name for info in infos)

    def next(self) -> list[StepInfo] | None:
        """What all ranks would tell of the next step; None where they have to be asked."""
        step, self._next = self._next, self._next + 1
        if not self._agreed:
            return None
        if step >= self._loader.end:
            return [StepInfo((), (), 0, ended=True) for _ in self._share_of]
        of_shares = [
            StepInfo(
                tuple(batch.lengths for batch in batches),
                tuple(batch.digest for batch in batches),
                sum(batch.valid_labels for batch in batches),
            )
            for batches in self._loader.facts(step)
        ]
        return [of_shares[share] for share in self._share_of]


def share_numbers(same_batch: Sequence[int], has_model: Sequence[bool]) -> list[int]:
    """Of each rank, the number of its share of the data; -1 for those that only serve. same_batch: of each, who else has its."""
    first = sorted({other for other, model in zip(same_batch, has_model, strict=True) if model})
    return [first.index(other) if model else -1 for other, model in zip(same_batch, has_model, strict=True)]
