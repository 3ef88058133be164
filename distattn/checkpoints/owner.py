"""The owner of a folder: a process, described so that other processes can tell whether it is alive."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import xxhash

# environment variable with the name of a launcher's job; the processes of all its attempts have it, and no others
JOB_VARIABLE = "DISTATTN_JOB"


@dataclass(frozen=True)
class Owner:
    """A process. host: its name; machine: identifies this boot of this machine or container.

    pid: within the machine; started: the time of its start, in clock ticks after the boot, since process ids are reused. job: the
    job whose attempts follow one another: the number of a Slurm job, or a name from a launcher (JOB_VARIABLE), "" without one.
    since: when it became the owner, ISO 8601, UTC. token: unique for this ownership.
    """

    host: str
    machine: str
    pid: int
    started: int
    job: str
    since: str
    token: str

    @classmethod
    def of_this_process(cls) -> Owner:
        """Return this process as an owner from now on."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        job = os.environ.get(JOB_VARIABLE) or os.environ.get("SLURM_JOB_ID", "")
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _started(pid), job, since, secrets.token_hex(8))

    @classmethod
    def read(cls, file: Path) -> Owner | None:
        """Return the owner that a file names, or None."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return cls(**json.loads(file.read_bytes()))
        return None

    def write(self, file: Path) -> None:
        """Write this owner into a file atomically. Raise OSError."""
        aside = file.with_name(f"{file.name}.{self.token}")
        try:
            aside.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")
            aside.rename(file)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise

    def is_alive(self) -> bool | None:
        """Return whether the process still runs; None if it ran on another machine, or before a reboot of this one."""
        if self.machine != _machine():
            return None
        return _started(self.pid) == self.started

    @property
    def writer_name(self) -> str:
        """Return the name that the function `writer_name` returns in the owner's process."""
        return f"{_digest(self.machine)}-{self.pid}-{self.started}"

    def __str__(self) -> str:
        kind = "Slurm job " if self.job.isdecimal() else ""
        job = f", {kind}{self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def machine_digest() -> str:
    """Return 8 hexadecimal digits, equal for ranks that share a boot, process ids and a network with its loopback.

    Pods of one host may see all its processes (hostPID), but have their own networks.
    """
    return _digest(f"{_machine()} {os.readlink('/proc/self/ns/net')}")


def writer_name() -> str:
    """Return a name of this process for the name of a file, such as 1f3870be-4711-8236."""
    pid = os.getpid()
    return f"{_digest(_machine())}-{pid}-{_started(pid)}"


def _digest(text: str) -> str:
    return xxhash.xxh32_hexdigest(text.encode())


def writer_is_alive(name: str) -> bool | None:
    """Return whether the process of a `writer_name` still runs; None if it ran on another machine, or before a reboot."""
    machine, pid, started = name.split("-")
    if machine != _digest(_machine()):
        return None
    return _started(int(pid)) == int(started)


def file_age(path: Path) -> float:
    """Return the seconds since a file was changed, by the clock of its file system. Raise OSError."""
    with tempfile.TemporaryFile(dir=path.parent) as new_file:
        return os.fstat(new_file.fileno()).st_mtime - path.stat().st_mtime


@cache
def _machine() -> str:
    """Return the boot id of this machine with the namespace of process ids, which containers have of their own."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> int:
    """Return when a process was started, in clock ticks after the boot; 0 if there is no such process, or only a zombie."""
    try:
        # the program's name, in brackets, may contain blanks
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
