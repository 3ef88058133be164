"""One rank of a run, in a process that is forked for it."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from distattn.launch.ranks import copy_output

# that the console may take for them, unless it is paused
_LAST_LINES_SECONDS = 2.0


def run(folder: str, json_lines: bool) -> int:
    """Run one rank of a run, in a process of its own that torchrun has named. Returns the exit code."""
    with redirected_output(Path(folder, "logs")):
        from distattn.launch.command_line import no_progress, print_line
        from distattn.preflight.preflight import check_run
        from distattn.training.rank import main

        report = no_progress if json_lines else print_line
        return main(folder, json_lines, lambda run, config, device: check_run(run, config, device, report))


def set_allocator() -> None:
    """Have GPU memory come in segments that grow, unless the user has chosen; before anything uses a GPU.

    Packed batches want buffers of ever new sizes, and fixed segments of the allocator would leave holes between them.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@contextlib.contextmanager
def redirected_output(logs: Path) -> Iterator[None]:
    """Send what this rank prints to a log of its own, where the run keeps logs (a folder); rank 0's to the console, too."""
    keeps_log, rank = logs.is_dir(), os.environ["RANK"]
    file = logs / f"rank-{rank}.log"
    # what libraries print goes into the log, too
    streams = (1, 2) if keeps_log else (1,)
    if rank != "0":
        if keeps_log:
            _redirect(streams, os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
        yield
        return
    given, own = os.pipe()
    command = [sys.executable, "-IS", copy_output.__file__, *([str(file)] if keeps_log else [])]
    # in a group of its own: Ctrl-C must not end it before the last line
    copy = subprocess.Popen(command, stdin=given, start_new_session=True)
    os.close(given)
    before = [os.dup(stream) for stream in streams]
    _redirect(streams, own)
    yield
    sys.stdout.flush()
    for stream, target in zip(streams, before, strict=True):
        _redirect((stream,), target)
    # its last line comes before what the launcher says
    with contextlib.suppress(subprocess.TimeoutExpired):
        copy.wait(_LAST_LINES_SECONDS)


def _redirect(streams: Sequence[int], target: int) -> None:
    for stream in streams:
        os.dup2(target, stream)
    os.close(target)
