"""One rank of a run, in a process that is forked for it."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from distattn.launch.ranks import copy_output


def run(folder: str, json_lines: bool, proposed: bool = False) -> int:
    """Run one rank of a run, in a process of its own that torchrun has named. Returns the exit code.

    proposed: whether its configuration is the one that `distattn resume` proposes.
    """
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
        command = [sys.executable, "-SP", copy_output.__file__, str(file)]
        # in a group of its own: Ctrl-C must not end it before the last line
        copy = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        assert copy.stdin is not None
        target = copy.stdin.fileno()
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
