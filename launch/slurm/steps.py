"""What srun says of a step of a Slurm job, and which nodes of the job the next step takes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from distattn.launch.attempt_end import AttemptEnd, LeftOut
from distattn.launch.slurm.commands import expand_hosts, unusable_hosts

# srun's own lines about tasks and nodes
_TASK_ENDED = re.compile(r"srun: error: (\S+): tasks? [\d,\[\]-]+: (?:Exited with exit code (\d+)|(\w[^\n]*))")
_NO_STEP = re.compile(r"srun: error: Unable to create step for job \S+: (.*\S)")
_NODE_LOST = re.compile(r"srun: error: (?:Node failure on|[^\n]*failed on node) ([\w.,\[\]-]+)")


def read_srun_line(end: AttemptEnd, line: str, tasks: bool) -> bool:
    """Take over what a line of srun's says; returns whether it tells of a failure. tasks: whether ends of tasks count."""
    if found := _NO_STEP.search(line):
        end.unstarted = found[1]
        return True
    if found := _NODE_LOST.search(line):
        end.lost += [host for host in expand_hosts(found[1]) if host not in end.lost]
        return True
    if not tasks or not (found := _TASK_ENDED.search(line)):
        return False
    code = int(found[2]) if found[2] else None
    failed = [end.add(host, code, f"was {found[3].lower()}" if code is None else "") for host in expand_hosts(found[1])]
    return any(failed)


class JobHosts:
    """The nodes of a job, and which of them an attempt takes. wanted: how many."""

    def __init__(self, hosts: Sequence[str], wanted: int):
        self.hosts, self.wanted = list(hosts), wanted
        self._left_out = LeftOut()

    def choose(self) -> list[str] | None:
        """The first of the nodes that are well, in Slurm's order; None where too few are."""
        unusable = unusable_hosts(self.hosts)
        well = [host for host in self.hosts if host not in self._left_out.hosts and host not in unusable]
        return well[: self.wanted] if len(well) >= self.wanted else None

    @property
    def failing(self) -> list[str]:
        """Nodes that have failed repeatedly, and still answer."""
        return self._left_out.failing

    @property
    def stuck(self) -> list[str]:
        """Of these the ones that the next attempt takes, since no spare node is there."""
        return [host for host in self.failing if host not in self._left_out.hosts]

    def blame(self, hosts: Sequence[str], end: AttemptEnd) -> None:
        """Leave out what `LeftOut.blame` says."""
        self._left_out.blame(hosts, end, spare=len(self.hosts) - len(self._left_out.hosts) - self.wanted)
