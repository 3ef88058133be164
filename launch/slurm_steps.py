"""How a step of a Slurm job has ended, as srun says it, and which nodes the next one takes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distattn.ir.errors import DamagedDataError, DistattnError, LostRankError, RunStopped
from distattn.launch.slurm_commands import expand_hosts, unusable_hosts
from distattn.supervision.culprits import tells_of_lost_peer

# a rank that ends so has said why, and would again
_FINAL = (DistattnError.exit_code, DamagedDataError.exit_code)
# what may be wrong with a rank, the likeliest cause of what happens to others first
_KINDS = ("killed", "hung", "raised", "refused")
# of ranks that end for what others do
_OF_OTHERS = (0, LostRankError.exit_code, RunStopped.exit_code)
# of one host before it is left out
_MOST_FAILURES = 2
# srun's own lines about tasks and nodes
_TASK_ENDED = re.compile(r"srun: error: (\S+): tasks? [\d,\[\]-]+: (?:Exited with exit code (\d+)|(\w[^\n]*))")
_NODE_LOST = re.compile(r"srun: error: (?:Node failure on|[^\n]*failed on node) ([\w.,\[\]-]+)")


@dataclass
class StepEnd:
    """How a step has ended. code: srun's. codes: of hosts in the order of their ends, None where a signal killed them.

    words: what srun said of them. lost: hosts that Slurm has lost.
    """

    code: int = 0
    codes: dict[str, int | None] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def read(self, line: str, tasks: bool) -> bool:
        """Take over what a line of srun's says; returns whether it tells of a failure. tasks: whether ends of tasks count."""
        if found := _NODE_LOST.search(line):
            self.lost += [host for host in expand_hosts(found[1]) if host not in self.lost]
            return True
        if not tasks or not (found := _TASK_ENDED.search(line)):
            return False
        code = int(found[2]) if found[2] else None
        for host in expand_hosts(found[1]):
            self.codes.setdefault(host, code)
            self.words.setdefault(host, f"was {found[3].lower()}" if code is None else f"ended with exit code {code}")
        return code != RunStopped.exit_code

    def blamed(self, hosts: Sequence[str]) -> list[str]:
        """Of the step's hosts those to blame: lost ones, else those whose ranks were killed, or have said why they end.

        Where all that have ended only miss another one, those that did not answer.
        """
        killed = [host for host, code in self.codes.items() if code is None or code > 128]
        own = [host for host, code in self.codes.items() if code not in _OF_OTHERS]
        return self.lost or killed or own[:1] or self.silent(hosts) or list(self.codes)[:1]

    def silent(self, hosts: Sequence[str]) -> list[str]:
        """Of the step's hosts those that said nothing any more when others had failed."""
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
        return self._words(self.blamed(hosts)) or f"srun ended with exit code {self.code}"

    def _words(self, hosts: Sequence[str]) -> str:
        said = self.words | dict.fromkeys(self.lost, "was lost")
        return ", ".join(f"{host} {said.get(host, 'did not answer any more')}" for host in hosts)


def _rank_of_cause(facts: Mapping[str, Any]) -> int:
    """How likely what a node says is what others failed for: 0 is most likely."""
    follows = facts["exit_code"] == LostRankError.exit_code or tells_of_lost_peer(facts["why"])
    return len(_KINDS) if follows and facts["kind"] in ("raised", "refused") else _KINDS.index(facts["kind"])


class JobHosts:
    """The nodes of a job, and which of them an attempt takes. wanted: how many."""

    def __init__(self, hosts: Sequence[str], wanted: int):
        self.hosts, self.wanted = list(hosts), wanted
        self.left_out: list[str] = []
        self._failures: Counter[str] = Counter()

    def choose(self) -> list[str] | None:
        """The first of the nodes that are well, in Slurm's order; None where too few are."""
        unusable = unusable_hosts(self.hosts)
        well = [host for host in self.hosts if host not in self.left_out and host not in unusable]
        return well[: self.wanted] if len(well) >= self.wanted else None

    def blame(self, hosts: Sequence[str], end: StepEnd) -> None:
        """Leave a host out that is lost; one that fell silent, or failed repeatedly, where another can stand in for it."""
        for host in hosts:
            self._failures[host] += 1
            suspect = host not in end.codes or self._failures[host] >= _MOST_FAILURES
            spare = len(self.hosts) - len(self.left_out) > self.wanted
            if host not in self.left_out and (host in end.lost or suspect and spare):
                self.left_out.append(host)
