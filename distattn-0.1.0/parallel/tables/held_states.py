"""The states of a recurrence that one rank holds of one head: intervals of tokens. Those that touch can be put together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple


class HeldState(NamedTuple):
    """Tokens [t0, t1) are summed up in `name`, from the end of step `there` on (-1: before the first)."""

    t0: int
    t1: int
    there: int
    name: Hashable


class Tiling(NamedTuple):
    """States that tile an interval in order, and the step at the end of which the last of them is there."""

    there: int
    states: list[HeldState]


class HeldStates:
    """The states that a rank comes to hold of one head, and what can be put together of them.

    Of all tilings of an interval the one that is there first counts, then the one whose last state is longest. So what is put
    together is defined, and holding more never makes impossible what was possible.
    """

    def __init__(self, states: Iterable[HeldState]):
        # states that end earlier first: all ways to a state's beginning are known before it
        self._states = sorted(states, key=lambda state: (state.t1, state.t0, state.there))
        # by first token: for each token that tilings from there reach, when the earliest is there, and its last state
        self._reached: dict[int, dict[int, tuple[int, HeldState | None]]] = {}

    def there(self, t0: int, t1: int) -> int | None:
        """The step at the end of which tokens [t0, t1) can be put together; None where they never can."""
        found = self._from(t0).get(t1)
        return None if found is None else found[0]

    def last_uses(self, t0: int, uses: Mapping[int, int]) -> dict[HeldState, int]:
        """The states that tilings from t0 consist of, and the last step that uses each; uses: of each end t1, the last step.

        Tilings that share a beginning are walked once.
        """
        reached, steps, last = self._from(t0), dict(uses), {}
        # a tiling's last state goes first; what precedes it ends before it
        for t1 in sorted(reached, reverse=True):
            state = reached[t1][1]
            if state is not None and t1 in steps:
                last[state] = steps[t1]
                steps[state.t0] = max(steps.get(state.t0, -1), steps[t1])
        return last

    def find(self, t0: int, t1: int) -> Tiling | None:
        """The tiling of tokens [t0, t1); None where there is none."""
        reached = self._from(t0)
        if t1 not in reached:
            return None
        tiles: list[HeldState] = []
        at = t1
        while at != t0:
            state = reached[at][1]
            assert state is not None
            tiles.append(state)
            at = state.t0
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
