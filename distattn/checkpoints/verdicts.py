"""Training's verdict on a checkpoint, written after the save: verdict.json in its folder, not part of the manifest.

A checkpoint is saved right after an update, before any step has used its weights. The next step shows whether the weights are
good, so the verdict is written later. It is advice, not proof: it has no digest, and an unreadable file counts as no verdict.
This module does not need torch.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

VERDICT_FILE = "verdict.json"
# GOOD: the first step with these weights was applied; REFUSED: that step was refused; SET_ASIDE: a person chose an older
# checkpoint
GOOD, REFUSED, SET_ASIDE = "good", "refused", "set aside"
UNTESTED = "untested"


class CheckpointVerdict(NamedTuple):
    """The verdict on a checkpoint. kind: GOOD, REFUSED, SET_ASIDE or UNTESTED. text: a sentence that says why, or empty.

    kept: why the checkpoint is not removed, or "" if the rule decides. refused_step: the refused step (counted from 0); the
    checkpoint is kept until training has passed it. None if it is kept until a person removes it.
    """

    kind: str = UNTESTED
    text: str = ""
    kept: str = ""
    refused_step: int | None = None

    @property
    def is_doubtful(self) -> bool:
        """True if a run tries this checkpoint only after those without doubt, and the keep rule does not count it."""
        return self.kind in (REFUSED, SET_ASIDE)

    def write(self, checkpoint: Path) -> None:
        """Replace the verdict in a checkpoint's folder. Raises OSError on failure."""
        os.replace(self.write_aside(checkpoint), checkpoint / VERDICT_FILE)

    def write_aside(self, checkpoint: Path) -> Path:
        """Write the verdict into a temporary file in a checkpoint's folder and return its path. Raises OSError on failure."""
        aside = checkpoint / f"{VERDICT_FILE}.tmp"
        try:
            aside.write_text(json.dumps(self._asdict()) + "\n", "utf-8")
        except OSError:
            with suppress(OSError):
                aside.unlink()
            raise
        return aside

    @classmethod
    def read(cls, checkpoint: Path) -> CheckpointVerdict:
        """Return the verdict in a checkpoint's folder, or an untested verdict if the file is missing or invalid."""
        with suppress(OSError, ValueError, TypeError, RecursionError):
            verdict = cls(**json.loads((checkpoint / VERDICT_FILE).read_bytes()))
            texts_are_right = all(isinstance(text, str) for text in verdict[:-1])
            step_is_right = verdict.refused_step is None or isinstance(verdict.refused_step, int)
            if verdict.kind in (GOOD, REFUSED, SET_ASIDE, UNTESTED) and texts_are_right and step_is_right:
                return verdict
        return cls()
