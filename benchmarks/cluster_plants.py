"""Planted communication faults, which the checks of `check_cluster` and the driver must name.

    python -m torch.distributed.run --standalone --nproc-per-node gpu benchmarks/cluster_plants.py
    python -m torch.distributed.run --standalone --nproc-per-node gpu benchmarks/cluster_plants.py --stop

The faults: one rank has a different plan; a message of attention or of a recurrent layer is altered in flight; the
memory of a message is reused before the wait. With --stop, in a separate run, the last rank stops. The others must
name it and the message they are waiting for, and exit without an error. Each fault is printed as a line, and the exit
code is 1 if any fault is not found. The benchmark runs over NCCL on several GPUs, otherwise over gloo
(TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from check_cluster import Job, check, layer
from check_recurrences import Case as RecurrenceCase
from findings import Findings
from gpu_executor import HEADS, KV_HEADS
from harness import Contestant, compare
from recurrence import RecurrencePlan
from torch import Tensor

import distattn as da
from distattn.parallel.runtime.communication.transport import Packet, PendingMessages, Transport

TOKENS = 16384
# so few tokens that the received state contributes much to a rank's results
STATE_TOKENS = 2048
# the driver's timeout in seconds with --stop; every step takes far less, even the first, which compiles
TIMEOUT = 30.0
TIMEOUT_ON_CPU = 8.0
# seconds in which a verdict reaches every rank
SOON = 3.0
# GPU clock cycles, about 0.05 s: far longer than the host takes to continue
LONG = 85_000_000


def main() -> int:
    """Plant all faults and print one line for each. Return exit code 1 if any fault is not found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stop", action="store_true", help="only the rank that stops")
    parser.add_argument("--timeout", type=float, help="seconds after which a rank that does not answer is named")
    parser.add_argument("--findings", type=Path, help="where rank 0 keeps them, as JSON lines")
    arguments = parser.parse_args()
    if arguments.stop:
        return rank_stops(arguments.timeout, arguments.findings)
    job = Job.join(TOKENS)
    findings = Findings(arguments.findings, speaks=job.rank == 0)
    if job.ranks == 1:
        findings.left_out("planted faults of communication", "one rank sends no messages")
    else:
        other_plan(job, findings)
        for strategy in ("ring", "ulysses"):
            fault = f"a message of {strategy} is altered on its way"
            found_by_parity(fault, attention_by(strategy, job), lambda t: Altered(t, job), findings)
        fault = "memory that is being sent is used again before the wait"
        found_by_parity(fault, attention_by("ring", job), lambda t: Reused(t, job), findings)
        fault = "a state of a recurrent layer is altered on its way"
        found_by_parity(fault, recurrence(job), lambda t: Altered(t, job), findings)
    dist.destroy_process_group()
    return findings.ended()


def other_plan(job: Job, findings: Findings) -> None:
    """Give the last rank a different strategy. Every rank must reject the plan and name that rank."""
    odd = job.ranks - 1
    plan = job.case.plan("allgather" if job.rank == odd else "ring")
    refusal_text = ""
    try:
        da.prepare(plan, kernel="triton", device=job.device)
    except da.PlanError as refusal:
        refusal_text = str(refusal)
    refusals: list[Any] = [None] * job.ranks
    dist.all_gather_object(refusals, refusal_text)
    named = all(f"rank {odd} plans a different call" in text for text in refusals)
    findings.planted("one rank has another plan", refusals[0] if named else "")


class Parity(NamedTuple):
    """A strategy's name, a function that returns its computation for a transport, and the check of the results."""

    strategy: str
    contestant: Callable[[Callable[[Transport], Transport]], Contestant]
    check: Callable[[Any], str]


def attention_by(strategy: str, job: Job) -> Parity:
    """Return a check that compares a strategy's attention, forward and backward, with one call on the entire axis."""
    plan = job.case.plan(strategy)
    return Parity(strategy, lambda wrap: lambda: layer(plan, job, wrap), lambda result: check(result, job.wanted))


def recurrence(job: Job) -> Parity:
    """Return a check that compares Gated DeltaNet, whose states are passed from rank to rank, with fp64."""
    tokens, heads = (STATE_TOKENS, 32) if job.cuda else (128, 4)
    case = RecurrenceCase.of("gated_delta_rule", [tokens], heads, job.device)
    return Parity("scan", lambda wrap: case.by(RecurrencePlan("contiguous", schedule="sequential"), wrap), case.check)


def found_by_parity(fault: str, parity: Parity, wrap: Callable[[Transport], Transport], findings: Findings) -> None:
    """Check that comparing outputs and gradients reports the strategy as wrong and names the affected ranks."""
    strategy = parity.strategy

    def judged(wrapped: Callable[[Transport], Transport]) -> str:
        (cell,) = compare(
            f"{dist.get_world_size()} ranks", {strategy: parity.contestant(wrapped)}, parity.check, repeats=0
        )
        return "" if cell.status == "ok" else f"{strategy} is {cell.status}: {cell.note}"

    before = judged(lambda transport: transport)
    findings.check(f"{strategy} before anything is planted", before)
    text = judged(wrap)
    findings.planted(fault, text if not before and f"{strategy} is wrong: rank " in text else "")


class Altered:
    """A transport that flips the sign of an eighth of the elements in rank 0's first message."""

    def __init__(self, transport: Transport, job: Job):
        self.transport, self.armed = transport, job.rank == 0

    def exchange(
        self, sends: list[Packet], receives: list[Packet], collective: bool, where: str = ""
    ) -> PendingMessages:
        if sends and self.armed:
            self.armed = False
            sends = [sends[0]._replace(tensor=altered(sends[0].tensor)), *sends[1:]]
        return self.transport.exchange(sends, receives, collective, where)


def altered(x: Tensor) -> Tensor:
    """Return a copy with the first eighth negated."""
    copy = x.contiguous().clone()
    copy.view(-1)[: -(-copy.numel() // 8)].neg_()
    return copy


class Reused:
    """A transport in which rank 0 overwrites the tensors that it sends before it waits for the sends.

    The tensors are read late, so that the fault shows every time. On a GPU, the messages are queued on a stream that
    sleeps. On a CPU, the tensors are read when the receiver posts its receives, which it does only after a message from
    rank 0 in the default group.
    """

    def __init__(self, transport: Transport, job: Job):
        self.transport, self.job = transport, job
        self.side = torch.cuda.Stream() if job.cuda else None

    def exchange(
        self, sends: list[Packet], receives: list[Packet], collective: bool, where: str = ""
    ) -> PendingMessages:
        if self.job.rank == 0 and sends:
            return self._overwriting(sends, receives, collective, where)
        if not self.job.cuda and any(packet.peer == 0 for packet in receives):
            dist.recv(torch.empty(1), 0)
        return self.transport.exchange(sends, receives, collective, where)

    def _overwriting(
        self, sends: list[Packet], receives: list[Packet], collective: bool, where: str
    ) -> PendingMessages:
        sends = [packet._replace(tensor=packet.tensor.contiguous().clone()) for packet in sends]
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            if self.side is not None:
                torch.cuda._sleep(LONG)
            pending = self.transport.exchange(sends, receives, collective, where)
        for packet in sends:
            packet.tensor.zero_()
        if self.side is None:
            for peer in sorted({packet.peer for packet in sends}):
                dist.send(torch.ones(1), peer)
        return pending


def rank_stops(timeout: float | None, path: Path | None) -> int:
    """Stop the last rank in a loop over attention. All others must name that rank and the missing message, and exit the loop.

    Return the exit code.
    """
    cuda = torch.cuda.is_available()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    findings = Findings(path, speaks=rank == 0)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if ranks == 1:
        findings.left_out("a rank stops", "there is no other one to name it")
        dist.destroy_process_group()
        return findings.ended()
    timeout, lost = timeout or (TIMEOUT if cuda else TIMEOUT_ON_CPU), ranks - 1
    processes: list[Any] = [None] * ranks
    dist.all_gather_object(processes, os.getpid())
    # disable the log: each rank would log the error that is gathered below
    logging.getLogger("distattn").disabled = True
    began = time.monotonic()
    error = error_of_loop(rank == lost, timeout, device)
    if rank == 0:
        # let the stopped rank continue: it finds that the others have given up on it, and ends like them
        os.kill(processes[lost], signal.SIGCONT)
    errors: list[Any] = [None] * ranks
    # gather over gloo, which is independent of the device's messages
    dist.all_gather_object(errors, error)
    named = all(f"rank {lost}" in text for text in errors)
    detailed = next((text for text in errors[:-1] if "KV" in text and "in step" in text), "")
    findings.planted("a rank stops", detailed if named else "")
    findings.print_line(f"all {ranks} ranks have left the loop, {time.monotonic() - began:.0f} s after they began it")
    dist.destroy_process_group()
    return findings.ended()


def error_of_loop(stops: bool, timeout: float, device: torch.device) -> str:
    """Return the error that ends a loop over attention, or an empty string. stops: True if this rank stops in the loop."""
    cuda = device.type == "cuda"
    tokens, dim, dtype = (4096, 128, torch.bfloat16) if cuda else (256, 32, torch.float32)
    settings = dict(strategy="ring", layout="zigzag", kernel="triton" if cuda else "cpu", timeout=timeout)
    try:
        with da.ContextParallel(**settings) as cp:
            batch = cp.shard({"input_ids": torch.zeros(1, tokens, dtype=torch.int64), "document_lengths": [tokens]})
            count = batch["input_ids"].shape[1]
            q, k, v = (
                torch.ones(count, heads, dim, dtype=dtype, device=device) for heads in (HEADS, KV_HEADS, KV_HEADS)
            )

            for _ in range(2):
                batch["context_parallel"].attention(q, k, v)
            if cuda:
                torch.cuda.synchronize()
            # once this returns, all ranks have reached this point and no message is in flight
            dist.all_reduce(torch.zeros(1))
            if stops:
                os.kill(os.getpid(), signal.SIGSTOP)
                # wait until this rank knows that the others have given up on it: messages to them would never complete
                time.sleep(SOON)
            ends = time.monotonic() + 4 * timeout
            while time.monotonic() < ends:
                batch["context_parallel"].attention(q, k, v)
                # outputs are never read, so kernels queue up behind the missing message
                time.sleep(1)
    except da.LostRankError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.exit(main())
