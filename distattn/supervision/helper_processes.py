"""Helper processes of ranks: the fork server and the process that copies output. They are watched, and blamed, like ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from distattn.supervision.culprits import process_state

# seconds between two checks of a helper
LOOK_SECONDS = 0.5
# replacements before a command gives up, because a new process does not cure a persistent fault
MOST_REPLACEMENTS = 3
# seconds to wait for a killed process to end; a process that is waiting for a disk ends later
_KILLED_SECONDS = 2.0


@dataclass
class Helper:
    """A child of this process. name: its name in sentences.

    replace: a function that starts a new helper and returns its process id; None if the ranks must end with the helper.
    begin_again: a clause that tells the user what happens when the helper is replaced.
    """

    name: str
    pid: int
    replace: Callable[[], int] | None = None
    begin_again: str = "another one is started"
    _stopped_looks: int = 0

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})"

    def end(self) -> str:
        """Return how the helper ended, such as "was killed by SIGKILL", or "" while it is alive."""
        if process_state(self.pid) not in "XZ":
            return ""
        return describe_exit(code) if (code := self.exit_code()) is not None else "has ended"

    def exit_code(self) -> int | None:
        """Return the exit code of a helper that has ended (-N for signal N), or None if it is unknown. Does not reap it."""
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        return None

    def fault(self, patience: float) -> str:
        """Return what is wrong with the helper, or "" if it is working. Call this every LOOK_SECONDS.

        patience: how many seconds it may stay stopped. These are measured by counting calls, so that time in which this process
        did not run does not count.
        """
        if ended := self.end():
            return ended
        self._stopped_looks = self._stopped_looks + 1 if self.is_stopped() else 0
        return "is stopped (SIGSTOP or a debugger)" if self._stopped_looks * LOOK_SECONDS > patience else ""

    def is_stopped(self) -> bool:
        """Return True if the helper is currently stopped."""
        return process_state(self.pid) in "Tt"

    def start_again(self, fault: str) -> str:
        """Kill the helper if it is still alive, and replace it. Return a sentence about this, without a period."""
        assert self.replace is not None
        sentence = f"{self} {fault}: {self.begin_again}"
        self.kill()
        self.pid, self._stopped_looks = self.replace(), 0
        return sentence

    def kill(self) -> None:
        """Send SIGKILL to the helper, and wait a short time for it to end. Does not reap it."""
        if not self.end():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        ends = time.monotonic() + _KILLED_SECONDS
        while not self.end() and time.monotonic() < ends:
            time.sleep(0.001)


def shell_exit_code(code: int) -> int:
    """Return the exit code that a shell reports: 128 + N for a process that signal N killed, whose code is -N."""
    return code if code >= 0 else 128 - code


def describe_exit(code: int) -> str:
    """Return how a process ended, given its exit code, which is negative if a signal killed it."""
    if code >= 0:
        return f"ended with exit code {code}"
    has_name = -code in {number.value for number in signal.Signals}
    return f"was killed by {signal.Signals(-code).name if has_name else f'signal {-code}'}"
