"""Let multiprocessing's fork server, which alone imports this, end with its launcher, and set its title.

Without this the server would end only when no process has its pipe open, and every rank has that pipe.
"""

import os

from distattn.launch.ranks.die_with_launcher import set_parent_death_signal
from distattn.launch.ranks.process_title import RUN_VARIABLE, set_title

set_parent_death_signal()
set_title("fork server", os.environ.pop(RUN_VARIABLE, ""))
