"""Imported by multiprocessing's fork server alone: Linux kills it when its launcher ends, and its title names the run.

By itself it ends when nobody has its pipe open any more, and every rank has that pipe.
"""

import os

from distattn.launch.ranks.die_with_launcher import set_parent_death_signal
from distattn.launch.ranks.process_title import RUN_VARIABLE, set_title

set_parent_death_signal()
set_title("fork server", os.environ.pop(RUN_VARIABLE, ""))
