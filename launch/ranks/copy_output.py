"""Copy standard input to a log and to the console: python copy_output.py LOG.

Unlike tee, this never blocks the rank that writes, which would otherwise hang while it prints, and be killed: lines for a
paused console or pager wait in this process's memory. It imports little, so that it starts quickly.
"""

import os
import queue
import select
import sys
import threading
from contextlib import suppress


def main(log: str) -> None:
    """Copy until the input ends. If either the log or the console cannot be written, continue with the other."""
    chunks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # not a daemon thread, so that this process ends only when everything is written
    threading.Thread(target=_to_console, args=(chunks,)).start()
    target, complained = None, False
    try:
        while chunk := os.read(0, 1 << 16):
            chunks.put(chunk)
            try:
                if target is None:
                    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                _write(target, chunk)
            except OSError as error:
                # keep trying: a full disk may have room again for the next lines
                if not complained:
                    complained = True
                    chunks.put(f"distattn: {log} lacks lines: {error.strerror}; the console has them.\n".encode())
    finally:
        chunks.put(b"")


def _to_console(chunks: queue.SimpleQueue[bytes]) -> None:
    while chunk := chunks.get():
        # the console may be closed
        with suppress(OSError):
            _write(1, chunk)


def _write(target: int, chunk: bytes) -> None:
    while chunk:
        try:
            chunk = chunk[os.write(target, chunk) :]
        except BlockingIOError:
            select.select([], [target], [])


if __name__ == "__main__":
    main(sys.argv[1])
