"""Starts the ranks of one machine, alone or as one of several nodes, through torchrun's API."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distattn.ir.text_format import print_message
from distattn.launch.ranks.loopback import NODES_RENDEZVOUS, RENDEZVOUS, gloo_on_loopback
from distattn.launch.stop_signals import STOPPING, CommandStopped
from distattn.supervision.helper_processes import describe_exit, shell_exit_code
from distattn.supervision.rank_watch import INTERRUPT

_WRAPPER = "distattn.launch.ranks.die_with_launcher"


class Node(NamedTuple):
    """One of several machines. number: its index among the `nodes` machines. address: host:port at which the first node listens.

    keeps_sigterm: True if the caller handles this process's SIGTERM; otherwise SIGTERM ends the ranks.
    """

    number: int = 0
    nodes: int = 1
    address: str = ""
    keeps_sigterm: bool = False


HERE = Node()


class RanksInterrupted(SignalException):
    """An exception that makes torchrun end its ranks by SIGINT, which no rank blocks.

    stop: the signal that ended this command; None if the watch ends the ranks.
    """

    def __init__(self, stop: CommandStopped | None):
        super().__init__(str(stop or "the watch ends the ranks"), signal.SIGINT)
        self.stop = stop


def run_ranks(ranks: int, module: str, *arguments: str) -> int:
    """Run `python -m module ARGUMENTS` once per rank, and wait for all. Ranks end when this process ends.

    Returns 0 if all ranks end well, otherwise the exit code of the rank that failed first. Raises CommandStopped.
    """
    try:
        with restore_process_state():
            elastic_launch(torchrun_config(ranks), sys.executable)("-m", _WRAPPER, str(os.getpid()), module, *arguments)
    except ChildFailedError as error:
        # a killed rank makes its peers fail at the same moment, so blame the killed rank
        failures = error.failures.items()

        def blame(failure: Any) -> tuple[bool, bool, int]:
            # torchrun itself ends the other ranks by SIGTERM
            code = failure.exitcode
            return code == -signal.SIGTERM, code > 0, failure.timestamp

        rank, failure = min(failures, key=lambda item: blame(item[1]))
        code = failure.exitcode
        print_message(f"rank {rank} {describe_exit(code)}; the other ranks were stopped.")
        return shell_exit_code(code)
    except RanksInterrupted as interrupted:
        assert interrupted.stop is not None
        raise interrupted.stop from None
    return 0


def torchrun_config(ranks: int, node: Node = HERE, start_method: str = "spawn", interval: float = 0.1) -> LaunchConfig:
    """Return torchrun's configuration for ranks on this machine, alone or as one of several nodes, with a new rendezvous.

    start_method: how multiprocessing starts ranks that run a function. interval: seconds between checks of the ranks.
    """
    # nodes already know their numbers, on which the plan relies, so the rendezvous must not assign them
    meeting: dict[str, Any] = {"rdzv_backend": NODES_RENDEZVOUS, "rdzv_endpoint": node.address}
    if node.nodes == 1:
        meeting = {"rdzv_backend": RENDEZVOUS}
    return LaunchConfig(
        min_nodes=node.nodes,
        max_nodes=node.nodes,
        nproc_per_node=ranks,
        # must be equal on all nodes
        run_id=node.address or uuid.uuid4().hex,
        rdzv_configs={"rank": node.number} if node.nodes > 1 else {},
        max_restarts=0,
        monitor_interval=interval,
        start_method=start_method,
        # `restore_process_state` handles signals: torchrun would also handle ignored signals, and a signal more than once
        signals_to_handle="",
        **meeting,
    )


@contextlib.contextmanager
def restore_process_state(node: Node = HERE) -> Iterator[None]:
    """Set up logging, signal handlers and gloo's interface for torchrun within the block, and restore them afterwards.

    torchrun's logs are silenced, since ranks and launchers report errors themselves. Signals that stop the command, and the
    watch's signal, end the ranks by raising RanksInterrupted. On a single machine gloo uses the loopback.
    """
    logging.disable(logging.CRITICAL)
    handlers = {number: signal.getsignal(number) for number in (*STOPPING, INTERRUPT)}

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number == INTERRUPT:
            raise RanksInterrupted(None)
        answer = handlers[signal.Signals(number)]
        assert callable(answer)
        try:
            answer(number, frame)
        except CommandStopped as stop:
            raise RanksInterrupted(stop) from None

    answered = [number for number, handler in handlers.items() if callable(handler) or number == INTERRUPT]
    if threading.current_thread() is threading.main_thread():
        for number in answered:
            signal.signal(number, interrupt)
    try:
        with gloo_on_loopback() if node.nodes == 1 else contextlib.nullcontext():
            yield
    finally:
        logging.disable(logging.NOTSET)
        if threading.current_thread() is threading.main_thread():
            for number in answered:
                # ignore the watch's signal from now on: it may arrive just after torchrun has ended by itself
                signal.signal(number, signal.SIG_IGN if number == INTERRUPT else handlers[number])
