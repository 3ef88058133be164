"""The errors of distattn. Each message is one sentence that names the cause and a remedy."""

from __future__ import annotations

from collections.abc import Iterable

# phrases in PyTorch's errors about a communicator or a connection
_LOST_CONNECTION = ("Connection", "gloo", "NCCL", "timed out", "Broken pipe")


class DistattnError(ValueError):
    """A request that is refused because it cannot be fulfilled exactly. Exit code 2 on the command line."""

    exit_code = 2


class SettingError(DistattnError):
    """A setting's value that cannot be used. key: the setting's dotted name, with which the message begins."""

    def __init__(self, key: str, fault: str):
        super().__init__(f"{key}: {fault}")
        self.key = key

    def __reduce__(self) -> tuple[type[DistattnError], tuple[str]]:
        """Return the pickled form of the error: a DistattnError with the same message."""
        return DistattnError, (str(self),)


class LostRankError(DistattnError):
    """The loss of another rank, which stopped answering; the message names the rank. Exit code 4: another attempt may succeed.

    peers: the lost ranks, numbered as in the default group; empty if unknown.
    """

    exit_code = 4

    def __init__(self, message: str, peers: Iterable[int] = ()):
        super().__init__(message)
        self.peers = tuple(sorted(set(peers)))


class DamagedStateError(DistattnError):
    """Run state that changed between two updates, with no checkpoint to load. Exit code 4: another attempt may succeed."""

    exit_code = 4


class RunStopped(DistattnError):
    """The early end of training on request, with a checkpoint to continue from. Exit code 75: EX_TEMPFAIL of sysexits.h."""

    exit_code = 75


class PlanError(DistattnError):
    """A plan that fails its proof or differs between ranks. The message names the first wrong row, or the ranks."""


class DamagedDataError(DistattnError):
    """A file that exists, but whose content is damaged. Exit code 3 on the command line."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its period. If it has no message, return its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def shows_lost_peer(error: BaseException) -> bool:
    """Return whether an error shows that this rank failed because it lost another rank."""
    if isinstance(error, DistattnError):
        return isinstance(error, LostRankError)
    if isinstance(error, OSError):
        # an error with a file name is about a file, not about a connection
        return isinstance(error, (ConnectionError, TimeoutError)) and error.filename is None
    # PyTorch's errors are matched by name, because this file does not import torch
    names = {base.__name__ for base in type(error).__mro__}
    if "DistError" in names:
        return True
    # gloo raises a plain RuntimeError, which only its text identifies
    text = str(error).strip().partition("\n")[0]
    is_foreign = "RuntimeError" in names and "OutOfMemoryError" not in names
    return is_foreign and any(phrase in text for phrase in _LOST_CONNECTION)


def named_ranks(ranks: Iterable[int]) -> str:
    """Format ranks for a message, such as "rank 3" or "ranks 1, 3"."""
    numbers = sorted(set(ranks))
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))
