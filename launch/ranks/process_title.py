"""Titles of processes: ps and top show the role and the run of a process instead of the same command line for all."""

import os

# environment variable with the folder of the run, for the fork server, which gets no arguments from distattn
RUN_VARIABLE = "DISTATTN_RUN"


def set_title(role: str, of: str) -> None:
    """Set this process's title to "distattn ROLE: OF". of: the folder of a run, or another purpose of the process."""
    # otherwise the title would overwrite the process's environment in /proc
    os.environ.setdefault("SPT_NOENV", "1")
    from setproctitle import setproctitle

    setproctitle(f"distattn {role}: {of}" if of else f"distattn {role}")
