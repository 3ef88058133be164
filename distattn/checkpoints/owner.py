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

# the environment variable that holds the name of a launcher's job; it is set only in the processes of the job's attempts
JOB_VARIABLE = "DISTATTN_JOB"


@dataclass(frozen=True)
class Owner:
    """A process that owns a folder. host: its host name. machine: identifies the boot of its machine or container.

    pid: its id within the machine. started: when it started, in clock ticks after boot, since process ids are reused. job: the
    Slurm job id, or the launcher's name for the job (JOB_VARIABLE), shared by all attempts of the job; "" outside jobs. since:
    when it became the owner, ISO 8601, UTC. token: unique to this ownership.
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
        """Return this process as an owner whose ownership starts now."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        job = os.environ.get(JOB_VARIABLE) or os.environ.get("SLURM_JOB_ID", "")
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _started(pid), job, since, secrets.token_hex(8))

    @classmethod
    def read(cls, file: Path) -> Owner | None:
        """Return the owner described in a file, or None if the file is missing or invalid."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return cls(**json.loads(file.read_bytes()))
        return None

    def write(self, file: Path) -> None:
        """Write this owner to a file atomically. Raises OSError on failure."""
        aside = file.with_name(f"{file.name}.{self.token}")
        try:
            aside.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")
            aside.rename(file)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise

    def is_alive(self) -> bool | None:
        """Return whether the process is still running; None if it ran on another machine, or on this machine before a reboot."""
        if self.machine != _machine():
            return None
        return _started(self.pid) == self.started

    @property
    def writer_name(self) -> str:
        """The name that the function `writer_name` returns in the owner's process."""
        return f"{_digest(self.machine)}-{self.pid}-{self.started}"

    def __str__(self) -> str:
        kind = "Slurm job " if self.job.isdecimal() else ""
        job = f", {kind}{self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def machine_digest() -> str:
    """Return 8 hexadecimal digits, equal for ranks that share a boot, a process-id namespace and a network (hence loopback).

    Pods on one host may see all of its processes (hostPID), but have their own networks.
    """
    return _digest(f"{_machine()} {os.readlink('/proc/self/ns/net')}")


def writer_name() -> str:
    """Return a name of this process for use in file names, such as 1f3870be-4711-8236."""
    pid = os.getpid()
    return f"{_digest(_machine())}-{pid}-{_started(pid)}"


def _digest(text: str) -> str:
    return xxhash.xxh32_hexdigest(text.encode())


def writer_is_alive(name: str) -> bool | None:
    """Return whether the process that `name` describes is running; None if it ran on another machine or before a reboot."""
    machine, pid, started = name.split("-")
    if machine != _digest(_machine()):
        return None
    return _started(int(pid)) == int(started)


def file_age(path: Path) -> float:
    """Return the seconds since a file was last changed, by its file system's clock. Raises OSError on failure."""
    with tempfile.TemporaryFile(dir=path.parent) as new_file:
        return os.fstat(new_file.fileno()).st_mtime - path.stat().st_mtime


@cache
def _machine() -> str:
    """Return this machine's boot id and this process's process-id namespace, since each container has its own namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> int:
    """Return when a process started, in clock ticks after boot, or 0 if there is no such process or it is a zombie."""
    try:
        # the program's name, in parentheses, may contain spaces
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
