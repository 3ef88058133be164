"""Which checkpoints of a folder are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distattn.checkpoints.checkpoint_folder import Checkpoint, sizes_are_right
from distattn.checkpoints.verdicts import GOOD
from distattn.ir.errors import DistattnError


@dataclass(frozen=True)
class KeepRule:
    """The rule of what is kept: the `last` newest checkpoints, and also one of every `every_hours` hours of training.

    Hours are those in which jobs went on (`Manifest.seconds`), since the time of day may jump. Checkpoints in doubt
    (`CheckpointVerdict`) do not count, so they push no other one out; they go with the ones before them. The newest good one
    stays until one of the `last` newest is good, and those that are marked as kept stay.

    last: at least 1. Raises DistattnError where a number is too small.
    """

    last: int = 3
    every_hours: float | None = None

    def __post_init__(self) -> None:
        if self.last < 1:
            raise DistattnError(f"last: {self.last} checkpoints would be kept; at least 1 must be.")
        if self.every_hours is not None and not self.every_hours > 0:
            raise DistattnError(f"every_hours: {self.every_hours} hours; give more than 0.")

    def removable(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Those that need not be kept, of checkpoints in the order in which they were saved.

        None is, where no newer one that is kept has its manifest and all files in their sizes: never the only good one. What has
        no manifest that can be trusted is not removed: a person may want to look at it.
        """
        whole = [one for one in checkpoints if one.manifest is not None]
        counted = [one for one in whole if not one.verdict.is_doubtful]
        newest = counted[-self.last :]
        if not any(map(sizes_are_right, newest)):
            return []
        good = (one for one in reversed(counted) if one.verdict.kind == GOOD and sizes_are_right(one))
        others = [one for one in whole[whole.index(newest[0]) :] if one.verdict.is_doubtful]
        others += [one for one in whole if one.verdict.kept] + [one for one in [next(good, None)] if one is not None]
        kept = {one.folder for one in [*newest, *others, *self._spaced(counted)]}
        return [one for one in whole if one.folder not in kept]

    def _spaced(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Return the first checkpoint, after each the first that is `every_hours` younger, and those whose hour is not known."""
        if self.every_hours is None:
            return []
        kept, next_seconds = [], 0.0
        for one in checkpoints:
            assert one.manifest is not None
            seconds = one.manifest.seconds
            if seconds is None:
                # earlier versions kept these by their own rule
                kept.append(one)
            elif seconds >= next_seconds:
                kept.append(one)
                next_seconds = seconds + 3600 * self.every_hours
        return kept
