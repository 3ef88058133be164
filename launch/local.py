"""Ranks of one machine, started through torchrun's API."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

_WRAPPER = "distattn.launch.die_with_launcher"


def run_ranks(ranks: int, module: str, *arguments: str) -> int:
    """Run `python -m module ARGUMENTS` once per rank, and wait. Returns the exit code. Ranks end when this process ends.

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
    # what torchrun logs of failures and signals is said below in a sentence, and by the rank itself
    logging.disable(logging.CRITICAL)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        elastic_launch(config, sys.executable)("-m", _WRAPPER, str(os.getpid()), module, *arguments)
    except ChildFailedError as error:
        # a killed rank makes its peers fail in the same instant: it is the cause, they are not
        failures = error.failures.items()

        def blame(failure: Any) -> tuple[bool, bool, int]:
            # torchrun itself ends the others by SIGTERM
            code = failure.exitcode
            return code == -signal.SIGTERM, code > 0, failure.timestamp

        rank, failure = min(failures, key=lambda item: blame(item[1]))
        code = failure.exitcode
        how = f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
        sys.stderr.write(f"distattn: rank {rank} {how}; the other ranks were stopped.\n")
        return code if code > 0 else 128 - code
    except SignalException as stop:
        sys.stderr.write(
            f"distattn: stopped by {signal.Signals(stop.sigval).name}; what was done is in the run folder.\n"
        )
        return 128 + stop.sigval
    finally:
        logging.disable(logging.NOTSET)
        # torchrun leaves its own behind
        for name, handler in handlers.items():
            signal.signal(name, handler)
    return 0
