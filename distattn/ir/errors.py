"""The errors of distattn. Each message is one sentence that names the cause and a remedy."""

from __future__ import annotations

from collections.abc import Iterable


class DistattnError(ValueError):
    """A request that cannot be fulfilled exactly, and is refused. Exit code 2 on the command line."""

    exit_code = 2


class LostRankError(DistattnError):
    """Another rank stopped answering; the message names it. Exit code 4: another attempt may succeed."""

    exit_code = 4


class DamagedStateError(DistattnError):
    """The state of a run changed between two updates, and there is no checkpoint. Exit code 4: another attempt may succeed."""

    exit_code = 4


class RunStopped(DistattnError):
    """Training ended early on request, with a checkpoint to continue from. Exit code 75: EX_TEMPFAIL of sysexits.h."""

    exit_code = 75


class PlanError(DistattnError):
    """A plan that fails its proof: the message names the first wrong row."""


class DamagedDataError(DistattnError):
    """A file exists, but its content is damaged. Exit code 3 on the command line."""

    exit_code = 3


def named_ranks(ranks: Iterable[int]) -> str:
    """Name ranks in a text, such as "rank 3" or "ranks 1, 3"."""
    numbers = sorted(set(ranks))
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))
