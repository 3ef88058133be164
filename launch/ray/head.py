"""A message when the head of a Ray cluster is lost, with the command that completes the run. Ray ends the launcher later."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from distattn.launch.command_line import print_message

# seconds between two requests, and for an answer; requests in a row without an answer before the head counts as lost
_LOOK_SECONDS, _ANSWER_SECONDS, _LOOKS = 2.0, 2.0, 5


def resume_command(folder: object) -> str:
    """Return the command that continues the run, or the sweep, of a folder."""
    return f"python -m distattn.launch.ray.attempts {folder}"


@contextmanager
def watch_head(folder: object) -> Iterator[None]:
    """Watch the head of this process's cluster during the context, and print once if it is lost. folder: of a run or sweep."""
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
