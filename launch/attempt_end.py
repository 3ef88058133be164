"""How an attempt on several nodes has ended, what it failed for, and which nodes the next one leaves out."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distattn.ir.errors import DamagedDataError, DistattnError, LostRankError, RunStopped
from distattn.supervision.culprits import tells_of_lost_peer

# a rank that ends so has said why, and would again
_FINAL = (DistattnError.exit_code, DamagedDataError.exit_code)
# what may be wrong with a rank, the likeliest cause of what happens to others first
_KINDS = ("killed", "cut", "hung", "raised", "refused")
# of ranks that end for what others do
_OF_OTHERS = (0, LostRankError.exit_code, RunStopped.exit_code)
# that nodes may take to fail after the first, for what it failed for, before they are ended
OTHERS_SECONDS = 5.0
# of one host in a row before it is left out, each within so long of the one before
_MOST_FAILURES, _FORGOTTEN_SECONDS = 2, 86400.0


@dataclass
class AttemptEnd:
    """How an attempt has ended. code: of the whole. codes: of hosts in the order of their ends, None where a signal killed them.

    words: what was said of them by who started them. lost: hosts that are there no more. next_nodes: how many
    the next attempt is to have, where ranks were asked to end for it, else 0. unstarted: why no ranks were started, in the
    scheduler's words, else empty.
    """

    code: int = 0
    codes: dict[str, int | None] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    next_nodes: int = 0
    unstarted: str = ""

    def add(self, host: str, code: int | None, words: str = "") -> bool:
        """Note how the ranks of a host have ended; returns whether they failed. words: default to the exit code."""
        self.codes.setdefault(host, code)
        self.words.setdefault(host, words or f"ended with exit code {code}")
        return code != RunStopped.exit_code

    def blamed(self, hosts: Sequence[str]) -> list[str]:
        """Of the attempt's hosts those to blame: lost ones, else those whose ranks were killed, or have said why they end.

        Where all that have ended only miss another one, those that did not answer.
        """
        killed = [host for host, code in self.codes.items() if code is None or code > 128]
        own = [host for host, code in self.codes.items() if code not in _OF_OTHERS]
        return self.lost or killed or own[:1] or self.silent(hosts) or list(self.codes)[:1]

    def silent(self, hosts: Sequence[str]) -> list[str]:
        """Of the attempt's hosts those that said nothing any more when others had failed."""
        return [host for host in hosts if host not in self.codes] if self.codes else []

    def is_final(self) -> bool:
        """Whether ranks have said why they cannot go on, which another attempt would not change."""
        # others end because it has
        following = (*_FINAL, 0, 1, LostRankError.exit_code)
        codes = self.codes.values()
        return not self.lost and any(code in _FINAL for code in codes) and all(code in following for code in codes)

    def cause(self, hosts: Sequence[str], told: Mapping[int, Mapping[str, Any]]) -> tuple[str, list[str]]:
        """(What went wrong, the hosts to blame). told: what nodes say of their own ranks, by their place in hosts."""
        if self.lost or not told:
            return self.why(hosts), self.blamed(hosts)
        least = min(map(_rank_of_cause, told.values()))
        untold = [host for node, host in enumerate(hosts) if node not in told]
        if least == len(_KINDS) and untold:
            return self._words(untold), untold
        first = [facts for facts in told.values() if _rank_of_cause(facts) == least]
        # of ranks that hang, all nodes say the same
        words = list(
            dict.fromkeys(f"{', '.join(hosts[node] for node in facts['nodes'])}: {facts['why']}" for facts in first)
        )
        return "; ".join(words), sorted({hosts[node] for facts in first for node in facts["nodes"]})

    def why(self, hosts: Sequence[str]) -> str:
        """What became of the hosts to blame."""
        none = (
            f"no ranks were started: {self.unstarted}"
            if self.unstarted
            else f"the attempt ended with exit code {self.code}"
        )
        return self._words(self.blamed(hosts)) or none

    def _words(self, hosts: Sequence[str]) -> str:
        said = self.words | dict.fromkeys(self.lost, "was lost")
        return ", ".join(f"{host} {said.get(host, 'did not answer any more')}" for host in hosts)


class RepeatedFailures:
    """Whether one and the same rank or host was to blame for the last failures, which chance hardly explains.

    Other ones' failures in between, or a day, make it begin anew.
    """

    def __init__(self) -> None:
        self.count = 0
        self._suspects: set[Any] = set()
        self._last = float("-inf")

    def add(self, blamed: Iterable[Any]) -> None:
        """Take note of who was to blame for a failure."""
        now, blamed = time.monotonic(), set(blamed)
        common = self._suspects & blamed if now - self._last < _FORGOTTEN_SECONDS else set()
        self._suspects, self.count = (common, self.count + 1) if common else (blamed, 1)
        self._last = now

    @property
    def culprit(self) -> Any:
        """Who failed each time, as nobody else did; None where there is no such one."""
        return next(iter(self._suspects)) if self.count >= _MOST_FAILURES and len(self._suspects) == 1 else None

    def forget(self, one: Any) -> None:
        """Begin anew where one of these was the suspect."""
        if one in self._suspects:
            self._suspects, self.count = set(), 0


class LeftOut:
    """Hosts that attempts take no more."""

    def __init__(self) -> None:
        self.hosts: list[str] = []
        self._failures = RepeatedFailures()
        # of the hosts those that still answer, and those on which no attempt could begin
        self._failing: list[str] = []
        self._unstarted: list[str] = []
        # of the latter those that were taken again
        self.asked_again: set[str] = set()

    @property
    def failing(self) -> list[str]:
        """Hosts that have failed repeatedly and still answer, whether they are left out or not."""
        culprit = self._failures.culprit
        return [*self._failing, *([] if culprit is None or culprit in self.hosts else [culprit])]

    def blame(self, hosts: Sequence[str], end: AttemptEnd, spare: int) -> None:
        """Leave a host out that is lost; one that fell silent, or failed repeatedly, where another can stand in for it.

        spare: how many more hosts there are than an attempt takes.
        """
        before = len(self.hosts)
        self._failures.add(hosts)
        for host in hosts:
            suspect = host not in end.codes or host == self._failures.culprit
            if host not in self.hosts and (host in end.lost or suspect and len(self.hosts) - before < spare):
                self.hosts.append(host)
                if host in end.codes and host not in end.lost:
                    self._failing.append(host)

    def leave_out_unstarted(self, host: str) -> None:
        """Leave a host out that did not answer in time, or could start nothing, when an attempt was about to begin."""
        self.hosts.append(host)
        self._unstarted.append(host)

    def take_back_unstarted(self, alive: Collection[str]) -> str:
        """Take the host again that was left out first of those on which no attempt could begin; returns which, or "" for none."""
        for host in self._unstarted:
            if host in alive:
                self._unstarted.remove(host)
                self.hosts.remove(host)
                self.asked_again.add(host)
                return host
        return ""

    def take_back(self) -> list[str]:
        """Take hosts again that have failed, but answered: better than none. Returns which."""
        found, self._failing = self._failing, []
        for host in found:
            self.hosts.remove(host)
            self._failures.forget(host)
        return found


def _rank_of_cause(facts: Mapping[str, Any]) -> int:
    """How likely what a node says is what others failed for: 0 is most likely."""
    follows = facts["exit_code"] == LostRankError.exit_code or tells_of_lost_peer(facts["why"])
    return len(_KINDS) if follows and facts["kind"] in ("raised", "refused") else _KINDS.index(facts["kind"])
