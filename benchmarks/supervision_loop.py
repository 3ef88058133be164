"""The training that `supervision_rivals.py` disturbs. Supervisors start it by `python supervision_loop.py WHAT FOLDER ...`.

It trains a small network, sums gradients over gloo, and saves a checkpoint every EVERY steps. A rank resumes from the
newest checkpoint. Every rank records each step it has done: the time, its process id, the step and the loss. Ranks only
import the packages that their supervisor needs.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from process_guard import guard_processes

EVERY = 10
# seconds of computation per step
_SECONDS = 0.02
_PATIENT_SECONDS = 600.0
_WIDTH, _BATCH = 32, 16


class Training:
    """A rank's network and optimizer, and the file in which it records its steps."""

    def __init__(self, folder: Path, rank: int):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._folder, self._rank = folder, rank
        self._model = torch.nn.Sequential(torch.nn.Linear(_WIDTH, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        self._notes = os.open(folder / f"rank-{rank}.steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def state(self) -> dict[str, Any]:
        """Return the state that a rank needs to continue."""
        return {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Load a state from a different rank or from a checkpoint."""
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def gradients(self, step: int) -> torch.Tensor:
        """Return the tensor that ranks sum: the loss of this rank's share of the step, then all its gradients, flat."""
        mine = torch.randn(_BATCH, _WIDTH, generator=torch.Generator().manual_seed(step * 1000 + self._rank))
        self._optimizer.zero_grad()
        loss = (self._model(mine) - mine.sum(1, keepdim=True).sin()).square().mean()
        loss.backward()
        time.sleep(_SECONDS)
        return torch.cat([loss.detach().view(1), *(parameter.grad.flatten() for parameter in self._model.parameters())])

    def finish(self, step: int, summed: torch.Tensor) -> None:
        """Update the network with the summed gradients of all ranks, and record the step."""
        parameters = list(self._model.parameters())
        for parameter, gradient in zip(
            parameters, summed[1:].split([parameter.numel() for parameter in parameters]), strict=True
        ):
            parameter.grad.copy_(gradient.view_as(parameter))
        self._optimizer.step()
        os.write(self._notes, f"{time.time()} {os.getpid()} {step} {float(summed[0]).hex()}\n".encode())

    def save(self, step: int) -> None:
        """Write the checkpoint for the state after `step` steps."""
        aside = self._folder / f"part-{os.getpid()}"
        torch.save(self.state(), aside)
        aside.replace(self._folder / f"{step:08d}.pt")


def newest(folder: Path) -> int:
    """Return the step of the newest checkpoint, or 0 if there is no checkpoint."""
    return max((int(file.stem) for file in folder.glob("*.pt")), default=0)


def train(folder: str, before: Callable[[str, int], None] = lambda activity, step: None) -> None:
    """Train until the supervisor ends the process. before: called before each activity, with its name and the
    step."""
    dist.init_process_group("gloo")
    training = Training(Path(folder), dist.get_rank())
    begin = [newest(Path(folder))]
    dist.broadcast_object_list(begin)
    if begin[0]:
        training.load(torch.load(Path(folder, f"{begin[0]:08d}.pt"), weights_only=True))
    for step in itertools.count(begin[0]):
        before("forward and backward", step)
        gradients = training.gradients(step)
        before("the sum of gradients", step)
        dist.all_reduce(gradients)
        training.finish(step, gradients)
        if dist.get_rank() == 0 and (step + 1) % EVERY == 0:
            training.save(step + 1)


def supervised(folder: str) -> int:
    """Train as a rank of distattn's supervision."""
    from distattn.supervision.heartbeats import set_activity

    train(folder, lambda activity, step: set_activity(activity, step=step, waits=activity.startswith("the sum")))
    return 0


def launch_supervised(folder: str, ranks: str, patience: str) -> None:
    """Run distattn's launcher."""
    from distattn.launch.attempts import Attempts
    from distattn.launch.ranks.attempt import Ranks
    from distattn.launch.ranks.supervised import Restarts, run_supervised
    from distattn.supervision.rank_watch import Patience

    run_supervised(
        Ranks(int(ranks), "supervision_loop:supervised", [folder], Patience(_PATIENT_SECONDS, float(patience))),
        Attempts(Path(folder, "attempts")),
        Restarts(100, lambda: newest(Path(folder))),
        ["supervision_loop"],
    )


def monitored(folder: str) -> None:
    """Train as a rank of ft_launcher, with a heartbeat for each step."""
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

    client = RankMonitorClient()
    client.init_workload_monitoring()
    train(folder, lambda activity, step: client.send_heartbeat())


def replica(folder: str, patience: str) -> None:
    """Train as one of torchft's replicas, each of which has one rank. A new replica gets its state from a running replica."""
    from torchft import Manager, ProcessGroupGloo

    number = int(os.environ["REPLICA_GROUP_ID"])
    training = Training(Path(folder), number)
    wait = timedelta(seconds=float(patience))
    taken = {"load_state_dict": training.load, "state_dict": training.state}
    # pass localhost, because a machine may be unable to resolve its own name
    manager = Manager(
        pg=ProcessGroupGloo(timeout=wait), timeout=wait, min_replica_size=1, hostname="localhost", **taken
    )
    while True:
        step = manager.current_step()
        manager.start_quorum()
        summed = training.gradients(step)
        manager.allreduce(summed).wait()
        if manager.should_commit():
            # a replica that has just joined may have jumped to a later step
            training.finish(manager.current_step() - 1, summed)


def launch_replicas(folder: str, ranks: str, patience: str) -> None:
    """Run torchft's lighthouse and one torchrun per replica, as in its documentation."""
    from torchft.coordination import LighthouseServer

    wait = int(1000 * float(patience))
    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=100, heartbeat_timeout_ms=wait)
    readers = []
    address = f"http://localhost:{lighthouse.address().rpartition(':')[2]}"
    for number in range(int(ranks)):
        environment = os.environ | {"TORCHFT_LIGHTHOUSE": address, "REPLICA_GROUP_ID": str(number)}
        command = [
            *torchrun(1),
            "--redirects",
            "3",
            "--log-dir",
            f"{folder}/logs-{number}",
            __file__,
            "replica",
            folder,
            patience,
        ]
        agent = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        readers.append(threading.Thread(target=_repeat, args=(f"replica {number}: ", agent)))
        readers[-1].start()
    # the lighthouse stops when this function returns
    for reader in readers:
        reader.join()


def _repeat(begin: str, agent: subprocess.Popen[str]) -> None:
    """Print an agent's output, prefixed with `begin`."""
    assert agent.stderr is not None
    for line in agent.stderr:
        sys.stderr.write(begin + line)


def torchrun(ranks: int, module: str = "torch.distributed.run") -> list[str]:
    """Return the command line of torchrun, or of a module with the same arguments, for ranks on this machine."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "localhost"]
    return [sys.executable, "-m", module, "--nproc-per-node", str(ranks), "--max-restarts", "100", *meeting]


if __name__ == "__main__":
    guard_processes()
    commands = {
        command.__name__: command for command in (train, launch_supervised, monitored, replica, launch_replicas)
    }
    commands[sys.argv[1]](*sys.argv[2:])
