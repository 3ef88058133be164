"""Helper processes of ranks: the fork server and the process that copies output. They are watched and named like ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from distattn.supervision.culprits import process_state

# seconds between two looks at a helper
LOOK_SECONDS = 0.5
# replacements before a command gives up: a new process does not cure a fault that comes back
MOST_REPLACEMENTS = 3
# seconds that a killed process may take to end: a process that waits for a disk ends later
_KILLED_SECONDS = 2.0


@dataclass
class Helper:
    """A child of this process. name: its name in sentences.

    replace: starts another one and returns its process id; None if the ranks end with the helper. begin_again: what a new
    helper means for the user, as the rest of a sentence.
    """

    name: str
    pid: int
    replace: Callable[[], int] | None = None
    begin_again: str = "another one is started"
    _stopped_looks: int = 0

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})"

    def end(self) -> str:
        """Return how it has ended, such as "was killed by SIGKILL"; "" while it lives."""
        if process_state(self.pid) not in "XZ":
            return ""
        return describe_exit(code) if (code := self.exit_code()) is not None else "has ended"

    def exit_code(self) -> int | None:
        """Return the exit code after its end, -N for signal N; None if it is unknown. Does not reap it."""
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        return None

    def fault(self, patience: float) -> str:
        """Return its fault, "" if there is no fault. Call it every LOOK_SECONDS.

        patience: seconds that it may be stopped. Calls are counted, not seconds: while this process did not run, no time counts.
        """
        if ended := self.end():
            return ended
        self._stopped_looks = self._stopped_looks + 1 if self.is_stopped() else 0
        return "is stopped (SIGSTOP or a debugger)" if self._stopped_looks * LOOK_SECONDS > patience else ""

    def is_stopped(self) -> bool:
        """Return whether it is stopped now."""
        return process_state(self.pid) in "Tt"

    def start_again(self, fault: str) -> str:
        """Kill it if it still lives, and replace it. Return a sentence about that, without its period."""
        assert self.replace is not None
        sentence = f"{self} {fault}: {self.begin_again}"
        self.kill()
        self.pid, self._stopped_looks = self.replace(), 0
        return sentence

    def kill(self) -> None:
        """Send it SIGKILL and wait until it has ended. Does not reap it."""
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
    """Return how a process ended, from its exit code, which is negative if a signal killed it."""
    if code >= 0:
        return f"ended with exit code {code}"
    has_name = -code in {number.value for number in signal.Signals}
    return f"was killed by {signal.Signals(-code).name if has_name else f'signal {-code}'}"
