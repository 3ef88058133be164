"""A real four-node Slurm cluster on one machine, without systemd and without changes to the machine's configuration."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from ports import free_ports
from waiting import eventually

_DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
_NODES = ("node1", "node2", "node3", "node4")
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=20
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=300
FirstJobId={port}
AccountingStorageType=accounting_storage/none
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1} CPUs=2 CoresPerSocket=2 RealMemory=2000 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2} CPUs=2 CoresPerSocket=2 RealMemory=2000 State=UNKNOWN
NodeName=node3 NodeHostname={host} NodeAddr=127.0.0.1 Port={node3} CPUs=2 CoresPerSocket=2 RealMemory=2000 State=UNKNOWN
NodeName=node4 NodeHostname={host} NodeAddr=127.0.0.1 Port={node4} CPUs=2 CoresPerSocket=2 RealMemory=2000 State=UNKNOWN
PartitionName=test Nodes=node[1-4] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=node[1-4] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Return why Slurm cannot be started here, or None if it can."""
    missing = [name for name in _DAEMONS if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} missing): apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "starting a Slurm of one's own needs root"


class SlurmCluster:
    """Four nodes with two CPUs each. `environment` lets Slurm's commands find them."""

    def __init__(self, root: Path):
        self.root = root
        ports = free_ports(1 + len(_NODES))
        host = socket.gethostname().split(".")[0]
        names = dict(zip(("port", *_NODES), ports, strict=True))
        for folder in ("state", *(f"spool/{node}" for node in _NODES)):
            (root / folder).mkdir(parents=True)
        (root / "slurm.conf").write_text(_CONF.format(root=root, host=host, **names))
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (root / "munge.key").write_bytes(os.urandom(1024))
        (root / "munge.key").chmod(0o400)
        self.environment = {"SLURM_CONF": str(root / "slurm.conf")}

    def start(self) -> None:
        """Start the daemons and wait until all nodes are idle."""
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{option}={self.root}/{file}" for option, file in files.items()]
        self.run("munged", "--force", *options, f"--seed-file={self.root}/munge.seed")
        self.run("slurmctld", "-f", self.environment["SLURM_CONF"])
        for node in _NODES:
            self.start_node(node)
        eventually(lambda: self._node_states() == ["idle"] * len(_NODES), self._trouble)

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self.run("slurmd", "-f", self.environment["SLURM_CONF"], "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon and everything it has started, as a power failure would."""
        os.kill(int((self.root / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)
        # the environment of a step's daemon lacks the node's name, but its children have it
        for pid, (parent, command) in self._processes(node).items():
            # a signal to 0 would reach all processes of these tests, and process 1 is the parent of orphans
            if b"run_node" in command:
                for number in (parent, pid) if parent > 1 else (pid,):
                    os.kill(number, signal.SIGKILL)

    def signal_ranks(self, node: str, number: int, most: int) -> None:
        """Send signal `number` to at most `most` ranks that run on a node."""
        processes = self._processes(node)
        ranks = sorted(pid for pid, (_, command) in processes.items() if command.startswith(b"distattn rank "))
        assert ranks, f"there are no ranks on {node}: {processes}"
        for pid in ranks[:most]:
            os.kill(pid, number)

    def stop(self) -> None:
        """Kill the daemons, including those of steps, and the processes that a failed test has left on the nodes."""
        # repeat, because a daemon may be about to start another process
        while ours := self._processes(None):
            for pid in ours:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _processes(self, node: str | None) -> dict[int, tuple[int, bytes]]:
        """Return {pid: (parent, command line)} for a node's processes except its daemon, or for the whole cluster if
        `node` is None.
        """
        processes = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes().split(b"\0")
                command = (process / "cmdline").read_bytes()
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                # the process has ended in the meantime
                continue
            ours = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode() in environment
            if ours and (node is None or f"SLURMD_NODENAME={node}".encode() in environment):
                processes[int(process.name)] = parent, command
        return processes

    def _node_states(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-p", "test", "-o", "%T", check=False).split()

    def _trouble(self) -> str:
        logs = "".join(file.read_text()[-2000:] for file in sorted(self.root.glob("*.log")))
        return f"the nodes are {self._node_states()}\n{logs}"

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout
