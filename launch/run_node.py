"""The ranks of one node of a run: `python -m distattn.launch.run_node RUN ADDRESS NUMBER NODES`.

ADDRESS, host:port, is where the first node listens; NUMBER is this node's among NODES. Without these Slurm's variables say it,
as where `distattn.launch.slurm_attempts` has srun start it on each node. RUN finish writes the report.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from distattn.ir.errors import DistattnError
from distattn.training import config as configuration
from distattn.training.run_folder import RunFolder


def main(folder: str, what: str, *place: str) -> int:
    """Run this node's ranks, or finish the run. Returns the exit code: the blamed rank's, or 128 + the signal that killed it."""
    if what == "finish":
        from distattn.launch import finish_run

        return finish_run.main(folder)
    run = RunFolder(Path(folder))
    number, nodes = map(int, place or (os.environ["SLURM_NODEID"], os.environ["SLURM_NNODES"]))
    if place and number == 0:
        # of the attempt before; on Slurm there may be one of this attempt already
        run.stop_file.unlink(missing_ok=True)
    # whoever ends a step or a container sends SIGTERM, and kills it some seconds later: what can be saved until then is
    signal.signal(signal.SIGTERM, lambda *_: run.ask_to_stop("SIGTERM"))
    # torch takes seconds, in which the signal may come
    from distattn.launch.local import Node, run_ranks

    try:
        parallel = configuration.load(run.config_file).parallel
        per_node = parallel.devices_per_node or parallel.ranks
        node = Node(number, nodes, what, keeps_sigterm=True)
        return run_ranks(per_node, "distattn.launch.rank", folder, "false", "node", node=node)
    except DistattnError as error:
        sys.stderr.write(f"distattn: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
