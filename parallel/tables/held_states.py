"""The states of a recurrence that a rank holds for one head, each for an interval of tokens; adjacent states can be combined."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple


class HeldState(NamedTuple):
    """A state named `name` of tokens [t0, t1), available from the end of step `there` on (-1: before the first step)."""

    t0: int
    t1: int
    there: int
    name: Hashable


class Tiling(NamedTuple):
    """The states that tile an interval, in order, and the step at the end of which all of them are available."""

    there: int
    states: list[HeldState]


class HeldStates:
    """All states that a rank ever holds for one head, and the states that can be combined from them.

    If an interval has several tilings, the tiling available first is used; among tilings available in the same step, the tiling
    whose last state is longest. The result is therefore unique, and holding more states never makes a combination impossible.
    """

    def __init__(self, states: Iterable[HeldState]):
        # sorted by end, so that all tilings up to a state's first token are found before the state itself
        self._states = sorted(states, key=lambda state: (state.t1, state.t0, state.there))
        # maps each first token, then each token that tilings from it can reach, to the earliest step and the last state
        self._reached: dict[int, dict[int, tuple[int, HeldState | None]]] = {}

    def there(self, t0: int, t1: int) -> int | None:
        """Return the step at the end of which the state of tokens [t0, t1) can be combined, or None if it never can."""
        reached = self._from(t0).get(t1)
        return None if reached is None else reached[0]

    def last_uses(self, t0: int, uses: Mapping[int, int]) -> dict[HeldState, int]:
        """Return the states used in the tilings of intervals [t0, t1), with the last step that uses each state. uses: maps each
        t1 to the last step that uses its interval.

        A common prefix of several tilings is visited only once.
        """
        reached, steps, last = self._from(t0), dict(uses), {}
        # go backwards: the states before a tiling's last state end earlier
        for t1 in sorted(reached, reverse=True):
            state = reached[t1][1]
            if state is not None and t1 in steps:
                last[state] = steps[t1]
                steps[state.t0] = max(steps.get(state.t0, -1), steps[t1])
        return last

    def find(self, t0: int, t1: int) -> Tiling | None:
        """Return the tiling of tokens [t0, t1), or None if there is no such tiling."""
        reached = self._from(t0)
        if t1 not in reached:
            return None
        tiles: list[HeldState] = []
        end = t1
        while end != t0:
            state = reached[end][1]
            assert state is not None
            tiles.append(state)
            end = state.t0
        return Tiling(reached[t1][0], tiles[::-1])

    def _from(self, t0: int) -> dict[int, tuple[int, HeldState | None]]:
        if t0 not in self._reached:
            best: dict[int, tuple[int, HeldState | None]] = {t0: (-1, None)}
            for state in self._states:
                if state.t0 < t0 or state.t0 not in best:
                    continue
                there = max(best[state.t0][0], state.there)
                if state.t1 not in best or there < best[state.t1][0]:
                    best[state.t1] = there, state
            self._reached[t0] = best
        return self._reached[t0]
