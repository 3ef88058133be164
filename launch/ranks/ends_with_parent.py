"""Makes multiprocessing's fork server end with its launcher, and sets its title. Only the fork server imports this module.

By itself, the server would end only when its pipe is closed in all processes, and every rank holds the pipe.
"""

import os

from distattn.launch.ranks.die_with_launcher import set_parent_death_signal
from distattn.launch.ranks.process_title import RUN_VARIABLE, set_title

set_parent_death_signal()
set_title("fork server", os.environ.pop(RUN_VARIABLE, ""))
