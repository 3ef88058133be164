"""Who writes: a process, so named that others can tell whether it still lives."""

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

# in the environment of processes that a launcher starts: the name of its job, which is that of its attempts alone
JOB_VARIABLE = "DISTATTN_JOB"


@dataclass(frozen=True)
class Owner:
    """A process. host: its name; machine: what tells this boot of this machine (or container) from all others.

    pid: within the machine; started: when, in clock ticks after the boot, since numbers of processes are used again. job: whose
    attempts follow one another, the number of a Slurm job or a name that a launcher gave (JOB_VARIABLE), "" without one.
    since: ISO 8601, UTC, when it became the owner. token: of this ownership alone.
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
        """This process, as an owner from now on."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        job = os.environ.get(JOB_VARIABLE) or os.environ.get("SLURM_JOB_ID", "")
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _started(pid), job, since, secrets.token_hex(8))

    @classmethod
    def read(cls, file: Path) -> Owner | None:
        """The owner that a file names; None where it names none."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return cls(**json.loads(file.read_bytes()))
        return None

    def write(self, file: Path) -> None:
        """Name this owner in a file, whole or not at all. Raises OSError."""
        aside = file.with_name(f"{file.name}.{self.token}")
        try:
            aside.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")
            aside.rename(file)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise

    def is_alive(self) -> bool | None:
        """Whether the process still runs; None where it ran on another machine, or before this one was started again."""
        if self.machine != _machine():
            return None
        return _started(self.pid) == self.started

    @property
    def writer_name(self) -> str:
        """Return the name that `writer_name` gives to this process."""
        return f"{_digest(self.machine)}-{self.pid}-{self.started}"

    def __str__(self) -> str:
        kind = "Slurm job " if self.job.isdecimal() else ""
        job = f", {kind}{self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def machine_digest() -> str:
    """Return 8 hexadecimal digits that ranks have in common which share a boot, process ids and a network, the loopback included.

    Pods of one host may see all its processes (hostPID), and have networks of their own.
    """
    return _digest(f"{_machine()} {os.readlink('/proc/self/ns/net')}")


def writer_name() -> str:
    """This process in a word that can stand in the name of a file, such as 1f3870be-4711-8236."""
    pid = os.getpid()
    return f"{_digest(_machine())}-{pid}-{_started(pid)}"


def _digest(text: str) -> str:
    return xxhash.xxh32_hexdigest(text.encode())


def writer_is_alive(name: str) -> bool | None:
    """Whether the process of a `writer_name` still runs; None where it ran on another machine, or before a start of this one."""
    machine, pid, started = name.split("-")
    if machine != _digest(_machine()):
        return None
    return _started(int(pid)) == int(started)


def file_age(path: Path) -> float:
    """Seconds since a file was changed, by the clock of its file system. Raises OSError."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime


@cache
def _machine() -> str:
    """The boot of this machine, and the numbering of processes that this one sees: containers have their own."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> int:
    """When a process was started, in clock ticks after the boot; 0 where there is none, or only what is left of one."""
    try:
        # the name, in brackets, may have blanks in it
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
