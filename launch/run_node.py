"""Run the ranks of one node of a run: `python -m distattn.launch.run_node RUN ADDRESS NUMBER NODES`.

The first node listens at ADDRESS (host:port). NUMBER is this node's number among NODES. `distattn.launch.ray.agent` passes
all arguments. `distattn.launch.slurm.attempts` starts this module on each node by srun, without NUMBER and NODES, which then
come from Slurm's environment variables. With "finish" as ADDRESS, the module writes the run's report.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from distattn.ir.errors import DistattnError
from distattn.ir.text_format import print_message
from distattn.launch.attempts import Attempts
from distattn.launch.node_attempts import ask_to_stop
from distattn.launch.node_needs import node_needs
from distattn.launch.ranks.rank import set_allocator
from distattn.launch.stop_signals import CommandStopped, stop_on_signals, stopped
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config
from distattn.training.run_folder import RunFolder


def main(folder: str, address: str, *place: str) -> int:
    """Run this node's ranks, or finish the run. Return the exit code of the rank at fault (128 + N if killed by signal N)."""
    if address == "finish":
        from distattn.launch import finish_run

        return finish_run.main(folder)
    run = RunFolder(Path(folder))
    number, nodes = map(int, place or (os.environ["SLURM_NODEID"], os.environ["SLURM_NNODES"]))
    attempts = Attempts(run.attempts)
    attempt = attempts.latest
    if number == 0 and not attempts.goes_on:
        # remove requests of the previous attempt; a launcher that records attempts does so itself, and may have made a new one
        run.forget_requests()
    # to end a step or a container, a scheduler sends SIGTERM and, seconds later, SIGKILL: save in between
    signal.signal(signal.SIGTERM, lambda *_: ask_to_stop(run, "SIGTERM"))
    # import torch only after setting the handler: the import takes seconds, and the signal may arrive meanwhile
    from distattn.launch.ranks.attempt import Ranks, fork_server, run_attempt
    from distattn.launch.ranks.local import Node
    from distattn.launch.run_locally import PRELOAD, RANK
    from distattn.supervision.heartbeats import HeartbeatBoard
    from distattn.supervision.rank_watch import Patience

    try:
        config = configuration.load(run.config_file)
        check_places(run, config, nodes)
        per_node = node_needs(config).ranks
        node = Node(number, nodes, address, keeps_sigterm=True)
        patience = Patience(config.supervision.starting_seconds, config.supervision.patience_seconds)
        ranks = Ranks(per_node, RANK, [folder, False], patience, node, folder)
        set_allocator()
        board = HeartbeatBoard.make(per_node)
        served = fork_server(PRELOAD, node, folder)
        with stop_on_signals(), stopped("in training"), served, contextlib.closing(board):
            code, trouble = run_attempt(ranks, attempt, attempts.folder(attempt), board)
    except CommandStopped as stop:
        print_message(f"node {number}: {stop}")
        return stop.exit_code
    except DistattnError as error:
        print_message(str(error))
        return error.exit_code
    if trouble is not None:
        blamed = sorted({culprit.rank // per_node for culprit in trouble.culprits})
        facts = {"why": str(trouble), "exit_code": code, "nodes": blamed} | trouble.facts()
        attempts.report_node(attempt, number, facts)
        print_message(f"node {number}: {trouble}; its other ranks were stopped.")
    return code


def check_places(run: RunFolder, config: Config, nodes: int) -> None:
    """Raise DistattnError if a run's ranks do not fill the job's nodes. This happens if it was resumed elsewhere."""
    ranks, per_node = config.parallel.ranks, node_needs(config).ranks
    if ranks != nodes * per_node:
        raise DistattnError(
            f"{run.config_file}: the run has {ranks} ranks, {per_node} a node, but this job has {nodes} nodes: set "
            "parallel.ranks and parallel.devices_per_node there to the job's numbers."
        )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
