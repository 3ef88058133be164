"""Helper processes of ranks: the fork server, and what copies output. They are watched and named as ranks are."""

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
# processes that a command replaces before it gives up: a new process does not mend a fault that comes back
MOST_REPLACEMENTS = 3
# the time that a killed process may take to end: one that waits for a disk ends later
_KILLED_SECONDS = 2.0


@dataclass
class Helper:
    """A child of this process. name: as in sentences.

    replace: starts another one and returns its process id; None where the ranks end with the helper. begin_again: what a new one
    means for the user, as the rest of a sentence.
    """

    name: str
    pid: int
    replace: Callable[[], int] | None = None
    begin_again: str = "another one is started"
    _stopped_looks: int = 0

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})"

    def end(self) -> str:
        """Return how it has ended, such as "was killed by SIGKILL"; "" while it is there."""
        if process_state(self.pid) not in "XZ":
            return ""
        return how_it_ended(code) if (code := self.exit_code()) is not None else "has ended"

    def exit_code(self) -> int | None:
        """Return the exit code of one that has ended, -N for signal N; None where that is not known. It is not reaped."""
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        return None

    def fault(self, patience: float) -> str:
        """Return what is wrong with it, "" for nothing. Call it every LOOK_SECONDS.

        patience: seconds that it may be stopped. Looks are counted, since time in which this process did not run is no fault.
        """
        if ended := self.end():
            return ended
        self._stopped_looks = self._stopped_looks + 1 if self.is_stopped() else 0
        return "is stopped (SIGSTOP or a debugger)" if self._stopped_looks * LOOK_SECONDS > patience else ""

    def is_stopped(self) -> bool:
        """Return whether it is stopped now."""
        return process_state(self.pid) in "Tt"

    def start_again(self, fault: str) -> str:
        """Kill what is left of it and replace it. Return the sentence about it, without its period."""
        assert self.replace is not None
        sentence = f"{self} {fault}: {self.begin_again}"
        self.kill()
        self.pid, self._stopped_looks = self.replace(), 0
        return sentence

    def kill(self) -> None:
        """End it by SIGKILL, and wait until it has ended; it is not reaped."""
        if not self.end():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        ends = time.monotonic() + _KILLED_SECONDS
        while not self.end() and time.monotonic() < ends:
            time.sleep(0.001)


def how_it_ended(code: int) -> str:
    """Return what to say of a process by its exit code, which is negative where a signal killed it."""
    if code >= 0:
        return f"ended with exit code {code}"
    has_name = -code in {number.value for number in signal.Signals}
    return f"was killed by {signal.Signals(-code).name if has_name else f'signal {-code}'}"
