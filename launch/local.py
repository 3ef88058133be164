"""Ranks of one machine, started through torchrun's API."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distattn.launch.loopback import RENDEZVOUS, gloo_on_loopback

_WRAPPER = "distattn.launch.die_with_launcher"


def run_ranks(ranks: int, module: str, *arguments: str) -> int:
    """Run `python -m module ARGUMENTS` once per rank, and wait. Returns the exit code. Ranks end when this process ends.

    0 when all ranks end well, else the first failing rank's, or 128 + the signal that stopped this process.
    """
    try:
        with as_found():
            elastic_launch(torchrun_config(ranks), sys.executable)("-m", _WRAPPER, str(os.getpid()), module, *arguments)
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
        say(f"rank {rank} {how}; the other ranks were stopped.")
        return code if code > 0 else 128 - code
    except SignalException as stop:
        return stopped_by(stop)
    return 0


def torchrun_config(ranks: int, start_method: str = "spawn", interval: float = 0.1) -> LaunchConfig:
    """Of ranks on this machine alone, with a rendezvous of their own.

    start_method: of ranks that are functions. interval: seconds between two looks at them.
    """
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend=RENDEZVOUS,
        max_restarts=0,
        monitor_interval=interval,
        start_method=start_method,
    )


@contextlib.contextmanager
def as_found() -> Iterator[None]:
    """Around torchrun: gloo listens on the loopback, logs are silent, as ranks say it in a sentence, handlers are as before."""
    logging.disable(logging.CRITICAL)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        with gloo_on_loopback():
            yield
    finally:
        logging.disable(logging.NOTSET)
        for name, handler in handlers.items():
            signal.signal(name, handler)


def stopped_by(stop: SignalException) -> int:
    """Say that a signal has stopped this process; returns its exit code."""
    say(f"stopped by {signal.Signals(stop.sigval).name}; what was done is in the run folder.")
    return 128 + int(stop.sigval)


def say(text: str) -> None:
    """Print a sentence for the user at the console."""
    sys.stderr.write(f"distattn: {text}\n")
    sys.stderr.flush()
