"""A folder that a process works in, known by its device and inode: a folder that is renamed or deleted meanwhile is noticed."""

from __future__ import annotations

import os
from pathlib import Path

from distattn.ir.errors import DistattnError


class FolderHandle:
    """A folder that this process keeps open, and knows again under another name. Use it as a context, or close it."""

    def __init__(self, path: Path):
        """Open the folder. Raises OSError."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def is_in_place(self) -> bool:
        """Return whether the path names this folder, as far as the file system answers. Costs a call of the system, some us."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            # a server that does not answer says nothing about the folder
            return True

    def where(self) -> Path | None:
        """Return the folder's path now; None where it was deleted, or where another machine has moved it."""
        try:
            now = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
            return now if os.path.samestat(os.stat(now), os.fstat(self._descriptor)) else None
        except OSError:
            return None

    def what_happened(self) -> str:
        """Return what became of a folder that is not in its place, as the beginning of a sentence."""
        now = self.where()
        return f"{self.path}: " + (
            f"was renamed to {now} meanwhile" if now else "was deleted meanwhile, or moved elsewhere"
        )

    def check(self) -> None:
        """Raise DistattnError where the folder is not in its place."""
        if not self.is_in_place():
            now = self.where()
            remedy = f"distattn resume {now} goes on, or move it back" if now else "put it back"
            raise DistattnError(f"{self.what_happened()}; {remedy}.")

    def close(self) -> None:
        """Let go of the folder."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> FolderHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
