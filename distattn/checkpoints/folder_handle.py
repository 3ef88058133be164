"""A folder that a process works in, identified by device and inode, so that a rename or removal is noticed."""

from __future__ import annotations

import os
from pathlib import Path

from distattn.ir.errors import DistattnError


class FolderHandle:
    """A folder that this process keeps open, so it is recognised after a rename. Use as a context manager, or close it."""

    def __init__(self, path: Path):
        """Open the folder. Raises OSError on failure."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def is_in_place(self) -> bool:
        """Return whether the path still names this folder, or True if the file system does not answer. Takes microseconds."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            # a server that does not answer is no evidence that the folder was moved
            return True

    def where(self) -> Path | None:
        """Return the folder's current path, or None if it was deleted or was moved by another machine."""
        try:
            current = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
            return current if os.path.samestat(os.stat(current), os.fstat(self._descriptor)) else None
        except OSError:
            return None

    def what_happened(self) -> str:
        """Describe what happened to a folder that is no longer in place, as the start of a sentence."""
        current = self.where()
        return f"{self.path}: " + (f"has been renamed to {current}" if current else "has been deleted or moved")

    def check(self) -> None:
        """Raise DistattnError if the folder is no longer in place."""
        if not self.is_in_place():
            current = self.where()
            remedy = f"continue with distattn resume {current}, or move it back" if current else "put it back"
            raise DistattnError(f"{self.what_happened()}; {remedy}.")

    def close(self) -> None:
        """Close the folder."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> FolderHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
