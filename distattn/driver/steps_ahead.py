"""Steps that loops have taken from a loader and not given out: the next loop over the same loader begins with them.

A loop over `ContextParallel.steps` takes each step while the one before it trains. A loop that is left would otherwise lose the
step that it took last.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from distattn.batch.packed_batch import Batch


class StepAhead:
    """A step that was taken from a source and not given out.

    packed: its micro-batches; None if the source had ended. put_back: for a source with a position of its own, which then yields
    the step again. taken_over: whether another loop has begun with the step.
    """

    def __init__(self, packed: list[Batch] | None, put_back: Callable[[], None] | None = None):
        self.packed, self.put_back, self.taken_over = packed, put_back, False


class StepsAhead:
    """At most one step ahead for each source: an iterator, or a loader that has a position."""

    def __init__(self) -> None:
        # keys are ids: iterators may define equality, and a few take no weak reference
        self._held: dict[int, tuple[Any, StepAhead]] = {}

    def hold(self, source: Any, step: StepAhead) -> None:
        """Keep the step for the next loop over the source, for as long as the source lives.

        A source that takes no weak references lives until the next loop, or until `clear`.
        """
        try:
            alive: Any = weakref.ref(source, partial(self._forget, id(source)))
        except TypeError:
            alive = source
        self._held[id(source)] = alive, step

    def take(self, source: Any) -> StepAhead | None:
        """Return the step that is kept for this source, and forget it; None if there is none."""
        held = self._held.pop(id(source), None)
        if held is None:
            return None
        step = held[1]
        step.taken_over = True
        if step.put_back is not None:
            step.put_back()
        return step

    def drop(self, source: Any, step: StepAhead) -> None:
        """Forget the step, which its own loop gives out."""
        if (held := self._held.get(id(source))) is not None and held[1] is step:
            del self._held[id(source)]

    def clear(self) -> None:
        """Forget all steps."""
        self._held.clear()

    def _forget(self, key: int, _: Any) -> None:
        self._held.pop(key, None)
