"""The end of an attempt on several nodes: its cause, and the nodes to leave out of the next attempt."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distattn.ir.errors import DamagedDataError, DistattnError, LostRankError, RunStopped

# exit codes of ranks that have given a reason, and would fail again for the same reason
_FINAL = (DistattnError.exit_code, DamagedDataError.exit_code)
# kinds of rank failures, likeliest cause of other ranks' failures first
_KINDS = ("killed", "cut", "hung", "raised", "refused")
# exit codes of ranks that are not at fault: done, lost a peer, or asked to stop
_OF_OTHERS = (0, LostRankError.exit_code, RunStopped.exit_code)
# seconds that other nodes get after the first failure to end by themselves, before they are killed
OTHERS_SECONDS = 5.0
# consecutive failures of one host before it is left out, and the maximum seconds between two of them
_MOST_FAILURES, _FORGOTTEN_SECONDS = 2, 86400.0


@dataclass
class AttemptEnd:
    """The result of an attempt on several nodes.

    code: exit code of the attempt. codes: exit codes by host, in the order in which the hosts ended; None if a signal killed
    the ranks. descriptions: how each host ended, according to the process that started its ranks. lost: hosts that no longer
    exist. next_nodes: node count of the next attempt if ranks were asked to end for it, otherwise 0. unstarted: the
    scheduler's reason why no ranks were started, otherwise "".
    """

    code: int = 0
    codes: dict[str, int | None] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    next_nodes: int = 0
    unstarted: str = ""

    def add(self, host: str, code: int | None, description: str = "") -> bool:
        """Record how a host's ranks ended. Return False if ranks were asked to stop. description: by default the exit code."""
        self.codes.setdefault(host, code)
        self.descriptions.setdefault(host, description or f"ended with exit code {code}")
        return code != RunStopped.exit_code

    def blamed(self, hosts: Sequence[str]) -> list[str]:
        """Return the hosts at fault: lost hosts, or else hosts whose ranks were killed, or else the first that failed.

        If all hosts that ended only report that they lost another host, return the hosts that did not answer.
        """
        killed = [host for host, code in self.codes.items() if code is None or code > 128]
        failed = [host for host, code in self.codes.items() if code not in _OF_OTHERS]
        return self.lost or killed or failed[:1] or self.silent(hosts) or list(self.codes)[:1]

    def silent(self, hosts: Sequence[str]) -> list[str]:
        """Return the attempt's hosts that did not answer after others had failed."""
        return [host for host in hosts if host not in self.codes] if self.codes else []

    def is_final(self) -> bool:
        """Return whether ranks failed for a reason that would also make another attempt fail."""
        # exit codes of ranks that failed for such a reason, or that ended because another rank had ended
        following = (*_FINAL, 0, 1, LostRankError.exit_code)
        codes = self.codes.values()
        return not self.lost and any(code in _FINAL for code in codes) and all(code in following for code in codes)

    def cause(self, hosts: Sequence[str], node_reports: Mapping[int, Mapping[str, Any]]) -> tuple[str, list[str]]:
        """Return the cause and the hosts at fault. node_reports: the nodes' reports on their ranks, by index in `hosts`."""
        if self.lost or not node_reports:
            return self.why(hosts), self.blamed(hosts)
        least = min(map(_rank_of_cause, node_reports.values()))
        unreported = [host for node, host in enumerate(hosts) if node not in node_reports]
        if least == len(_KINDS) and unreported:
            return self._describe(unreported), unreported
        first = [facts for facts in node_reports.values() if _rank_of_cause(facts) == least]
        # if ranks hang, all nodes report the same sentence, so remove duplicates
        sentences = list(
            dict.fromkeys(f"{', '.join(hosts[node] for node in facts['nodes'])}: {facts['why']}" for facts in first)
        )
        return "; ".join(sentences), sorted({hosts[node] for facts in first for node in facts["nodes"]})

    def why(self, hosts: Sequence[str]) -> str:
        """Return a clause that says how the hosts at fault ended."""
        default = (
            f"no ranks were started: {self.unstarted}"
            if self.unstarted
            else f"the attempt ended with exit code {self.code}"
        )
        return self._describe(self.blamed(hosts)) or default

    def _describe(self, hosts: Sequence[str]) -> str:
        descriptions = self.descriptions | dict.fromkeys(self.lost, "was lost")
        return ", ".join(f"{host} {descriptions.get(host, 'no longer answered')}" for host in hosts)


class RepeatedFailures:
    """Counts consecutive failures of the same rank or host, which are unlikely to be a coincidence.

    A failure of another rank or host in between, or a day without failures, restarts the count.
    """

    def __init__(self) -> None:
        self.count = 0
        self._suspects: set[Any] = set()
        self._last = float("-inf")

    def add(self, blamed: Iterable[Any]) -> None:
        """Record a failure and the ranks or hosts at fault for it."""
        now, blamed = time.monotonic(), set(blamed)
        common = self._suspects & blamed if now - self._last < _FORGOTTEN_SECONDS else set()
        self._suspects, self.count = (common, self.count + 1) if common else (blamed, 1)
        self._last = now

    @property
    def culprit(self) -> Any:
        """The only rank or host that was at fault each time, or None if there is no such rank or host."""
        return next(iter(self._suspects)) if self.count >= _MOST_FAILURES and len(self._suspects) == 1 else None

    def forget(self, suspect: Any) -> None:
        """Restart the count if it counts failures of `suspect`."""
        if suspect in self._suspects:
            self._suspects, self.count = set(), 0


class LeftOut:
    """The hosts that are left out of attempts."""

    def __init__(self) -> None:
        self.hosts: list[str] = []
        self._failures = RepeatedFailures()
        # subsets of `hosts`: hosts that failed but still answer, and hosts on which no attempt could begin
        self._failing: list[str] = []
        self._unstarted: list[str] = []
        # hosts on which no attempt could begin, and that were later taken back for another try
        self.asked_again: set[str] = set()

    @property
    def failing(self) -> list[str]:
        """Hosts that failed repeatedly but still answer, whether or not they are left out."""
        culprit = self._failures.culprit
        return [*self._failing, *([] if culprit is None or culprit in self.hosts else [culprit])]

    def blame(self, hosts: Sequence[str], end: AttemptEnd, spare: int) -> None:
        """Leave out lost hosts and, if other hosts can replace them, hosts that stopped answering or failed repeatedly.

        spare: number of hosts beyond those that an attempt needs.
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
        """Leave out a host that did not answer in time or could not start processes when an attempt was about to begin."""
        self.hosts.append(host)
        self._unstarted.append(host)

    def take_back_unstarted(self, alive: Collection[str]) -> str:
        """Take back the first host in `alive` on which no attempt could begin. Return it, or "" if there is no such host."""
        for host in self._unstarted:
            if host in alive:
                self._unstarted.remove(host)
                self.hosts.remove(host)
                self.asked_again.add(host)
                return host
        return ""

    def take_back(self) -> list[str]:
        """Take back the hosts that failed but still answer, and return them. Call this if there are too few other hosts."""
        hosts, self._failing = self._failing, []
        for host in hosts:
            self.hosts.remove(host)
            self._failures.forget(host)
        return hosts


def _rank_of_cause(facts: Mapping[str, Any]) -> int:
    """Return how unlikely the failure in a node's report is to have caused those of other nodes; 0 is the likeliest cause."""
    # reports of older releases lack "lost_peer"
    follows = facts.get("lost_peer", facts["exit_code"] == LostRankError.exit_code)
    return len(_KINDS) if follows and facts["kind"] in ("raised", "refused") else _KINDS.index(facts["kind"])
