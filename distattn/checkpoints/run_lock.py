"""One job a folder: the second that comes refuses, and says who was there before."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from pathlib import Path
from types import TracebackType

from distattn.checkpoints.owner import Owner, file_age
from distattn.ir.errors import DistattnError

# what flock is held on, and who holds it; two files, since the second is replaced
_LOCK_FILE, _OWNER_FILE = "owner.lock", "owner.json"
# an owner on another machine that does not renew its lease for so long is dead; it renews it so often
LEASE_SECONDS, RENEWAL_SECONDS = 120.0, 15.0
# that a process of an earlier attempt of this job may take to end
_ENDING_SECONDS = 30.0
# that a new owner may take to write its name
_NAMING_SECONDS = 3.0


def _ending_seconds(owner: Owner | None) -> float:
    """That an owner of the same job may take to end. A file server may keep the locks of a lost host for its own lease."""
    elsewhere = owner is not None and owner.is_alive() is None
    return LEASE_SECONDS if elsewhere else _ENDING_SECONDS


class RunLock:
    """Holds a folder for this process until it is closed, or ends. One process of a job takes it, as a rule rank 0.

    On one machine the lock is flock's, and ends with its process. To other machines, whose file system may not share it, the
    owner's file is a lease: its owner renews it every RENEWAL_SECONDS, and it ends LEASE_SECONDS after the last time. An attempt
    of the same job (`Owner.job`) takes over at once: its launcher ends one attempt before it starts the next.
    """

    def __init__(self, folder: Path):
        """Take the lock. Raises DistattnError naming the owner where another job has it, or why the folder cannot be locked."""
        self._folder, self._me = folder, Owner.of_this_process()
        self._closing = threading.Event()
        self._file = folder / _OWNER_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._open()
        except OSError as error:
            raise DistattnError(
                f"{folder}: cannot be locked: {error.strerror}; name a folder that can be written."
            ) from None
        try:
            self._take()
        except OSError as error:
            os.close(self._descriptor)
            raise DistattnError(
                f"{folder}: cannot be locked: {error.strerror}; name a folder that can be written."
            ) from None
        except BaseException:
            os.close(self._descriptor)
            raise
        self._renewer = threading.Thread(target=self._renew, daemon=True, name="distattn-run-lock")
        self._renewer.start()

    def check(self) -> None:
        """Raise DistattnError where another job has taken the folder meanwhile: this one was silent for longer than its lease."""
        owner = Owner.read(self._file)
        if owner is not None and owner != self._me:
            raise DistattnError(
                f"{self._folder}: was taken by {owner}, while this process was stopped; end one of them."
            )

    def close(self) -> None:
        """Let others have the folder."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._renewer.join()
        if Owner.read(self._file) == self._me:
            with contextlib.suppress(OSError):
                self._file.unlink()
        os.close(self._descriptor)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> None:
        began = time.monotonic()
        while not self._flock():
            owner = Owner.read(self._file)
            waited = time.monotonic() - began
            if owner is not None and owner.is_alive() is False:
                # a child of the dead owner has inherited its lock; a new owner would have written its name by now
                if waited > _NAMING_SECONDS:
                    self._open_new()
            elif not self._is_of_same_job(owner) or waited > _ending_seconds(owner):
                raise self._refused(owner, "")
            # an earlier attempt of this job that has not ended yet
            time.sleep(0.1)
        owner = Owner.read(self._file)
        # flock is free: an owner on this machine is dead, one elsewhere may not share it
        if owner is not None and owner.is_alive() is None and not self._is_of_same_job(owner):
            left = LEASE_SECONDS - file_age(self._file)
            if left > 0:
                raise self._refused(owner, f"; if it is dead, try again in {left:.0f} s")
        self._me.write(self._file)

    def _flock(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _open_new(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._folder / _LOCK_FILE)
        os.close(self._descriptor)
        self._descriptor = self._open()

    def _open(self) -> int:
        return os.open(self._folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)

    def _is_of_same_job(self, owner: Owner | None) -> bool:
        return owner is not None and owner.job != "" and owner.job == self._me.job

    def _refused(self, owner: Owner | None, hint: str) -> DistattnError:
        who = str(owner) if owner is not None else "a process that has not said its name yet"
        return DistattnError(f"{self._folder}: belongs to {who}; end it, or choose another folder{hint}.")

    def _renew(self) -> None:
        while not self._closing.wait(RENEWAL_SECONDS):
            with contextlib.suppress(OSError):
                if Owner.read(self._file) == self._me:
                    os.utime(self._file)


def folder_owner(folder: Path) -> tuple[Owner, bool] | None:
    """Who has a folder, and whether it lives, as far as can be known; None where nobody does. Raises OSError."""
    file = folder / _OWNER_FILE
    if (owner := Owner.read(file)) is None:
        return None
    alive = owner.is_alive()
    return owner, file_age(file) <= LEASE_SECONDS if alive is None else alive
