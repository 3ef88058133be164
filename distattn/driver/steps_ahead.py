"""Steps that loops have taken from a loader but not yielded; the next loop over the same loader begins with them.

A loop over `ContextParallel.steps` takes each step while the previous one trains. Without this, a loop that is left early would
lose the step that it took last.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from distattn.batch.packed_batch import Batch, micro_batches_of
from distattn.driver.global_loader import GlobalLoader
from distattn.ir.errors import DistattnError


class StepAhead:
    """A step that was read from a source but not yielded.

    packed: its micro-batches; None if the source had ended. put_back: rewinds a source with a position to this step; None for
    other sources. taken_over: True once another loop has started with the step.
    """

    def __init__(self, packed: list[Batch] | None, put_back: Callable[[], None] | None):
        self.packed, self.put_back, self.taken_over = packed, put_back, False


class StepsAhead:
    """The steps read ahead: at most one `StepAhead` per source. A source is an iterator, or a loader with a position."""

    def __init__(self) -> None:
        # use ids as keys, because iterators may define equality, and a few do not support weak references
        self._held: dict[int, tuple[Any, StepAhead]] = {}

    def hold(self, source: Any, step: StepAhead) -> None:
        """Keep the step for the next loop over the source, for as long as the source lives.

        A source that does not support weak references lives until the next loop, or until `clear`.
        """
        try:
            alive: Any = weakref.ref(source, partial(self._forget, id(source)))
        except TypeError:
            alive = source
        self._held[id(source)] = alive, step

    def take(self, source: Any) -> StepAhead | None:
        """Return the step kept for this source, and forget it; return None if no step is kept."""
        _, step = self._held.pop(id(source), (None, None))
        if step is not None:
            step.taken_over = True
            if step.put_back is not None:
                step.put_back()
        return step

    def drop(self, source: Any, step: StepAhead) -> None:
        """Forget a step that is about to be yielded by the loop that read it."""
        if self._held.get(id(source), (None, None))[1] is step:
            del self._held[id(source)]

    def clear(self) -> None:
        """Forget all steps."""
        self._held.clear()

    def _forget(self, key: int, _: Any) -> None:
        self._held.pop(key, None)


class StepLoop:
    """A loop over a loader that starts with the step that an earlier loop over the same source left behind."""

    def __init__(self, loader: Any, ahead: StepsAhead):
        """Raise DistattnError for a loader that cannot be iterated over."""
        try:
            self._iterator: Iterator[Any] = iter(loader)
        except TypeError as error:
            # for example, a zero-dimensional array
            raise DistattnError(f"this loader cannot be iterated over: {error}.") from None
        self._loader, self._ahead = loader, ahead
        self._held: StepAhead | None = None
        # a later loop continues an iterator or a loader with a position; other iterables start over
        self._goes_on = self._iterator is loader or isinstance(loader, GlobalLoader)
        self._left = ahead.take(loader) if self._goes_on else None

    def next(self) -> list[Batch] | None:
        """Return the micro-batches of the next step, or None after the last. Raise the loader's errors."""
        step, self._left = self._left, None
        if step is not None and step.put_back is None:
            return step.packed
        return micro_batches_of(next(self._iterator, None))

    def hold(self, packed: list[Batch] | None, put_back: Callable[[], None] | None) -> None:
        """Keep a step that has not been yielded yet. put_back: see `StepAhead`."""
        self._held = StepAhead(packed, put_back)
        if self._goes_on:
            self._ahead.hold(self._loader, self._held)

    def take_back(self) -> bool:
        """Take back the kept step. Return False if another loop has used it; this loop then continues where that loop stopped."""
        step, self._held = self._held, None
        if step is None or not step.taken_over:
            if step is not None:
                self._ahead.drop(self._loader, step)
            return True
        self._left = self._ahead.take(self._loader)
        return False

    def leave(self) -> None:
        """End the loop early: rewind a loader with a position to the kept step, but keep the step of an iterator."""
        step = self._held
        if step is not None and step.put_back is not None and not step.taken_over:
            self._ahead.drop(self._loader, step)
            step.put_back()
