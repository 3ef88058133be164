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
from distattn.supervision.helpers import how_it_ended
from distattn.supervision.rank_watch import INTERRUPT

_WRAPPER = "distattn.launch.ranks.die_with_launcher"


class Node(NamedTuple):
    """One of several machines. number: its place among `nodes`. address: host:port, where the first one is to listen.

    keeps_sigterm: the caller answers this process's SIGTERM; else it ends the ranks.
    """

    number: int = 0
    nodes: int = 1
    address: str = ""
    keeps_sigterm: bool = False


HERE = Node()


class RanksInterrupted(SignalException):
    """An exception that has torchrun end its ranks by SIGINT, which all of them take.

    stop: why this command ends; None where the watch asks for it.
    """

    def __init__(self, stop: CommandStopped | None):
        super().__init__(str(stop or "the watch ends the ranks"), signal.SIGINT)
        self.stop = stop


def run_ranks(ranks: int, module: str, *arguments: str) -> int:
    """Run `python -m module ARGUMENTS` once per rank, and wait. Returns the exit code. Ranks end when this process ends.

    0 when all ranks end well, else the first failing rank's. Raises CommandStopped.
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
        print_message(f"rank {rank} {how_it_ended(code)}; the other ranks were stopped.")
        return code if code > 0 else 128 - code
    except RanksInterrupted as interrupted:
        assert interrupted.stop is not None
        raise interrupted.stop from None
    return 0


def torchrun_config(ranks: int, node: Node = HERE, start_method: str = "spawn", interval: float = 0.1) -> LaunchConfig:
    """Of ranks on this machine, alone or one of several, with a rendezvous of their own.

    start_method: of ranks that are functions. interval: seconds between two looks at them.
    """
    # of several nodes each knows its place, which the plan counts on: nothing is left to agree on
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
        # `as_found` answers them: torchrun would answer ignored ones, too, each again and again
        signals_to_handle="",
        **meeting,
    )


@contextlib.contextmanager
def as_found(node: Node = HERE) -> Iterator[None]:
    """Run torchrun in the block without its logs, since ranks and launchers report it, and over the loopback on one machine.

    Signals that stop the command, and the watch's, end the ranks by RanksInterrupted.
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
                # the watch may ask just after torchrun has ended by itself
                signal.signal(number, signal.SIG_IGN if number == INTERRUPT else handlers[number])
