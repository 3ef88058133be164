"""Imported by multiprocessing's fork server alone: Linux kills it when its launcher ends.

By itself it ends when nobody has its pipe open any more, and every rank has that pipe.
"""

from distattn.launch.ranks.die_with_launcher import set_parent_death_signal

set_parent_death_signal()
