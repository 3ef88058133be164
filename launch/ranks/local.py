"""Ranks of one machine, or of one node of several, started through torchrun's API."""

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

from distattn.launch.command_line import print_message
from distattn.launch.ranks.loopback import NODES_RENDEZVOUS, RENDEZVOUS, gloo_on_loopback
from distattn.launch.stop_signals import STOPPING, CommandStopped
from distattn.supervision.helper_processes import describe_exit
from distattn.supervision.rank_watch import INTERRUPT

_WRAPPER = "distattn.launch.ranks.die_with_launcher"


class Node(NamedTuple):
    """One of several machines. number: its place among `nodes`. address: host:port on which the first one listens.

    keeps_sigterm: the caller handles this process's SIGTERM; otherwise it ends the ranks.
    """

    number: int = 0
    nodes: int = 1
    address: str = ""
    keeps_sigterm: bool = False


HERE = Node()


class RanksInterrupted(SignalException):
    """An exception with which torchrun ends its ranks by SIGINT, which no rank blocks.

    stop: the signal that ends this command; None if the watch ends the ranks.
    """

    def __init__(self, stop: CommandStopped | None):
        super().__init__(str(stop or "the watch ends the ranks"), signal.SIGINT)
        self.stop = stop


def run_ranks(ranks: int, module: str, *arguments: str) -> int:
    """Run `python -m module ARGUMENTS` once per rank, and wait. Return the exit code. Ranks end when this process ends.

    The code is 0 if all ranks end well, else that of the first rank that failed. Raises CommandStopped.
    """
    try:
        with restore_process_state():
            elastic_launch(torchrun_config(ranks), sys.executable)("-m", _WRAPPER, str(os.getpid()), module, *arguments)
    except ChildFailedError as error:
        # a killed rank makes its peers fail at the same moment: it is the cause, not they
        failures = error.failures.items()

        def blame(failure: Any) -> tuple[bool, bool, int]:
            # torchrun itself ends the others by SIGTERM
            code = failure.exitcode
            return code == -signal.SIGTERM, code > 0, failure.timestamp

        rank, failure = min(failures, key=lambda item: blame(item[1]))
        code = failure.exitcode
        print_message(f"rank {rank} {describe_exit(code)}; the other ranks were stopped.")
        return code if code > 0 else 128 - code
    except RanksInterrupted as interrupted:
        assert interrupted.stop is not None
        raise interrupted.stop from None
    return 0


def torchrun_config(ranks: int, node: Node = HERE, start_method: str = "spawn", interval: float = 0.1) -> LaunchConfig:
    """Return the configuration of ranks on this machine, alone or one of several, with their own rendezvous.

    start_method: for ranks that are functions. interval: seconds between two looks at them.
    """
    # each of several nodes knows its place, on which the plan relies, so the rendezvous decides nothing
    meeting: dict[str, Any] = {"rdzv_backend": NODES_RENDEZVOUS, "rdzv_endpoint": node.address}
    if node.nodes == 1:
        meeting = {"rdzv_backend": RENDEZVOUS}
    return LaunchConfig(
        min_nodes=node.nodes,
        max_nodes=node.nodes,
        nproc_per_node=ranks,
        # the same on all nodes
        run_id=node.address or uuid.uuid4().hex,
        rdzv_configs={"rank": node.number} if node.nodes > 1 else {},
        max_restarts=0,
        monitor_interval=interval,
        start_method=start_method,
        # `restore_process_state` handles them: torchrun would also handle ignored signals, again and again
        signals_to_handle="",
        **meeting,
    )


@contextlib.contextmanager
def restore_process_state(node: Node = HERE) -> Iterator[None]:
    """Set logs, signal handlers and gloo's interface for torchrun in the block, and restore them afterwards.

    Ranks and launchers report errors themselves, so torchrun's logs are silenced. Signals that stop the command, and that of the
    watch, end the ranks by RanksInterrupted. On one machine gloo uses the loopback.
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
                # the watch may send its signal just after torchrun has ended by itself
                signal.signal(number, signal.SIG_IGN if number == INTERRUPT else handlers[number])
