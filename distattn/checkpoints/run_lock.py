"""The lock on a run folder: a second job on the same folder refuses to start and names the first."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from distattn.checkpoints.owner import Owner, file_age
from distattn.ir.errors import DistattnError

# the roles that lock a folder: rank 0 while it trains, and the launcher from before it starts the ranks until it exits
OWNER, LAUNCHER = "owner", "launcher"
# the locked file, and the file that names the owner; they are separate, since the latter is replaced
_LOCK_FILE, _OWNER_FILE = "{}.lock", "{}.json"
# the age at which a lease by another machine's owner expires, and the time between two renewals
LEASE_SECONDS, RENEWAL_SECONDS = 120.0, 15.0
# seconds that a process of this job's previous attempt may take to exit
_ENDING_SECONDS = 30.0
# seconds that a new owner may take to write its name
_NAMING_SECONDS = 3.0
# the errors of a full disk, on which space may become free later
_FULL = (errno.ENOSPC, errno.EDQUOT)

# the folders that this process has locked, keyed by role, device and inode; fcntl locks of one process do not exclude each
# other
_HELD: set[tuple[str, int, int]] = set()
_HELD_MUTEX = threading.Lock()


def _forget_locks_of_parent() -> None:
    global _HELD_MUTEX  # noqa: PLW0603
    # another thread of the parent may hold the mutex
    _HELD_MUTEX = threading.Lock()
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_locks_of_parent)


def _ending_seconds(owner: Owner) -> float:
    """Return how long to wait for an owner of the same job to exit. File servers may keep a lost host's locks for some time."""
    return LEASE_SECONDS if owner.is_alive() is None else _ENDING_SECONDS


class RunLock:
    """A lock on a folder, held until it is closed or this process ends. One process of a job takes it, usually rank 0.

    role: OWNER or LAUNCHER; a folder may have one of each.

    On one machine, the lock is a record lock (fcntl). It ends with its process and, unlike flock, is not inherited by forked
    children. For other machines, which may not see that lock, the owner's file is a lease: the owner renews it every
    RENEWAL_SECONDS, and it expires LEASE_SECONDS after the last renewal. In the role OWNER, an attempt of the same job
    (`Owner.job`) takes over immediately, since the launcher ends one attempt before it starts the next. A launcher never takes
    over from another, since all commands typed in one Slurm allocation have the same job.

    On a full disk, the owner's name is written once there is room. Until then, only processes on this machine see the lock.
    """

    def __init__(self, folder: Path, role: str = OWNER):
        """Take the lock. Raises DistattnError naming the owner if another job has it, or the reason why locking failed."""
        self._folder, self._me = folder, Owner.of_this_process()
        self._closing = threading.Event()
        self._file, self._role = folder / _OWNER_FILE.format(role), role
        # the descriptor of the lock file; None if this process does not hold the lock
        self._descriptor: int | None = None
        self._identity = (role, 0, 0)
        # the previous owner, whose name stays in the file while a full disk keeps ours from being written
        self._before: Owner | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            self._release()
            raise DistattnError(
                f"{folder}: cannot be locked: {error.strerror}; name a folder that can be written."
            ) from None
        except BaseException:
            self._release()
            raise
        self._renewer = threading.Thread(target=self._renew, daemon=True, name="distattn-run-lock")
        self._renewer.start()

    def check(self) -> None:
        """Raise DistattnError if another job took the folder because this process was silent for longer than its lease."""
        owner = Owner.read(self._file)
        if owner is not None and owner not in (self._me, self._before):
            raise DistattnError(
                f"{self._folder}: was taken by {owner}, while this process was stopped; end one of them."
            )

    def close(self) -> None:
        """Release the folder. This does nothing in a forked child of the owner."""
        if self._closing.is_set() or self._me.pid != os.getpid():
            return
        self._closing.set()
        self._renewer.join()
        if Owner.read(self._file) == self._me:
            with contextlib.suppress(OSError):
                self._file.unlink()
        self._release()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> None:
        began = time.monotonic()
        while not self._lock_file():
            owner = Owner.read(self._file)
            if owner is None or owner.is_alive() is False:
                # a new owner has the lock and is about to write its name
                limit = _NAMING_SECONDS
            else:
                # an earlier attempt of this job may not have ended yet
                limit = _ending_seconds(owner) if self._is_of_same_job(owner) else 0.0
            if time.monotonic() - began > limit:
                raise self._refused(owner, "")
            time.sleep(0.1)
        owner = Owner.read(self._file)
        # since this process has the lock, an owner on this machine is dead, but an owner elsewhere may not see the lock
        if owner is not None and owner.is_alive() is None and not self._is_of_same_job(owner):
            self._wait_for_end_of_lease(owner)
        self._before = owner
        if (error := self._write_name()) is not None:
            sys.stderr.write(
                f"distattn: {self._file}: cannot be written: {error.strerror}; until there is room, jobs on other machines "
                "cannot see that the folder is in use.\n"
            )

    def _lock_file(self) -> bool:
        """Lock the folder's lock file. Return False if another owner has locked it. Raises OSError on failure."""
        with _HELD_MUTEX:
            folder = os.stat(self._folder)
            self._identity = self._role, folder.st_dev, folder.st_ino
            # opening and closing the file would release the lock that this process holds
            if self._identity in _HELD:
                return False
            path = self._folder / _LOCK_FILE.format(self._role)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            # these errors mean that another owner has the lock, or that the file was removed in the meantime
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(path)) and not self._another_lives():
                    self._descriptor = descriptor
                    _HELD.add(self._identity)
                    return True
            os.close(descriptor)
        return False

    def _another_lives(self) -> bool:
        """Return whether the folder's owner is alive on this machine although its lock file was removed."""
        owner = Owner.read(self._file)
        # if the file names this process, it is from a lock that this process has closed
        return owner is not None and owner.pid != self._me.pid and owner.is_alive() is True

    def _release(self) -> None:
        """Unlock the folder if this process has locked it."""
        with _HELD_MUTEX:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
                _HELD.discard(self._identity)

    def _wait_for_end_of_lease(self, owner: Owner) -> None:
        """Wait until an owner on another machine must be dead. Raises DistattnError if it may be alive, OSError on failure.

        After a clock jump, a lease may seem to have expired or to start in the future. A lease therefore counts as expired only
        if it is not renewed for twice RENEWAL_SECONDS by this process's monotonic clock.
        """
        age = file_age(self._file)
        if 0 <= age < LEASE_SECONDS:
            raise self._refused(owner, f"; if it is dead, try again in {LEASE_SECONDS - age:.0f} s")
        seconds = 2 * RENEWAL_SECONDS
        sys.stderr.write(f"distattn: {self._folder}: waiting {seconds:.0f} s to see whether {owner} is alive.\n")
        sys.stderr.flush()
        renewed = _modified(self._file)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, seconds / 4))
            if _modified(self._file) != renewed:
                raise self._refused(owner, "")

    def _is_of_same_job(self, owner: Owner) -> bool:
        """Return whether the owner and this process are attempts of one job, so that the earlier attempt exits by itself."""
        return self._role == OWNER and owner.job != "" and owner.job == self._me.job

    def _refused(self, owner: Owner | None, hint: str) -> DistattnError:
        may_be_alive = owner is not None and owner.is_alive() is not False
        holder = str(owner) if may_be_alive else "a process that has not written its name yet"
        return DistattnError(f"{self._folder}: belongs to {holder}; end it, or choose another folder{hint}.")

    def _write_name(self) -> OSError | None:
        """Write this process's name as the owner's. Return the error if the disk is full. Raises OSError on other failures."""
        try:
            self._me.write(self._file)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            return error
        self._before = None
        return None

    def _renew(self) -> None:
        while not self._closing.wait(RENEWAL_SECONDS):
            with contextlib.suppress(OSError):
                owner = Owner.read(self._file)
                if owner == self._me:
                    os.utime(self._file)
                elif owner == self._before:
                    self._write_name()


def _modified(file: Path) -> int:
    """Return when a file was last changed, in nanoseconds; 0 if the file is missing. Raises OSError on failure."""
    with contextlib.suppress(FileNotFoundError), open(file, "rb") as opened:
        # a network file system may show an old time unless the file is opened
        return os.fstat(opened.fileno()).st_mtime_ns
    return 0


def folder_owner(folder: Path, role: str = OWNER) -> tuple[Owner, bool] | None:
    """Return a folder's owner in a role and whether it seems alive; None if the folder is free. Raises OSError on failure."""
    file = folder / _OWNER_FILE.format(role)
    if (owner := Owner.read(file)) is None:
        return None
    alive = owner.is_alive()
    # a lease dated in the future was written while a clock was ahead
    return owner, abs(file_age(file)) <= LEASE_SECONDS if alive is None else alive
