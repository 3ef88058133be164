"""Signals that end a command with a message and exit code 128 + N, whatever the command is doing.

A signal ignored when the command begins stays ignored, as after nohup, and a signal for which the caller has a handler is left
to the caller. docs/local.md has a table of the messages.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import util
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
# more signals within this time after the first belong to the same request; a later signal interrupts the clean-up
_SAME_REQUEST_SECONDS = 5.0


class CommandStopped(KeyboardInterrupt):
    """An exception raised when a signal ends this command.

    doing: the phase that it interrupted, such as "in training". then: how to complete or continue the work. Both may be "".
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = signal.Signals(number)
        self.doing = self.then = ""

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as in shells."""
        return 128 + int(self.signal)

    def __str__(self) -> str:
        doing = f" {self.doing}" if self.doing else ""
        return f"stopped by {self.signal.name}{doing}" + (f"; {self.then}" if self.then else "") + "."


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise CommandStopped in the main thread for the first signal that arrives within the block.

    Only signals with their default action are handled. Nested contexts, and contexts in other threads, do nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, asked_at = os.getpid(), -_SAME_REQUEST_SECONDS

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if os.getpid() != owner:
            # a process forked within the block gets the default action
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif (now := time.monotonic()) - asked_at >= _SAME_REQUEST_SECONDS:
            asked_at = now
            raise CommandStopped(number)

    by_default = (signal.SIG_DFL, signal.default_int_handler)
    answered = [number for number in STOPPING if signal.getsignal(number) in by_default]
    before = {number: signal.signal(number, stop) for number in answered}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopped(doing: str, then: str | Callable[[], str] = "") -> Iterator[None]:
    """Set `doing` and `then` of a CommandStopped raised within the block, unless an inner context has set them.

    then: a string, or a function that returns one and is called only when the command is stopped.
    """
    try:
        yield
    except CommandStopped as stop:
        if not stop.doing:
            stop.doing, stop.then = doing, then if isinstance(then, str) else then()
        raise


def end_now(code: int) -> None:
    """End this process, which a signal interrupted, with exit code `code` and without Python's normal exit.

    Threads of torch's store may still use objects that Python would destroy at exit, which aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # remove semaphores now, since the resource tracker would warn about them
    finalize: Any = util._run_finalizers  # type: ignore[attr-defined]
    finalize(0)
    os._exit(code)
