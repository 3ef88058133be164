"""The processes of `distattn data tokenize`: each works on one shard at a time. A process that dies or stops is replaced."""

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
from distattn.launch.command_line import print_message
from distattn.supervision.helper_processes import LOOK_SECONDS, MOST_REPLACEMENTS, Helper, describe_exit

_WRAPPER = "distattn.launch.ranks.die_with_launcher"
_WORKER = "distattn.data.tokenizing.tokenize_worker"
# seconds for which a process may be stopped
_STOPPED_SECONDS = 10.0


class LostProcessError(DistattnError):
    """Too many processes were lost; the message names the last one. Exit code 1 on the command line."""

    exit_code = 1


def tokenize(job: TokenizeJob, processes: int, report: Callable[[Progress], None]) -> Manifest:
    """Tokenize all unfinished shards of a job in `processes` processes, and join all shards. Return the manifest.

    report: called with the progress since the last call, first with that of an earlier command. If the same job has finished
    before, nothing is done. Raise DistattnError on a failure; finished shards are kept, and the same job continues from them.
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
    """Tokenize shards in at most `processes` processes. Raises DistattnError if one of them fails, after all have ended.

    A process that dies or is stopped is replaced, and the new one begins its shard again: a shard counts once it is written
    completely. After MOST_REPLACEMENTS replacements, the next lost process is a failure.
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
                # a stopped process sends nothing
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
                        # a process that ends by itself has a reason, which would end a new one, too
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
    """A process and its replacements. shard: the one that it works on, or None. ended: whether it has sent its last message."""

    def __init__(self, number: int, job_file: str, lock: int):
        self.number = number
        self.shard: int | None = None
        self._command = [sys.executable, "-m", _WRAPPER, str(os.getpid()), _WORKER, job_file]
        self._lock = lock
        self._start()

    def _start(self) -> None:
        # the processes share the cores, so each tokenizes in one thread
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, pass_fds=[self._lock]
        )
        assert self._process.stdin and self._process.stdout
        self._orders, self.messages = self._process.stdin, self._process.stdout
        self._helper, self._looked = Helper(f"process {self.number}", self._process.pid), 0.0
        # in the current shard
        self._progress = Progress()
        self._rest, self._fault, self.ended = b"", "", False

    def give(self, waiting: deque[int]) -> None:
        """Give it the next shard; if no shard waits, let it end."""
        self.shard = waiting.popleft() if waiting else None
        self._progress = Progress()
        self._order()

    def _order(self) -> None:
        # if it has died, its messages end, and the caller handles that
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
        """Add to the progress in the current shard. Return the progress that was added."""
        self._progress = self._progress.plus(progress)
        return progress

    def lost(self, job: TokenizeJob) -> str:
        """Describe, as a clause, how a process has ended in the middle of a shard; return "" if it had nothing left to do."""
        code = self._process.wait()
        if self.shard is None:
            return ""
        how = self._fault or describe_exit(code)
        return (
            f"tokenize: process {self.number} ({self._process.pid}) {how} while it worked on {job.describe(self.shard)}"
        )

    @property
    def was_killed(self) -> bool:
        """Return whether a signal has ended the process."""
        return self._process.returncode < 0

    @property
    def hint(self) -> str:
        """Return a sentence that says what to do about a process that was killed; "" if that is not known."""
        # when memory runs out, the kernel kills a process with SIGKILL
        memory_ran_out = not self._fault and self._process.returncode == -signal.SIGKILL
        return " If memory ran out, use fewer --processes." if memory_ran_out else ""

    def replace(self) -> Progress:
        """Start another process on the shard of one that has ended. Return the progress that is lost, as negative numbers."""
        lost = Progress(*(-done for done in self._progress))
        self._close_pipes()
        self._start()
        self._order()
        return lost

    def kill_if_stopped(self) -> None:
        """Kill the process if it has been stopped for _STOPPED_SECONDS, which ends its messages."""
        now = time.monotonic()
        if now < self._looked + LOOK_SECONDS:
            return
        self._looked = now
        fault = self._helper.fault(_STOPPED_SECONDS)
        # the exit code explains the end of a process that has ended by itself
        if fault and not self._fault and not self._helper.end():
            self._fault = fault
            self._process.kill()

    def stop(self) -> None:
        """Kill it in any state."""
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def _close_pipes(self) -> None:
        self.messages.close()
        with contextlib.suppress(BrokenPipeError):
            self._orders.close()


def _progress_of(job: TokenizeJob, parts: dict[int, Any]) -> Progress:
    """Return the sum of finished shards."""
    total = Progress()
    for shard, part in parts.items():
        stored = sum(piece.bytes for piece in job.shards[shard])
        total = total.plus(Progress(stored, sum(part.documents), part.tokens, part.text_bytes))
    return total
