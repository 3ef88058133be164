"""Settings for all tests: one thread per process (which forked ranks need), seeds that are printed on failure, and
sampling.

Triton's kernels run in its interpreter, which the environment selects when Triton is first imported.
"""

import os
import signal
from collections import Counter
from collections.abc import Generator
from zlib import crc32

os.environ["TRITON_INTERPRET"] = "1"
# torchrun sets this variable; without it accelerate gives every rank as many threads as there are cores
os.environ["OMP_NUM_THREADS"] = "1"
# a single-rank run uses all cores while other tests run, so it would take three times as long if its threads spun while
# they wait
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import pytest
import torch
from hypothesis import settings
from process_guard import guard_processes

# background processes of a shell, and processes under nohup, inherit these signals as ignored. Restore the handlers,
# since tests send the signals
_HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGQUIT: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
for number, handler in _HANDLERS.items():
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
# processes started by tests end with this process, however it ends
guard_processes()
torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --quarter, which CI uses to run the tests that `make test` leaves out, one part per run."""
    parser.addoption(
        "--quarter",
        type=int,
        choices=range(4),
        help="of what `make test` leaves out: one quarter of the cases of long products, half of the other tests",
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """Mark the cases of a test marked sampled(n) as full, except the first and every n-th after it. `make test` leaves
    out tests marked full.

    With --quarter, a quarter of these cases and half of the other tests marked full are selected. Tests marked waits
    run first in some processes, so that the suite does not end with a single process that waits.
    """
    quarter = config.getoption("quarter")
    seen: Counter[str] = Counter()
    left_out = []
    for item in items:
        name = item.nodeid.partition("[")[0]
        sampled = item.get_closest_marker("sampled")
        parts = 2
        if sampled is not None and seen[name] % sampled.args[0]:
            item.add_marker(pytest.mark.full)
            parts = 4
        # do not select every second or fourth test in order, since those may all share one parameter value
        if quarter is not None and item.get_closest_marker("full") and (crc32(item.nodeid.encode()) - quarter) % parts:
            left_out.append(item)
        seen[name] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
    # pytest's -m deselects tests during this yield
    yield
    items[:] = _spread(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def _spread(items: list[pytest.Item], processes: int) -> list[pytest.Item]:
    """Order the tests so that each process gets an equal share, as `--dist worksteal` distributes them.

    The shares of about half of the processes start with entire modules of tests that wait, while the other processes
    compute.
    """
    waiting: dict[str, list[pytest.Item]] = {}
    minutes: Counter[str] = Counter()
    for item in items:
        if (marker := item.get_closest_marker("waits")) is not None:
            module = item.nodeid.partition("::")[0]
            waiting.setdefault(module, []).append(item)
            minutes[module] = max(minutes[module], *marker.args, 1)
    shares: list[list[pytest.Item]] = [[] for _ in range(processes)]
    filled = [0] * (processes // 2 + 1)
    for module, length in minutes.most_common():
        least = filled.index(min(filled))
        shares[least] += waiting[module]
        filled[least] += length
    computing = [item for item in items if item.get_closest_marker("waits") is None]
    ordered: list[pytest.Item] = []
    for number, share in enumerate(shares):
        size = (len(items) - len(ordered)) // (processes - number)
        count = max(size - len(share), 0)
        taken, computing = computing[:count], computing[count:]
        ordered += [*share, *taken]
    return ordered
