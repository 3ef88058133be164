"""The secret of a job: a file that its user alone can read. It is on no command line, in no environment and in no log."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from distattn.ir.errors import DistattnError

_BYTES = 32
# of a file that the owner alone reads and writes; what others may do
_OWNER_ONLY, _OTHERS = 0o600, 0o077


def write_secret(file: Path) -> None:
    """Draw a new secret, and write it in place of the one before. Raises OSError."""
    aside = file.with_name(f"{file.name}.tmp")
    with suppress(FileNotFoundError):
        aside.unlink()
    # never there with other rights, not for a moment
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY), "w") as opened:
        opened.write(secrets.token_hex(_BYTES) + "\n")
    aside.replace(file)


def read_secret(file: Path) -> bytes:
    """The secret in a file. Raises DistattnError where there is none, or where others may read it."""
    try:
        with open(file, encoding="ascii", errors="replace") as opened:
            rights, text = os.fstat(opened.fileno()).st_mode, opened.read()
    except FileNotFoundError:
        raise DistattnError(
            f"{file}: there is no secret of this job; distattn train, launch and resume write one."
        ) from None
    if rights & _OTHERS:
        raise DistattnError(f"{file}: others may read this job's secret; chmod 600 it.")
    with suppress(ValueError):
        if len(secret := bytes.fromhex(text)) == _BYTES:
            return secret
    raise DistattnError(f"{file}: damaged; distattn resume writes a new secret.")
