"""The function that each rank of a run executes in its forked process."""

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
from distattn.supervision.helper_processes import LOOK_SECONDS, Helper

# shorter than the watch's patience, since rank 0 blocks on a stopped copier when the pipe is full
_COPY_PATIENCE_SECONDS = 3.0


def run(folder: str, json_lines: bool, proposed: str = "") -> int:
    """Run one rank of a run in this process. torchrun has set the rank's number. Return the exit code.

    proposed: name of the proposal of `distattn resume`; "" to use the run's own configuration.
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
    """Make PyTorch's GPU allocator use expandable segments, unless the user configured it. Call this before using a GPU.

    Packed batches need buffers of many sizes, which would fragment segments of fixed size.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def keep_log(folder: Path) -> None:
    """Send the output of this rank and its libraries to the rank's log file. Rank 0's output also goes to the console."""
    rank = os.environ["RANK"]
    file = folder / f"rank-{rank}.log"
    if rank == "0":
        target = _copied(file)
    else:
        try:
            target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            sys.stderr.write(
                f"distattn: {file}: cannot be opened: {error.strerror}; the console has the output of rank {rank}.\n"
            )
            return
    for stream in (1, 2):
        os.dup2(target, stream)
    if rank != "0":
        sys.stdout, sys.stderr = _log_stream(1), _log_stream(2)


class _Log(io.FileIO):
    """A log that drops lines while the disk is full, since printing must never make a rank fail."""

    def write(self, content: Any, /) -> int:
        """Write the content, or drop it if that fails. Return the number of bytes written or dropped."""
        try:
            return super().write(content)
        except OSError:
            return len(content)


def _log_stream(descriptor: int) -> io.TextIOWrapper:
    raw = _Log(descriptor, "wb", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)


def _copied(file: Path) -> int:
    """Start a process that copies its input to a file and to the console. Return the write end of the pipe to it.

    This process also keeps the read end open, so that a new process can continue if the copying process is lost.
    """
    read, write = os.pipe()
    command = [sys.executable, "-SP", copy_output.__file__, str(file)]
    console, errors = os.dup(1), os.dup(2)

    def start() -> int:
        # in a session of its own, so that Ctrl-C does not end it before it has copied the last line
        return subprocess.Popen(command, stdin=read, stdout=console, stderr=errors, start_new_session=True).pid

    def watch() -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            # if no process can be started, try again later
            with contextlib.suppress(OSError):
                if fault := copy.fault(_COPY_PATIENCE_SECONDS):
                    os.write(write, f"distattn: {copy.start_again(fault)}.\n".encode())

    copy = Helper(
        "the copier of rank 0's output", start(), start, "another one goes on, without lines that this one held"
    )
    threading.Thread(target=watch, daemon=True, name="distattn-copier-watch").start()
    return write
