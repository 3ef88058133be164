"""Loaders that know the global batch of every step, so that ranks need not exchange facts about each step.

One example is the loader of a pack plan (`distattn.data`). Ranks check once that they all read the same plan from the same step.
From then on, each rank computes the facts of all others.
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
    """A loader of one share of the data that knows the global batch: the batches of all shares in every step.

    Iterating yields the micro-batches of its share, step by step. rank: the index of the share. size: the number of shares.
    step: the next step to yield. end: one past the last step. data_digest: a digest of everything that the batches depend on.
    labels_are_known: True if labels can be counted without reading the data.
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
        """Return a step's facts about the micro-batches of each share."""
        ...


class GlobalStepInfos:
    """All ranks' facts about each step, as far as this rank can compute them.

    Raises DistattnError if the loader reads another rank's share.
    """

    def __init__(self, loader: GlobalLoader, table: RankTable, ask: bool):
        """Check the loader's share. ask: True if ranks must always exchange facts, even if this rank could compute them."""
        self._loader, self._table = loader, table
        self._share_of = share_numbers(table.first_of_block, table.has_model)
        share, shares = self._share_of[table.rank], max(self._share_of) + 1
        if (loader.rank, loader.size) != (share, shares):
            raise DistattnError(
                f"this loader reads share {loader.rank} of {loader.size}, but this rank has share {share} of {shares}; "
                f"make it with rank={share}, size={shares}."
            )
        # compose the name now, because it contains the loader's step, which advances
        self.name = f"{loader.data_digest} from step {loader.step} to {loader.end}"
        self._next = loader.step
        # exchange facts until all ranks have confirmed that they read the same plan
        self._may_know, self._asks = loader.labels_are_known and not ask, True

    def confirm(self, infos: Sequence[StepInfo]) -> None:
        """Check all ranks' facts about the first step. Raise DistattnError if ranks read different plans or steps."""
        names = {info.loader: rank for rank, info in reversed(list(enumerate(infos))) if info.loader}
        if len(names) > 1:
            (first_name, first), (other_name, other) = sorted(names.items(), key=lambda item: item[1])[:2]
            members = self._table.members
            raise DistattnError(
                f"rank {members[other]} reads the plan {other_name}, rank {members[first]} {first_name}: begin all ranks with "
                "one plan and step."
            )
        self._asks = not self._may_know or any(not info.loader for info in self._table.of_models(list(infos)))

    def next(self, batches: Sequence[Batch] | None) -> list[StepInfo] | None:
        """Return all ranks' facts about the next step; None if ranks must exchange them.

        batches: this rank's batches in that step. Raise DistattnError if the loader yielded a different step.
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
        expected = infos[self._table.rank]
        if expected.ended != (batches is None) or expected.digests != tuple(batch.digest for batch in batches or ()):
            raise self.refusal()
        return infos

    def refusal(self) -> DistattnError:
        """Return the error for a loop whose loader was also used by other code."""
        return DistattnError(
            f"the loader has given another step than step {self._next - 1:,}: something else went on with it, such as a loop "
            "inside this one or load_state_dict; give each loop a loader of its own."
        )

    def rewind(self) -> None:
        """Set the loader back to the step that was read ahead but not yielded."""
        self._loader.step = self._next - 1


def share_numbers(same_batch: Sequence[int], has_model: Sequence[bool]) -> list[int]:
    """Return the index of each rank's share of the data; -1 for servers.

    same_batch: for each rank, the first rank that holds the same batch.
    """
    first = sorted({other for other, model in zip(same_batch, has_model, strict=True) if model})
    return [first.index(other) if model else -1 for other, model in zip(same_batch, has_model, strict=True)]
