"""srun's messages about a step of a Slurm job, and the nodes of the job that the next step takes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from distattn.launch.attempt_end import AttemptEnd, LeftOut
from distattn.launch.slurm.commands import expand_hosts, unusable_hosts

# srun's messages about tasks and nodes
_TASK_ENDED = re.compile(r"srun: error: (\S+): tasks? [\d,\[\]-]+: (?:Exited with exit code (\d+)|(\w[^\n]*))")
_NO_STEP = re.compile(r"srun: error: Unable to create step for job \S+: (.*\S)")
_NODE_LOST = re.compile(r"srun: error: (?:Node failure on|[^\n]*failed on node) ([\w.,\[\]-]+)")


def read_srun_line(end: AttemptEnd, line: str, tasks: bool) -> bool:
    """Add what a line of srun says to `end`; return whether it reports a failure. tasks: whether ends of tasks count."""
    if match := _NO_STEP.search(line):
        end.unstarted = match[1]
        return True
    if match := _NODE_LOST.search(line):
        end.lost += [host for host in expand_hosts(match[1]) if host not in end.lost]
        return True
    if not tasks or not (match := _TASK_ENDED.search(line)):
        return False
    code = int(match[2]) if match[2] else None
    failed = [end.add(host, code, f"was {match[3].lower()}" if code is None else "") for host in expand_hosts(match[1])]
    return any(failed)


class JobHosts:
    """The nodes of a job, and those that an attempt takes. wanted: the number of nodes of an attempt."""

    def __init__(self, hosts: Sequence[str], wanted: int):
        self.hosts, self.wanted = list(hosts), wanted
        self._left_out = LeftOut()

    def choose(self) -> list[str] | None:
        """Return the first usable nodes in Slurm's order; None if they are too few."""
        unusable = unusable_hosts(self.hosts)
        usable = [host for host in self.hosts if host not in self._left_out.hosts and host not in unusable]
        return usable[: self.wanted] if len(usable) >= self.wanted else None

    @property
    def failing(self) -> list[str]:
        """Nodes that have failed repeatedly, and still answer."""
        return self._left_out.failing

    @property
    def stuck(self) -> list[str]:
        """Nodes that have failed repeatedly and that the next attempt takes nevertheless, since there is no spare node."""
        return [host for host in self.failing if host not in self._left_out.hosts]

    def blame(self, hosts: Sequence[str], end: AttemptEnd) -> None:
        """Leave out hosts after a failure, as `LeftOut.blame` does."""
        self._left_out.blame(hosts, end, spare=len(self.hosts) - len(self._left_out.hosts) - self.wanted)
