"""Prints a message, with the command that completes the run, if a Ray cluster's head is lost. Ray ends the launcher later."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from distattn.ir.text_format import print_message

# seconds between requests; timeout of a request; consecutive failed requests after which the head counts as lost
_LOOK_SECONDS, _ANSWER_SECONDS, _LOOKS = 2.0, 2.0, 5


def resume_command(folder: object) -> str:
    """Return the command that continues the run or sweep in a folder."""
    return f"python -m distattn.launch.ray.attempts {folder}"


@contextmanager
def watch_head(folder: object) -> Iterator[None]:
    """Watch the head of the connected cluster within the block, and print a message once if it is lost.

    folder: folder of the run or sweep.
    """
    address = ray.get_runtime_context().gcs_address
    closed = threading.Event()
    thread = threading.Thread(target=_watch, args=(address, folder, closed), daemon=True, name="distattn-ray-head")
    thread.start()
    try:
        yield
    finally:
        closed.set()


def _watch(address: str, folder: object, closed: threading.Event) -> None:
    missed = 0
    while not closed.wait(_LOOK_SECONDS):
        missed = 0 if _answers(address) else missed + 1
        if missed == _LOOKS:
            print_message(
                f"the head of the Ray cluster at {address} does not answer any more. Ranks train on while their nodes live, but "
                f"no report is written. Once the cluster has a head again, {resume_command(folder)} ends them, continues the run "
                "and reports (--ray.address=HOST:PORT if the head is elsewhere)."
            )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
