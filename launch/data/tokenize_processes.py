"""Run the worker processes of `distattn data tokenize`, one shard at a time each, and replace those that die or are stopped."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from distattn.data.files.manifest import Manifest
from distattn.data.tokenizing.tokenize import (
    Progress,
    TokenizeJob,
    finished_manifest,
    finished_parts,
    locked,
    publish,
    remove_parts,
)
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.ir.text_format import print_message
from distattn.supervision.helper_processes import LOOK_SECONDS, MOST_REPLACEMENTS, Helper, describe_exit

_WRAPPER = "distattn.launch.ranks.die_with_launcher"
_WORKER = "distattn.data.tokenizing.tokenize_worker"
# how many seconds a process may stay stopped before it is replaced
_STOPPED_SECONDS = 10.0


class LostProcessError(DistattnError):
    """An error raised when too many processes were lost. Names the last process lost. The command exits with code 1."""

    exit_code = 1


def tokenize(job: TokenizeJob, processes: int, report: Callable[[Progress], None]) -> Manifest:
    """Tokenize all unfinished shards of a job in `processes` processes, and join all shards. Return the manifest.

    report: called with the progress since the last call; the first call reports the progress of an earlier command. If the same
    job has finished before, nothing is done. Raises DistattnError on failure. Finished shards are kept, and the same job resumes
    from them.
    """
    with locked(job) as lock:
        manifest = finished_manifest(job)
        if manifest is None:
            done = finished_parts(job)
            report(_progress_of(job, done))
            waiting = [shard for shard in range(len(job.shards)) if shard not in done]
            try:
                run_workers(job, waiting, processes, lock, report)
                manifest = publish(job, finished_parts(job))
            except DistattnError as error:
                if not any(part.tokens for part in finished_parts(job).values()):
                    raise
                raise type(error)(f"{error} Finished shards are kept: the same command continues from there.") from None
        remove_parts(job)
    return manifest


def run_workers(
    job: TokenizeJob, shards: Sequence[int], processes: int, lock: int, report: Callable[[Progress], None]
) -> None:
    """Tokenize shards in at most `processes` processes. If one fails, end them all and raise DistattnError.

    A process that dies or is stopped is replaced, and the new process starts its shard again, because only completely written
    shards count. After MOST_REPLACEMENTS replacements, the next lost process counts as a failure.
    """
    waiting = deque(shards)
    if not waiting:
        return
    job_file, replaced = job.save(), 0
    workers: list[_Worker] = []
    try:
        with selectors.DefaultSelector() as selector:
            for number in range(min(processes, len(waiting))):
                workers.append(_Worker(number, job_file, lock))
                selector.register(workers[-1].messages, selectors.EVENT_READ, workers[-1])
                workers[-1].give(waiting)
            while selector.get_map():
                # a stopped process sends no messages, so look for stopped processes here
                for worker in workers:
                    worker.kill_if_stopped()
                for key, _ in selector.select(LOOK_SECONDS):
                    worker = key.data
                    for message in worker.read():
                        if "progress" in message:
                            report(worker.advance(Progress(*message["progress"])))
                        elif "done" in message:
                            worker.give(waiting)
                        else:
                            raise (DamagedDataError if message["damaged"] else DistattnError)(message["error"])
                    if worker.ended:
                        selector.unregister(worker.messages)
                        if not (lost := worker.lost(job)):
                            continue
                        # do not replace a process that ended by itself: a new process would end for the same reason
                        if replaced == MOST_REPLACEMENTS or not worker.was_killed:
                            raise LostProcessError(f"{lost}; the others were stopped.{worker.hint}")
                        replaced += 1
                        print_message(f"{lost}; another process will redo it.")
                        report(worker.replace())
                        selector.register(worker.messages, selectors.EVENT_READ, worker)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process and its replacements. shard: the shard it works on, or None. ended: True once it has sent its last message."""

    def __init__(self, number: int, job_file: str, lock: int):
        self.number = number
        self.shard: int | None = None
        self._command = [sys.executable, "-m", _WRAPPER, str(os.getpid()), _WORKER, job_file]
        self._lock = lock
        self._start()

    def _start(self) -> None:
        # the processes share the cores, so each of them tokenizes in a single thread
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, pass_fds=[self._lock]
        )
        assert self._process.stdin and self._process.stdout
        self._orders, self.messages = self._process.stdin, self._process.stdout
        self._helper, self._looked = Helper(f"process {self.number}", self._process.pid), 0.0
        # progress in the current shard
        self._progress = Progress()
        self._rest, self._fault, self.ended = b"", "", False

    def give(self, waiting: deque[int]) -> None:
        """Give the process the next shard, or let it end if no shard is waiting."""
        self.shard = waiting.popleft() if waiting else None
        self._progress = Progress()
        self._order()

    def _order(self) -> None:
        # ignore a dead process here: the caller notices it, because its messages end
        with contextlib.suppress(BrokenPipeError):
            if self.shard is None:
                self._orders.close()
            else:
                self._orders.write(f"{self.shard}\n".encode())
                self._orders.flush()

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the messages that have arrived."""
        content = os.read(self.messages.fileno(), 1 << 16)
        self.ended = not content
        *lines, self._rest = (self._rest + content).split(b"\n")
        for line in lines:
            yield json.loads(line)

    def advance(self, progress: Progress) -> Progress:
        """Add `progress` to that of the current shard. Return `progress`."""
        self._progress = self._progress.plus(progress)
        return progress

    def lost(self, job: TokenizeJob) -> str:
        """Return a clause that says how the process ended in the middle of a shard, or "" if it had nothing left to do."""
        code = self._process.wait()
        if self.shard is None:
            return ""
        how = self._fault or describe_exit(code)
        return (
            f"tokenize: process {self.number} ({self._process.pid}) {how} while it worked on {job.describe(self.shard)}"
        )

    @property
    def was_killed(self) -> bool:
        """True if the process was killed by a signal."""
        return self._process.returncode < 0

    @property
    def hint(self) -> str:
        """A sentence about what to do if the process was killed, or "" if the cause is not known."""
        # when memory runs out, Linux kills a process with SIGKILL
        memory_ran_out = not self._fault and self._process.returncode == -signal.SIGKILL
        return " If memory ran out, use fewer --processes." if memory_ran_out else ""

    def replace(self) -> Progress:
        """Start a new process on the shard of the process that ended. Return the lost progress as negative numbers."""
        lost = Progress(*(-done for done in self._progress))
        self._close_pipes()
        self._start()
        self._order()
        return lost

    def kill_if_stopped(self) -> None:
        """Kill the process if it has been stopped for _STOPPED_SECONDS. Its messages then end."""
        now = time.monotonic()
        if now < self._looked + LOOK_SECONDS:
            return
        self._looked = now
        fault = self._helper.fault(_STOPPED_SECONDS)
        # if the process has ended by itself, its exit code explains why
        if fault and not self._fault and not self._helper.end():
            self._fault = fault
            self._process.kill()

    def stop(self) -> None:
        """Kill the process, regardless of its state, and close its pipes."""
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def _close_pipes(self) -> None:
        self.messages.close()
        with contextlib.suppress(BrokenPipeError):
            self._orders.close()


def _progress_of(job: TokenizeJob, parts: dict[int, Any]) -> Progress:
    """Return the total progress of the finished shards."""
    total = Progress()
    for shard, part in parts.items():
        stored = sum(piece.bytes for piece in job.shards[shard])
        total = total.plus(Progress(stored, sum(part.documents), part.tokens, part.text_bytes))
    return total
