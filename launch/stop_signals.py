"""Signals that end a command: each gives a sentence and the exit code 128 + N, whatever the command does when it comes.

A signal that is ignored when the command begins stays ignored, as after nohup, and a signal with a handler of the caller is left
to the caller. docs/local.md has a table of the sentences.
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
# another signal within this time of the first is the same request; a later one interrupts the clean-up
_SAME_REQUEST_SECONDS = 5.0


class CommandStopped(KeyboardInterrupt):
    """A signal that ends this command.

    doing: what the command did, such as "in training"; then: what completes or continues it. Both may be empty.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = signal.Signals(number)
        self.doing = self.then = ""

    @property
    def exit_code(self) -> int:
        """Return 128 + the signal's number, as shells do."""
        return 128 + int(self.signal)

    def __str__(self) -> str:
        doing = f" {self.doing}" if self.doing else ""
        return f"stopped by {self.signal.name}{doing}" + (f"; {self.then}" if self.then else "") + "."


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise CommandStopped in the main thread for the first of the signals that comes in this context.

    Only signals with their default action are handled. Nested contexts and other threads do nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, asked_at = os.getpid(), -_SAME_REQUEST_SECONDS

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if os.getpid() != owner:
            # a process that was forked inside the context ends in its own way
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
    """Set `doing` and `then` of a CommandStopped from this context, unless an inner context has set them.

    then: a text, or a function that returns it, called when the command is stopped.
    """
    try:
        yield
    except CommandStopped as stop:
        if not stop.doing:
            stop.doing, stop.then = doing, then if isinstance(then, str) else then()
        raise


def end_now(code: int) -> None:
    """End this process, which was stopped in the middle, with an exit code."""
    # threads of torch's store may still use objects that Python destroys at exit, which aborts the process
    sys.stdout.flush()
    sys.stderr.flush()
    # otherwise the resource tracker warns about semaphores that it removes
    finalize: Any = util._run_finalizers  # type: ignore[attr-defined]
    finalize(0)
    os._exit(code)
