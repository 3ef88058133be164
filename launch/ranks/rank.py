"""One rank of a run, in a process that is forked for it."""

import contextlib
import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from distattn.launch.ranks import copy_output
from distattn.launch.ranks.process_title import set_title
from distattn.supervision.helpers import LOOK_SECONDS, Helper

# less than the time that ranks may be silent: rank 0 waits for a stopped copier once the pipe is full
_COPY_PATIENCE_SECONDS = 3.0


def run(folder: str, json_lines: bool, proposed: str = "") -> int:
    """Run one rank of a run, in a process of its own that torchrun has named. Returns the exit code.

    proposed: the name of what `distattn resume` proposes; "" where the configuration is that of the run.
    """
    set_title(f"rank {os.environ['RANK']}", folder)
    if (logs := Path(folder, "logs")).is_dir():
        keep_log(logs)
    from distattn.launch.command_line import no_progress, print_line
    from distattn.preflight.preflight import check_run
    from distattn.training.rank import main

    report = no_progress if json_lines else print_line
    return main(folder, json_lines, proposed, lambda run, config, device: check_run(run, config, device, report))


def set_allocator() -> None:
    """Have GPU memory come in segments that grow, unless the user has chosen; before anything uses a GPU.

    Packed batches want buffers of ever new sizes, and fixed segments of the allocator would leave holes between them.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def keep_log(folder: Path) -> None:
    """Send what this rank and its libraries print to a file of its own; rank 0's goes to the console, too."""
    rank = os.environ["RANK"]
    file = folder / f"rank-{rank}.log"
    if rank == "0":
        target = _copied(file)
    else:
        try:
            target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            sys.stderr.write(
                f"distattn: {file}: cannot be opened: {error.strerror}; the console has what rank {rank} says.\n"
            )
            return
    for stream in (1, 2):
        os.dup2(target, stream)
    if rank != "0":
        sys.stdout, sys.stderr = _log_stream(1), _log_stream(2)


class _Log(io.FileIO):
    """A log. A line that a full disk does not take is left out: no rank is to end for what it prints."""

    def write(self, content: Any, /) -> int:
        """Write, or leave out; return the bytes that need not be written any more."""
        try:
            return super().write(content)
        except OSError:
            return len(content)


def _log_stream(descriptor: int) -> io.TextIOWrapper:
    raw = _Log(descriptor, "wb", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)


def _copied(file: Path) -> int:
    """Return a pipe's end; what is written there another process copies to a file and to the console.

    This process has the pipe's other end, too: where the copying process is lost, another one goes on reading.
    """
    read, write = os.pipe()
    command = [sys.executable, "-SP", copy_output.__file__, str(file)]
    console, errors = os.dup(1), os.dup(2)

    def start() -> int:
        # in a group of its own: Ctrl-C must not end it before the last line
        return subprocess.Popen(command, stdin=read, stdout=console, stderr=errors, start_new_session=True).pid

    def watch() -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            # where no process can be started now, one can be later
            with contextlib.suppress(OSError):
                if fault := copy.fault(_COPY_PATIENCE_SECONDS):
                    os.write(write, f"distattn: {copy.start_again(fault)}.\n".encode())

    copy = Helper(
        "the copier of rank 0's output", start(), start, "another one goes on, without lines that this one held"
    )
    threading.Thread(target=watch, daemon=True, name="distattn-copier-watch").start()
    return write
