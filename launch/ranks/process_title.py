"""Process titles, so that ps and top show each process's role and run instead of the same command line for all."""

import os

# environment variable that passes the run folder to the fork server, which gets no arguments from distattn
RUN_VARIABLE = "DISTATTN_RUN"


def set_title(role: str, of: str) -> None:
    """Set this process's title to "distattn ROLE: OF". of: the run folder, or another description of the process."""
    # keep the title from overwriting the process's environment in /proc
    os.environ.setdefault("SPT_NOENV", "1")
    from setproctitle import setproctitle

    setproctitle(f"distattn {role}: {of}" if of else f"distattn {role}")
