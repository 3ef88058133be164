"""Read PyTorch's flight recorder of each rank: the collective calls that it began last, in order, and which are done.

A rank answers from a thread of PyTorch, so neither a lock nor a call that holds the interpreter is in the way. gloo and NCCL
record by default; gloo does not record messages between two ranks.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_SOCKET = "distattn-flight-recorder"
# names of the traces in PyTorch's server, by backend; without CUDA there is no second one
_TRACES = {"gloo": "fr_trace_json", "nccl": "dump_nccl_trace_json"}
_ANSWER_SECONDS = 3.0
# The first variable that is set counts, see FlightRecorder.hpp.
_LENGTHS = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
# Each message is an entry: a layer of USP has 378 and one of Ulysses 297 (8 ranks, 64:8 heads, a pack of 8 documents). Others
# have fewer.
_ENTRIES_A_LAYER = 400
# PyTorch's default length, and the longest record that ranks can send in time
_FEWEST, _MOST = 2_000, 24_000
# the servers of this process: a server ends when it is no longer referenced
_SERVERS: list[object] = []


def answer_with_flight_recorder() -> None:
    """Serve this process's flight recorder to processes of the same user. Do nothing if PyTorch has no server."""
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        # imported here: a launcher does not need torch
        from torch._C._distributed_c10d import _WorkerServer

        with tempfile.TemporaryDirectory(prefix="distattn-") as folder, _without_stderr():
            path = os.path.join(folder, _SOCKET)
            _SERVERS.append(_WorkerServer(path))
            # the socket loses its name and is found through this descriptor only, which closes when the process ends in any way
            os.open(path, os.O_PATH | os.O_CLOEXEC)


def size_flight_recorder(layers: int) -> None:
    """Make this process's recorder hold the calls of one step of a model of `layers` layers, unless the user set its length.

    Call it before the first process group. It holds 2,000 to 24,000 calls, each about 1.3 kB of host memory once it is made.
    """
    if not any(name in os.environ for name in _LENGTHS):
        os.environ[_LENGTHS[0]] = str(min(max(_ENTRIES_A_LAYER * layers, _FEWEST), _MOST))


def save_flight_recorders(folder: Path, pids: Mapping[int, int]) -> None:
    """Write flight-recorder-RANK.json into a folder for each rank that answers: its traces by backend. Raises OSError.

    pids: by rank. Takes 3 s at most, even if no rank answers.
    """
    ends = time.monotonic() + _ANSWER_SECONDS
    asked: dict[tuple[int, str], http.client.HTTPConnection] = {}
    traces_by_rank: dict[int, dict[str, Any]] = {}
    with contextlib.ExitStack() as opened:
        for rank, pid in pids.items():
            for name, trace in _TRACES.items():
                with contextlib.suppress(OSError):
                    asked[rank, name] = _ask(pid, trace, opened)
        for (rank, name), connection in asked.items():
            if (answer := _answer(connection, ends)) is not None:
                traces_by_rank.setdefault(rank, {})[name] = answer
    for rank, traces in traces_by_rank.items():
        (folder / f"flight-recorder-{rank}.json").write_text(json.dumps(traces), "utf-8")


def _ask(pid: int, trace: str, opened: contextlib.ExitStack) -> http.client.HTTPConnection:
    """Ask a process for a trace and return the connection for its answer. Raises OSError if the process cannot be asked."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = opened.enter_context(socket.socket(socket.AF_UNIX))
    connection.sock.settimeout(_ANSWER_SECONDS)
    connection.sock.connect(_socket_of(pid))
    connection.request("POST", f"/handler/{trace}")
    return connection


def _answer(connection: http.client.HTTPConnection, ends: float) -> Any:
    """Return the requested trace; None if it has not come at the time `ends` of the monotonic clock."""
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
        connection.sock.settimeout(max(0.01, ends - time.monotonic()))
        response = connection.getresponse()
        if response.status == http.client.OK:
            return json.loads(response.read())
    return None


def _socket_of(pid: int) -> str:
    """Return the socket on which a process answers. Raises FileNotFoundError if it has none."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        # other descriptors may be closed meanwhile
        with contextlib.suppress(FileNotFoundError):
            if f"/{_SOCKET} (deleted)" in os.readlink(descriptor):
                return str(descriptor)
    raise FileNotFoundError(f"process {pid} has no flight recorder")


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard the error stream: PyTorch prints the start of the server as if it were a warning."""
    before = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
