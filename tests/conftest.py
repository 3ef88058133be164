"""Shared by all tests: one thread per process (forked ranks need it), seeds that are printed on failure, what is sampled.

Triton's kernels run in its interpreter; they are what the environment makes them when Triton is first imported.
"""

import os
from collections import Counter
from zlib import crc32

os.environ["TRITON_INTERPRET"] = "1"
# as torchrun sets it: else accelerate has every rank compute on as many threads as there are cores
os.environ["OMP_NUM_THREADS"] = "1"
# a run of one rank has all cores, which other tests have, too: threads that spin while they wait take three times as long then
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import pytest
import torch
from hypothesis import settings
from process_guard import guard_processes

# what tests start ends with this process, however it ends
guard_processes()
torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --quarter: CI has the time for one quarter of the cases that `make test` leaves out of long products."""
    parser.addoption(
        "--quarter", type=int, choices=range(4), help="one quarter of the cases that `make test` leaves out"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the cases of a test marked sampled(n), the first and every n-th are for `make test`; the others are marked full.

    With --quarter only a quarter of those is run. Tests marked waits come first, so that the suite does not end with one
    process that waits.
    """
    quarter = config.getoption("quarter")
    seen: Counter[str] = Counter()
    left_out = []
    for item in items:
        name = item.nodeid.partition("[")[0]
        sampled = item.get_closest_marker("sampled")
        if sampled is not None and seen[name] % sampled.args[0]:
            item.add_marker(pytest.mark.full)
            # not every fourth one, which may all have the same value of a parameter
            if quarter is not None and crc32(item.nodeid.encode()) % 4 != quarter:
                left_out.append(item)
        seen[name] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
    items.sort(key=lambda item: item.get_closest_marker("waits") is None)
