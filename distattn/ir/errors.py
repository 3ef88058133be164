"""The errors people meet. Each is one sentence that names the culprit and what would work."""

from __future__ import annotations

from collections.abc import Iterable


class DistattnError(ValueError):
    """Something asked for cannot be done exactly, and is refused. Exit code 2 on the command line."""

    exit_code = 2


class LostRankError(DistattnError):
    """Another rank stopped answering; the message names it. Exit code 4: another attempt may do better."""

    exit_code = 4


class DamagedStateError(DistattnError):
    """The state of a run changed between two updates, and there is no checkpoint. Exit code 4: another attempt may do better."""

    exit_code = 4


class RunStopped(DistattnError):
    """Training ended early because it was asked to, with a checkpoint to go on from. Exit code 75: EX_TEMPFAIL of sysexits.h."""

    exit_code = 75


class PlanError(DistattnError):
    """A plan that is not proven: the message names the first offending row."""


class DamagedDataError(DistattnError):
    """A file is there but cannot be what it claims to be. Exit code 3 on the command line."""

    exit_code = 3


def named_ranks(ranks: Iterable[int]) -> str:
    """Ranks in words, such as "rank 3" or "ranks 1, 3"."""
    which = sorted(set(ranks))
    return ("rank " if len(which) == 1 else "ranks ") + ", ".join(map(str, which))
