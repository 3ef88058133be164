"""Copies its input to the console, and to a file where one is named: python copy_output.py [FILE].

Unlike tee it never keeps the rank that writes waiting: what a paused console, or a pager that nobody scrolls, does not take yet
waits here in memory. Else a rank would hang in a line that it prints, and be killed for it. Imports little, to start at once.
"""

import os
import queue
import select
import sys
import threading
from contextlib import suppress


def main(*files: str) -> None:
    """Copy until the input ends. Where a copy cannot be written any more, the other one goes on."""
    chunks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # this process ends once it has written all
    threading.Thread(target=_to_console, args=(chunks,)).start()
    logs = [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for file in files]
    while chunk := os.read(0, 1 << 16):
        chunks.put(chunk)
        for log in logs:
            # of a full disk, where there may be room again for the next one
            with suppress(OSError):
                _write(log, chunk)
    chunks.put(b"")


def _to_console(chunks: queue.SimpleQueue[bytes]) -> None:
    while chunk := chunks.get():
        # where nobody reads any more
        with suppress(OSError):
            _write(1, chunk)


def _write(target: int, chunk: bytes) -> None:
    while chunk:
        try:
            chunk = chunk[os.write(target, chunk) :]
        except BlockingIOError:
            select.select([], [target], [])


if __name__ == "__main__":
    main(*sys.argv[1:])
