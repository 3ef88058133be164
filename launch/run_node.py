"""The ranks of one node of a run: `python -m distattn.launch.run_node RUN ADDRESS NUMBER NODES`.

ADDRESS, host:port, is where the first node listens; NUMBER is this node's among NODES, as where
`distattn.launch.ray.agent` starts it. Without these Slurm's variables say it, as where `distattn.launch.slurm.attempts` has srun
start it on each node. RUN finish writes the report.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from distattn.ir.errors import DistattnError
from distattn.launch.attempts import Attempts
from distattn.launch.command_line import say
from distattn.launch.node_needs import node_needs
from distattn.launch.ranks.rank import set_allocator
from distattn.launch.stop_signals import CommandStopped, answering_signals, stopped
from distattn.training import config as configuration
from distattn.training.config import Config
from distattn.training.run_folder import RunFolder


def main(folder: str, what: str, *place: str) -> int:
    """Run this node's ranks, or finish the run. Returns the exit code: the blamed rank's, or 128 + the signal that killed it."""
    if what == "finish":
        from distattn.launch import finish_run

        return finish_run.main(folder)
    run = RunFolder(Path(folder))
    number, nodes = map(int, place or (os.environ["SLURM_NODEID"], os.environ["SLURM_NNODES"]))
    attempts = Attempts(run.attempts)
    attempt = attempts.latest
    if number == 0 and not attempts.goes_on:
        # of the attempt before; whoever notes attempts removes it, and may have made one for this attempt already
        run.forget_requests()
    # whoever ends a step or a container sends SIGTERM, and kills it some seconds later: what can be saved until then is
    signal.signal(signal.SIGTERM, lambda *_: _ask_to_stop(run))
    # torch takes seconds, in which the signal may come
    from distattn.launch.ranks.attempt import Ranks, fork_server, run_attempt
    from distattn.launch.ranks.local import Node
    from distattn.launch.run_locally import PRELOAD, RANK
    from distattn.supervision.heartbeats import HeartbeatBoard
    from distattn.supervision.rank_watch import Patience

    try:
        config = configuration.load(run.config_file)
        check_places(run, config, nodes)
        per_node = node_needs(config).ranks
        node = Node(number, nodes, what, keeps_sigterm=True)
        patience = Patience(config.supervision.starting_seconds, config.supervision.patience_seconds)
        ranks = Ranks(per_node, RANK, [folder, False], patience, node, folder)
        set_allocator()
        board = HeartbeatBoard.make(per_node)
        served = fork_server(PRELOAD, node, folder)
        with answering_signals(), stopped("in training"), served, contextlib.closing(board):
            code, trouble = run_attempt(ranks, attempt, attempts.folder(attempt), board)
    except CommandStopped as stop:
        say(f"node {number}: {stop}")
        return stop.exit_code
    except DistattnError as error:
        sys.stderr.write(f"distattn: {error}\n")
        return error.exit_code
    if trouble is not None:
        blamed = sorted({one.rank // per_node for one in trouble.culprits})
        facts = {"why": str(trouble), "exit_code": code, "nodes": blamed} | trouble.facts()
        attempts.tell(attempt, number, facts)
        say(f"node {number}: {trouble}; its other ranks were stopped.")
    return code


def check_places(run: RunFolder, config: Config, nodes: int) -> None:
    """Raise DistattnError where a run does not have as many ranks as fill a job's nodes: it was resumed elsewhere, on others."""
    ranks, per_node = config.parallel.ranks, node_needs(config).ranks
    if ranks != nodes * per_node:
        raise DistattnError(
            f"{run.config_file}: the run has {ranks} ranks, {per_node} a node, but this job has {nodes} nodes: set "
            "parallel.ranks and parallel.devices_per_node there to what the job has."
        )


def _ask_to_stop(run: RunFolder) -> None:
    try:
        run.ask_to_stop("SIGTERM")
    except OSError as error:
        say(f"the ranks cannot be asked to stop: {error}; the run goes on from its newest checkpoint.")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
