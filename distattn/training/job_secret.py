"""A job's secret, in a file that only its owner can read. Command lines, environment variables and logs never contain it."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from distattn.ir.errors import DistattnError

_BYTES = 32
# read and write permission for the owner; mask of the permission bits of group and others
_OWNER_ONLY, _OTHERS = 0o600, 0o077


def write_secret(file: Path) -> None:
    """Write a new random secret, replacing any old secret. Raises OSError."""
    new_file = file.with_name(f"{file.name}.tmp")
    with suppress(FileNotFoundError):
        new_file.unlink()
    # create the file with its final permissions, so that other users can never read it
    with os.fdopen(os.open(new_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY), "w") as opened:
        opened.write(secrets.token_hex(_BYTES) + "\n")
    new_file.replace(file)


def read_secret(file: Path) -> bytes:
    """Return the secret in a file. Raises DistattnError if the file is missing, damaged or readable by others."""
    try:
        with open(file, encoding="ascii", errors="replace") as opened:
            rights, text = os.fstat(opened.fileno()).st_mode, opened.read()
    except FileNotFoundError:
        raise DistattnError(
            f"{file}: this job's secret is missing; distattn train, launch and resume write one."
        ) from None
    if rights & _OTHERS:
        raise DistattnError(f"{file}: others may read this job's secret; chmod 600 it.")
    with suppress(ValueError):
        if len(secret := bytes.fromhex(text)) == _BYTES:
            return secret
    raise DistattnError(f"{file}: damaged; distattn resume writes a new secret.")
