"""The rule that decides which checkpoints of a folder are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distattn.checkpoints.checkpoint_folder import Checkpoint, sizes_are_right
from distattn.checkpoints.verdicts import GOOD
from distattn.ir.errors import DistattnError


@dataclass(frozen=True)
class KeepRule:
    """A rule that keeps the `last` newest checkpoints, and also one per `every_hours` hours of training.

    Hours count only while jobs run (`Manifest.seconds`), since the time of day may jump. Doubtful checkpoints (see
    `CheckpointVerdict`) do not count, so they never displace others; they stay while they are among the newest. The newest good
    checkpoint stays until one of the `last` newest is good. Checkpoints marked as kept stay.

    last: at least 1. Raises DistattnError if either setting is too small.
    """

    last: int = 3
    every_hours: float | None = None

    def __post_init__(self) -> None:
        if self.last < 1:
            raise DistattnError(f"last: {self.last} checkpoints would be kept; at least 1 must be.")
        if self.every_hours is not None and not self.every_hours > 0:
            raise DistattnError(f"every_hours: {self.every_hours} hours; give more than 0.")

    def removable(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Return the checkpoints that need not be kept. checkpoints: in the order in which they were saved.

        Return [] unless one of the `last` newest has a valid manifest and files of the right sizes, so that the only good
        checkpoint is never removed. A checkpoint without a valid manifest is never removed, since a user may want to examine
        it.
        """
        with_manifest = [checkpoint for checkpoint in checkpoints if checkpoint.manifest is not None]
        counted = [checkpoint for checkpoint in with_manifest if not checkpoint.verdict.is_doubtful]
        newest = counted[-self.last :]
        if not any(map(sizes_are_right, newest)):
            return []
        good = (
            checkpoint
            for checkpoint in counted[::-1]
            if checkpoint.verdict.kind == GOOD and sizes_are_right(checkpoint)
        )
        recent = with_manifest[with_manifest.index(newest[0]) :]
        others = [checkpoint for checkpoint in recent if checkpoint.verdict.is_doubtful]
        others += [checkpoint for checkpoint in with_manifest if checkpoint.verdict.kept]
        others += [newest_good for newest_good in [next(good, None)] if newest_good is not None]
        kept = {checkpoint.folder for checkpoint in [*newest, *others, *self._spaced(counted)]}
        return [checkpoint for checkpoint in with_manifest if checkpoint.folder not in kept]

    def _spaced(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Return checkpoints at least `every_hours` apart, starting with the first, and all without recorded hours."""
        if self.every_hours is None:
            return []
        kept, next_seconds = [], 0.0
        for checkpoint in checkpoints:
            assert checkpoint.manifest is not None
            seconds = checkpoint.manifest.seconds
            if seconds is None:
                # it is from an earlier version, which did not record seconds and kept checkpoints by a different rule
                kept.append(checkpoint)
            elif seconds >= next_seconds:
                kept.append(checkpoint)
                next_seconds = seconds + 3600 * self.every_hours
        return kept
