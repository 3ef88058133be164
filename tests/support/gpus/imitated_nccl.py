"""A backend with NCCL's rules for tests, over queues between threads of one process or over gloo between processes.

It follows rules of NCCL that gloo does not have. The first call on a communicator blocks until all its ranks have made
one. The first message from one rank to another connects them, which blocks the host, without a time-out, until both
have reached it. Tensors on another device are refused. Grouped messages are one call. Calls run in order, and only once
both ends have reached them. Sent tensors are read at the wait, and received tensors are NaN until then.

If ranks would wait for each other forever, a Hang names both. A shutdown waits for calls in flight and for the other
ranks, and no call may follow it. A communicator that is deleted without a shutdown or abort prints a warning.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import defaultdict
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """A stand-in for a process group. Transports only ask whether it still exists."""


GROUP = Group()


class Hang(RuntimeError):
    """Raised instead of waiting forever."""


class QueueWire:
    """Queues between threads. Rank r uses `end(r)`."""

    def __init__(self, seconds: float = 60.0):
        self.seconds = seconds
        self._queues: dict[tuple[int, int, str], queue.SimpleQueue] = defaultdict(queue.SimpleQueue)
        self._lock = threading.Lock()

    def end(self, rank: int) -> QueueWire.End:
        return QueueWire.End(self, rank)

    def queue(self, *name: Any) -> queue.SimpleQueue:
        with self._lock:
            return self._queues[name]

    class End(NamedTuple):
        wire: QueueWire
        rank: int

        def connect(self, src: int, dst: int) -> None:
            self.wire.queue(src, dst, self.rank, "connect").put(None)

        def has_connected(self, src: int, dst: int, rank: int) -> bool:
            return not self.wire.queue(src, dst, rank, "connect").empty()

        @property
        def seconds(self) -> float:
            return self.wire.seconds

        def put(self, peer: int, kind: str, data: Tensor) -> None:
            self.wire.queue(self.rank, peer, kind).put(data)

        def take(self, peer: int, kind: str) -> Tensor:
            try:
                return self.wire.queue(peer, self.rank, kind).get(timeout=self.wire.seconds)
            except queue.Empty:
                raise TimeoutError from None


class GlooWire:
    """Messages over gloo between processes."""

    KINDS = ("here", "data", "taken", "end")

    def __init__(self, gloo: Any, store: dist.Store, seconds: float = 60.0):
        self._gloo, self._store, self._kept, self.seconds = gloo, store, [], seconds
        gloo._set_default_timeout(timedelta(seconds=seconds))

    def connect(self, src: int, dst: int) -> None:
        self._store.set(f"connect/{src}/{dst}/{self._gloo.rank()}", "1")

    def has_connected(self, src: int, dst: int, rank: int) -> bool:
        return self._store.check([f"connect/{src}/{dst}/{rank}"])

    def put(self, peer: int, kind: str, data: Tensor) -> None:
        tag = 2 * self.KINDS.index(kind)
        self._kept = [pair for pair in self._kept if not pair[0].is_completed()]
        for part, at in ((torch.tensor([data.numel()]), tag), (data, tag + 1)):
            if part.numel():
                self._kept.append((self._gloo.send([part], peer, at), part))

    def take(self, peer: int, kind: str) -> Tensor:
        tag, size = 2 * self.KINDS.index(kind), torch.zeros(1, dtype=torch.int64)
        try:
            self._gloo.recv([size], peer, tag).wait()
            data = torch.empty(int(size), dtype=torch.uint8)
            if data.numel():
                self._gloo.recv([data], peer, tag + 1).wait()
        except RuntimeError as error:
            raise TimeoutError(str(error)) from None
        return data


class ImitatedNccl:
    """One rank's side of a communicator, with the methods of `torch.distributed`'s backends that distattn calls."""

    supports_coalescing = True

    def __init__(self, wire: Any, rank: int, ranks: int, device: str = "cpu", blocks: bool = True):
        """Create the side of `rank`. blocks: True if a wait returns only after the messages have arrived, False if it
        returns immediately.
        """
        self._blocks = blocks
        self._wire, self._rank, self._ranks, self._device = wire, rank, ranks, torch.device(device)
        self._has_called, self._is_aborted, self._is_shut = False, False, False
        # (source, destination) of all messages that this rank has sent or received
        self._connected: set[tuple[int, int]] = set()
        self._group: _Call | None = None
        # calls that have not been run, oldest first
        self._stream: list[_Call] = []
        self._lock = threading.RLock()
        self._end_lock = threading.Lock()

    def size(self) -> int:
        return self._ranks

    def name(self) -> str:
        return "nccl"

    def allreduce(self, tensors: list[Tensor]) -> _Call:
        """Open the communicator. Nothing is summed, because distattn uses this call only to open communicators."""
        self._check(*tensors)
        self._first_call()
        return _Call(self, [], [])

    def _start_coalescing(self) -> None:
        assert self._group is None, "a group of calls inside another"
        self._group = _Call(self, [], [])

    def _end_coalescing(self) -> _Call:
        call, self._group = self._group, None
        assert call is not None and (call.sends or call.receives), "a group of no calls"
        # both ends of every message are in the same group of calls, and no rank sends to itself
        assert self._rank not in {peer for peer, _ in (*call.sends, *call.receives)}
        self._first_call()
        self._connect(call)
        for _, tensor in call.receives:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0x7F)
        self._stream.append(call)
        return call

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> _Call | None:
        return self._add(tensors, peer, "sends")

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> _Call | None:
        return self._add(tensors, peer, "receives")

    def _add(self, tensors: list[Tensor], peer: int, kind: str) -> _Call | None:
        self._check(*tensors)
        # outside a group, each message is its own call
        alone = self._group is None
        if alone:
            self._start_coalescing()
        getattr(self._group, kind).append((peer, tensors[0]))
        return self._end_coalescing() if alone else None

    def _check(self, *tensors: Tensor) -> None:
        if self._is_shut:
            raise RuntimeError("NCCL communicator was used after its shutdown")
        for tensor in tensors:
            if tensor.device != self._device:
                raise RuntimeError(f"a tensor on {tensor.device}, the communicator is on {self._device}")
            assert tensor.is_contiguous(), "NCCL takes contiguous tensors only"

    def _first_call(self) -> None:
        if self._has_called:
            return
        self._has_called = True
        self._meet("here", "first call of a communicator")

    def _meet(self, kind: str, action: str) -> None:
        """Wait until all ranks have reached this call."""
        others = [rank for rank in range(self._ranks) if rank != self._rank]
        for rank in others:
            self._wire.put(rank, kind, torch.zeros(1, dtype=torch.uint8))
        for rank in others:
            try:
                self._wire.take(rank, kind)
            except TimeoutError:
                raise Hang(f"rank {self._rank}'s {action} waits for a call of rank {rank}") from None

    def _connect(self, call: _Call) -> None:
        """Wait on the host for every peer that a message of the call goes to, or comes from, for the first time."""
        sent = {(self._rank, peer): peer for peer, _ in call.sends}
        received = {(peer, self._rank): peer for peer, _ in call.receives}
        new = {pair: peer for pair, peer in (sent | received).items() if pair not in self._connected}
        for src, dst in new:
            self._wire.connect(src, dst)
        ends = time.monotonic() + self._wire.seconds
        for (src, dst), peer in new.items():
            while not self._wire.has_connected(src, dst, peer):
                if self._is_aborted:
                    raise RuntimeError("NCCL communicator was aborted on the host's side")
                if time.monotonic() > ends:
                    raise Hang(f"rank {self._rank}'s first message with rank {peer} waits on the host for rank {peer}")
                time.sleep(0.005)
        self._connected |= set(new)

    def shutdown(self) -> None:
        """Wait for calls in flight and for the other ranks' shutdown. A concurrent `abort` waits until this method
        returns, since both take the same lock.
        """
        with self._end_lock:
            if self._stream:
                self.work_off(self._stream[-1])
            if self._has_called:
                self._meet("end", "shutdown")
            self._is_shut = True

    def __del__(self) -> None:
        # warn and abort, as PyTorch's destructor does
        if not (self._is_shut or self._is_aborted):
            os.write(
                2, b"WARNING: destroy_process_group() was not called before program exit, which can leak resources.\n"
            )
            self.abort()

    def abort(self) -> None:
        """End all calls in flight, so that threads waiting for them continue."""
        with self._end_lock:
            self._is_aborted = True
            self._stream.clear()

    def work_off(self, last: _Call) -> None:
        """Run all calls up to and including `last`, in order."""
        with self._lock:
            while last in self._stream:
                self._stream[0].run()
                self._stream.pop(0)


class _Call:
    """A group of messages that form one call. It is also the work object to wait for."""

    def __init__(self, communicator: ImitatedNccl, sends: list, receives: list):
        self._communicator, self.sends, self.receives = communicator, sends, receives

    def wait(self) -> bool:
        if self._communicator._blocks:
            self._communicator.work_off(self)
        else:
            threading.Thread(target=self._communicator.work_off, args=(self,), daemon=True).start()
        return True

    def is_completed(self) -> bool:
        return self not in self._communicator._stream

    def run(self) -> None:
        wire, rank = self._communicator._wire, self._communicator._rank
        for peer, tensor in self.sends:
            wire.put(peer, "data", tensor.detach().clone().view(-1).view(torch.uint8))
        for peer, tensor in self.receives:
            data = self._taken(wire, rank, peer, "data")
            if data.numel() != tensor.nbytes:
                raise Hang(f"rank {rank} receives {tensor.nbytes} bytes from rank {peer}, which sends {data.numel()}")
            tensor.view(-1).view(torch.uint8).copy_(data)
            wire.put(peer, "taken", torch.zeros(1, dtype=torch.uint8))
        # a send completes once the receiver has received the message
        for peer, _ in self.sends:
            self._taken(wire, rank, peer, "taken")

    def _taken(self, wire: Any, rank: int, peer: int, kind: str) -> Tensor:
        try:
            return wire.take(peer, kind)
        except TimeoutError:
            event = f"a message of rank {peer}" if kind == "data" else f"rank {peer} to receive"
            raise Hang(f"rank {rank} waits for {event}") from None


def imitate_nccl(seconds: float = 60.0, blocks: bool = True) -> None:
    """Replace gloo communicators in this process, from now on, with communicators that follow NCCL's rules."""
    from distattn.parallel.runtime.communication import communicator

    def opened(store: dist.Store, rank: int, members: list[int], timeout: Any, name: str) -> ImitatedNccl:
        gloo = dist.ProcessGroupGloo(store, rank, len(members), timeout)
        return ImitatedNccl(GlooWire(gloo, store, seconds), rank, len(members), blocks=blocks)

    communicator._OPEN["gloo"] = opened


def by_rules(rules: str, work: Any) -> Any:
    """Wrap `work` for `run_on_ranks` so that its communicators follow `rules` ("nccl" or "gloo")."""

    def run(rank: int, *arguments: Any) -> Any:
        if rules == "nccl":
            imitate_nccl()
        return work(rank, *arguments)

    return run
