"""Import packages of the extra `data`, which only the data commands and readers need, at first use."""

from __future__ import annotations

import importlib
from typing import Any

from distattn.ir.errors import DistattnError


def import_extra(package: str, purpose: str) -> Any:
    """Import a package of the extra `data`. If it is not installed, raise a DistattnError that begins with `purpose`."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise DistattnError(f"{purpose} needs {error.name}: pip install 'distattn[data]'.") from None
