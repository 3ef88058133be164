"""Titles of processes: ps and top show what a process is and of which run, in place of one command line for all."""

import os

# the folder of the run, for the fork server, which is started without arguments of ours
RUN_VARIABLE = "DISTATTN_RUN"


def set_title(role: str, of: str) -> None:
    """Set this process's title to "distattn ROLE: OF". of: the folder of a run, or what else the process works for."""
    # else the title would be written over the environment that others see of this process
    os.environ.setdefault("SPT_NOENV", "1")
    from setproctitle import setproctitle

    setproctitle(f"distattn {role}: {of}" if of else f"distattn {role}")
