"""Ranks of one machine, started through torchrun's API."""

from __future__ import annotations

import signal
import sys
import uuid

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def run_ranks(ranks: int, module: str, *arguments: str) -> int:
    """Run `python -m module ARGUMENTS` once per rank, and wait. Returns the exit code.

    0 when all ranks end well, else the first failing rank's, or 128 + the signal that stopped this process.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        # a machine's own host name need not resolve
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
    )
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.stderr.write(
            f"distattn: rank {rank} ended with exit code {failure.exitcode}; the other ranks were stopped.\n"
        )
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException as stop:
        sys.stderr.write(
            f"distattn: stopped by {signal.Signals(stop.sigval).name}; what was done is in the run folder.\n"
        )
        return 128 + stop.sigval
    finally:
        # torchrun leaves its own behind
        for name, handler in handlers.items():
            signal.signal(name, handler)
    return 0
