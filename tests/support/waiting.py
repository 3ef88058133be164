"""How tests wait: they poll for what must become true, with a limit that no loaded machine reaches."""

import time
from collections.abc import Callable
from typing import Any

# only what never comes takes so long
LIMIT_SECONDS = 900


def eventually(condition: Callable[[], Any], otherwise: str | Callable[[], str]) -> Any:
    """Poll until `condition()` is true; returns what it returned. Fails with `otherwise` after LIMIT_SECONDS."""
    end = time.monotonic() + LIMIT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, otherwise if isinstance(otherwise, str) else otherwise()
        time.sleep(0.1)
    return found
