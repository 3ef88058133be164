"""Read PyTorch's flight recorder of each rank: its last collective calls in order, and which of them have completed.

A rank answers from a PyTorch thread, so it answers even if a lock or the GIL is held. gloo and NCCL record by default, but gloo
does not record messages between two ranks.
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
# backend -> name of its trace on PyTorch's server; NCCL's exists only with CUDA
_TRACES = {"gloo": "fr_trace_json", "nccl": "dump_nccl_trace_json"}
_ANSWER_SECONDS = 3.0
# the first of these variables that is set determines the recorder's length (FlightRecorder.hpp)
_LENGTHS = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
# each message is an entry: a layer has 378 with USP and 297 with Ulysses (8 ranks, 64:8 heads, a pack of 8 documents), and fewer
# with other strategies
_ENTRIES_A_LAYER = 400
# PyTorch's default length, and the greatest length whose trace a rank can send within the time limit
_FEWEST, _MOST = 2_000, 24_000
# references to this process's servers, because a server ends when it is no longer referenced
_SERVERS: list[object] = []


def answer_with_flight_recorder() -> None:
    """Serve this process's flight recorder to processes of the same user. Do nothing if PyTorch has no server."""
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        # import torch here, because a launcher does not need it
        from torch._C._distributed_c10d import _WorkerServer

        with tempfile.TemporaryDirectory(prefix="distattn-") as folder, _without_stderr():
            path = os.path.join(folder, _SOCKET)
            _SERVERS.append(_WorkerServer(path))
            # the socket is deleted with the folder; other processes still reach it through this descriptor, which closes with
            # the process
            os.open(path, os.O_PATH | os.O_CLOEXEC)


def size_flight_recorder(layers: int) -> None:
    """Make this process's recorder long enough for one step of a model with `layers` layers, unless the user has set its length.

    Call this before the first process group is created. The recorder holds 2,000 to 24,000 calls. Each takes about 1.3 kB of host
    memory once recorded.
    """
    if not any(name in os.environ for name in _LENGTHS):
        os.environ[_LENGTHS[0]] = str(min(max(_ENTRIES_A_LAYER * layers, _FEWEST), _MOST))


def save_flight_recorders(folder: Path, pids: Mapping[int, int]) -> None:
    """Write the traces of each rank that answers, by backend, to flight-recorder-RANK.json in a folder.

    pids: process ids by rank. Takes at most 3 s, even if no rank answers. Raises OSError if a file cannot be written.
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
    """Ask a process for a trace. Return the connection for its answer. Raise OSError if the process cannot be asked."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = opened.enter_context(socket.socket(socket.AF_UNIX))
    connection.sock.settimeout(_ANSWER_SECONDS)
    connection.sock.connect(_socket_of(pid))
    connection.request("POST", f"/handler/{trace}")
    return connection


def _answer(connection: http.client.HTTPConnection, ends: float) -> Any:
    """Return the requested trace, or None if it has not arrived by the time `ends` on the monotonic clock."""
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
        connection.sock.settimeout(max(0.01, ends - time.monotonic()))
        response = connection.getresponse()
        if response.status == http.client.OK:
            return json.loads(response.read())
    return None


def _socket_of(pid: int) -> str:
    """Return the path of the socket on which a process answers. Raise FileNotFoundError if it has no such socket."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        # the process may close descriptors at any time
        with contextlib.suppress(FileNotFoundError):
            if f"/{_SOCKET} (deleted)" in os.readlink(descriptor):
                return str(descriptor)
    raise FileNotFoundError(f"process {pid} has no flight recorder")


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard stderr, where PyTorch reports the start of the server as if it were a warning."""
    before = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
