"""Print a refusal in a multi-rank script as one sentence instead of as a traceback on every rank."""

from __future__ import annotations

import hashlib
import sys
import traceback
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from distattn.ir.errors import DistattnError
from distattn.parallel.runtime.communication.collective_calls import ask_store, default_store

# wait for the store at most this long, so that the rank exits even if the store does not answer
_STORE_SECONDS = 5.0


def print_refusals_once() -> None:
    """Let only the first rank that raises an uncaught DistattnError print it, as one sentence.

    The script then exits with the error's exit code. Other exceptions are printed as before. On a single rank, this does nothing.
    """
    installed = getattr(sys.excepthook, "func", None) is _print_exception
    if dist.is_initialized() and dist.get_world_size() > 1 and not installed:
        sys.excepthook = partial(_print_exception, sys.excepthook)


def _print_exception(
    previous: Any, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if not isinstance(error, DistattnError):
        previous(kind, error, trace)
        return
    if _is_first(str(error)):
        script = traceback.extract_tb(trace)[0]
        where = f"{Path(script.filename).name}, line {script.lineno}"
        sys.stderr.write(f"distattn: rank {_rank()}: {error} ({where})\n")
        sys.stderr.flush()
    raise SystemExit(error.exit_code)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _is_first(sentence: str) -> bool:
    """Return whether this rank should print the sentence: no other rank has printed it, or the ranks' store does not answer."""
    if not dist.is_initialized():
        return True
    key = "distattn/refusal/" + hashlib.blake2b(sentence.encode(), digest_size=16).hexdigest()
    return ask_store(lambda: default_store().add(key, 1), _STORE_SECONDS) in (None, 1)
