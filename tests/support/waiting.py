"""Polling for tests, with a limit that even a loaded machine does not reach."""

import time
from collections.abc import Callable
from typing import Any

# a wait takes this long only if the condition never becomes true
LIMIT_SECONDS = 900


def eventually(condition: Callable[[], Any], otherwise: str | Callable[[], str]) -> Any:
    """Poll until `condition()` is true, and return its result. Fail with message `otherwise` after LIMIT_SECONDS."""
    end = time.monotonic() + LIMIT_SECONDS
    while not (result := condition()):
        assert time.monotonic() < end, otherwise if isinstance(otherwise, str) else otherwise()
        time.sleep(0.1)
    return result
