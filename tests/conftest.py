"""Shared by all tests: one thread per process (forked ranks need it), seeds that are printed on failure.

Triton's kernels run in its interpreter; they are what the environment makes them when Triton is first imported.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("suite")
