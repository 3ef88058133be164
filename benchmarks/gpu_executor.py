"""The complete executor on one GPU: all ranks of a plan in lockstep, each with its own streams.

    python benchmarks/gpu_executor.py [--kernel triton|gluon] [--ranks 8] [--tokens 32768] [--delay 200] [--trace FILE.json]

Moves are device copies on a stream of the receiver. They start `delay` microseconds after both ends are ready, as over
a slow link. First, correctness is checked: the outputs and gradients of every strategy, with NaN in uninitialized
memory, are compared with one call of the Triton kernel on the entire axis, and any synchronization between host and device
is an error. Then the host time per rank and step is measured (budget: 150 microseconds), and from a trace the share of
copying that overlaps with kernels. Without a GPU (TRITON_INTERPRET=1) only correctness is checked, on a short axis.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from findings import Findings
from torch import Tensor

import distattn as da
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.registry import kernel_preparer, load_kernel
from distattn.kernels.spec import KernelRequirements, ScoreMod
from distattn.kernels.triton import attention as triton_attention
from distattn.kernels.triton.launch import schedule_to_device
from distattn.ops.executable import kernel_requirements
from distattn.parallel.make_plan import STRATEGIES
from distattn.parallel.runtime.communication.transport import Packet
from distattn.parallel.runtime.execution import execute
from distattn.parallel.runtime.lowering.lower import lower
from distattn.parallel.runtime.lowering.upload_program import copy_program_to_device
from distattn.parallel.runtime.program import Program

BUDGET = 150
# the names of our kernels in a trace; all other kernels copy or merge
KERNELS = ("forward_kernel", "dkdv_kernel", "dq_kernel", "backward_kernel", "row_numbers_kernel", "sum_parts_kernel")
# the allowed error relative to the one-shot result (Frobenius norm): fp32 sums of bf16 (fp16) products in a different order
TOLERANCE = 5e-3
HEADS, KV_HEADS = 16, 4


class Streams:
    """A compute stream and a copy stream for every rank, or None for each if there is no GPU."""

    def __init__(self, ranks: int, device: torch.device, delay: float):
        self.cuda = device.type == "cuda"
        self.compute = [torch.cuda.Stream() if self.cuda else None for _ in range(ranks)]
        self.copy = [torch.cuda.Stream() if self.cuda else None for _ in range(ranks)]
        # the delay in clock cycles, at about 1.7 GHz
        self.cycles = int(delay * 1700)

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(stream) if self.cuda else contextlib.nullcontext()

    def event(self) -> Any:
        """Record and return an event on the current stream. Return None if there is no GPU."""
        return torch.cuda.current_stream().record_event() if self.cuda else None


class DelayedCopies:
    """Moves between the ranks in one process, as copies that start late. `transport(rank)` returns the executor's transport."""

    def __init__(self, streams: Streams):
        self.streams = streams
        self.posted: dict[tuple[int, int, bool], deque[tuple[Tensor, Any, list[Any]]]] = defaultdict(deque)

    def transport(self, rank: int) -> Mailbox:
        return Mailbox(self, rank)

    def post(self, src: int, dst: int, sends: bool, tensor: Tensor, done: list[Any]) -> None:
        """Post one end of a move, which starts once both ends have been posted. Append the event of its completion to
        `done`."""
        ready = self.streams.event()
        waiting = self.posted[src, dst, not sends]
        if not waiting:
            self.posted[src, dst, sends].append((tensor, ready, done))
            return
        other, other_ready, other_done = waiting.popleft()
        source, target = (tensor, other) if sends else (other, tensor)
        with self.streams.on(self.streams.copy[dst]):
            if self.streams.cuda:
                stream = torch.cuda.current_stream()
                stream.wait_event(ready)
                stream.wait_event(other_ready)
                torch.cuda._sleep(self.streams.cycles)
            target.copy_(source)
            finished = self.streams.event()
        done.append(finished)
        other_done.append(finished)


class Mailbox:
    """One rank's transport. Tensors in flight are kept alive until the wait."""

    def __init__(self, hub: DelayedCopies, rank: int):
        self.hub, self.rank = hub, rank

    def exchange(
        self, sends: list[Packet], receives: list[Packet], collective: bool, where: str = ""
    ) -> Mailbox.Flight:
        done: list[Any] = []
        for packet in sends:
            self.hub.post(self.rank, packet.peer, True, packet.tensor, done)
        for packet in receives:
            self.hub.post(packet.peer, self.rank, False, packet.tensor, done)
        return Mailbox.Flight(self.hub.streams, done, (sends, receives))

    class Flight:
        def __init__(self, streams: Streams, done: list[Any], alive: Any):
            self.streams, self.done, self.alive = streams, done, alive

        def wait(self) -> None:
            if self.streams.cuda:
                for event in self.done:
                    torch.cuda.current_stream().wait_event(event)


def main() -> int:
    """Check correctness and measure host time and overlap of every strategy. Return exit code 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=("triton", "gluon"), default="triton")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--delay", type=float, default=200.0, help="microseconds before a move begins")
    parser.add_argument("--trace", type=Path, help="where the last strategy's trace goes")
    parser.add_argument("--findings", type=Path, help="where they are kept, as JSON lines")
    arguments = parser.parse_args()
    findings = Findings(arguments.findings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    tokens, dim = (arguments.tokens, 128) if cuda else (128, 32)
    demand = KernelRequirements(torch.bfloat16 if cuda else torch.float16, dim, dim, device)
    if why_not := load_kernel(arguments.kernel).unsupported_reason(demand):
        findings.left_out(f"executor with {arguments.kernel}", why_not)
        return findings.ended()
    case = Case.of(tokens, dim, arguments.ranks, device)
    wanted = at_once(case.mask, case.x)
    streams = Streams(arguments.ranks, device, arguments.delay)
    for strategy in STRATEGIES:
        layer = Layer(case.plan(strategy), case.x, streams, arguments.kernel)
        with poisoned():
            errors = {name: far(got, wanted[name]) for name, got in layer.run().items()}
        wrong = too_far(errors)
        findings.check(f"executor with {arguments.kernel}, {strategy}", wrong)
        line = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
        if cuda:
            line += f"  host {layer.host_microseconds():.0f} us per rank and step (budget {BUDGET})"
            line += f"  {layer.overlap(arguments.trace):.0%} of copying under kernels"
        findings.print_line(f"{strategy:12s} {line}{'  <- wrong' * bool(wrong)}")
    return findings.ended()


class Case(NamedTuple):
    """Documents of different lengths in a zigzag layout, with random tensors for the entire axis."""

    mask: da.Mask
    layout: da.Layout
    x: dict[str, Tensor]

    @staticmethod
    def of(tokens: int, dim: int, ranks: int, device: torch.device) -> Case:
        """Return a case: in bfloat16 on a GPU, and in float16 on a CPU."""
        lengths = [tokens // 2, tokens // 4, tokens // 8, tokens // 8]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
        layout = da.Layout.zigzag(lengths, ranks)
        return Case(da.Mask.documents(lengths), layout, random_tensors(tokens, dim, dtype, device))

    def plan(self, strategy: str) -> da.Plan:
        """Return a strategy's plan for the case. Raise DistattnError if the strategy cannot plan it."""
        q = self.x["q"]
        shape = dict(heads=HEADS, kv_heads=KV_HEADS, head_dim=q.shape[2], dtype=str(q.dtype)[6:])
        return da.make_plan(self.mask, self.layout, strategy=strategy, **shape)


class Layer:
    """One attention call on all ranks, forward and backward."""

    def __init__(self, plan: da.Plan, x: dict[str, Tensor], streams: Streams, kernel: str):
        device = x["q"].device
        self.layout, self.streams, self.dtype = plan.call.layout, streams, x["q"].dtype
        self.ranks = range(plan.call.ranks)
        make = kernel_preparer(kernel, kernel_requirements(plan.call, device))
        self.kernel = load_kernel(kernel)
        finishes = getattr(self.kernel, "FINISHES", ())
        proof = da.verify(plan)
        self.programs: list[Program] = [
            copy_program_to_device(lower(plan, rank, make, proof, finishes=finishes), device) for rank in self.ranks
        ]
        self.score = ScoreMod(plan.call.head_dim**-0.5)
        self.local = [{name: self.layout.shard(part, rank) for name, part in x.items()} for rank in self.ranks]
        self.steps = sum(len(program.forward) + len(program.backward) for program in self.programs)

    def run(self) -> dict[str, Tensor]:
        """Run the call. Return o, dq, dk and dv for the entire axis."""
        shards = self.shards()
        return {name: self.layout.unshard([shard[name] for shard in shards]) for name in ("o", "dq", "dk", "dv")}

    def shards(self) -> list[dict[str, Tensor]]:
        """Run the call on all ranks. Return each rank's o, dq, dk and dv, without waiting for the device."""
        if self.streams.cuda:
            # the inputs were created on the current stream
            for stream in self.streams.compute:
                stream.wait_stream(torch.cuda.current_stream())
            torch.cuda.set_sync_debug_mode("error")
        try:
            hub = DelayedCopies(self.streams)
            done = self._together(self._forward(rank, hub.transport(rank)) for rank in self.ranks)
            hub = DelayedCopies(self.streams)
            grads = self._together(self._backward(rank, hub.transport(rank), done[rank]) for rank in self.ranks)
        finally:
            if self.streams.cuda:
                torch.cuda.set_sync_debug_mode("default")
                for stream in (*self.streams.compute, *self.streams.copy):
                    torch.cuda.current_stream().wait_stream(stream)
        return [{"o": o, "dq": dq, "dk": dk, "dv": dv} for (o, *_), (dq, dk, dv) in zip(done, grads, strict=True)]

    def _together(self, runs: Iterator[Generator[None, None, Any]]) -> list[Any]:
        return execute.run_in_lock_step(
            self._on_stream(run, self.streams.compute[rank]) for rank, run in enumerate(runs)
        )

    def _on_stream(self, run: Generator[None, None, Any], stream: Any) -> Generator[None, None, Any]:
        while True:
            with self.streams.on(stream):
                try:
                    next(run)
                except StopIteration as stop:
                    return stop.value
            yield

    def _forward(self, rank: int, transport: Mailbox) -> Generator[None, None, Any]:
        x = self.local[rank]
        run = execute.forward(self.programs[rank], transport, self.kernel, x["q"], x["k"], x["v"], self.score)
        o, lse, kept = yield from run
        return o.to(self.dtype), lse, kept

    def _backward(self, rank: int, transport: Mailbox, done: tuple[Tensor, ...]) -> Generator[None, None, Any]:
        x, (o, lse, kept) = self.local[rank], done
        delta = (x["do"].float() * o.float()).sum(-1)
        inputs = (x["do"], x["q"], x["k"], x["v"], lse, delta, kept, self.score)
        return (yield from execute.backward(self.programs[rank], transport, self.kernel, *inputs))

    def host_microseconds(self) -> float:
        """Return the host microseconds per rank and step, in the executor and everything it calls, while the device
        lags far behind."""
        best = float("inf")
        for _ in range(5):
            torch.cuda.synchronize()
            began = time.perf_counter()
            self.shards()
            best = min(best, time.perf_counter() - began)
        torch.cuda.synchronize()
        return best * 1e6 / self.steps

    def overlap(self, keep: Path | None) -> float:
        """Return the fraction of copying time during which an attention kernel of any rank ran, from the profiler's
        trace.

        keep: where to save the trace, or None.
        """
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            self.shards()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = keep or Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        spans = {True: [], False: []}
        for event in events:
            if event.get("cat") in ("kernel", "gpu_memcpy") and "spin" not in event["name"]:
                spans[event["name"] in KERNELS].append((event["ts"], event["ts"] + event["dur"]))
        kernels, copies = merged(spans[True]), merged(spans[False])
        common = sum(max(0.0, min(b, d) - max(a, c)) for a, b in copies for c, d in kernels)
        return common / max(sum(b - a for a, b in copies), 1e-9)


def random_tensors(tokens: int, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Return random q, k, v and do for the entire axis."""
    generator = torch.Generator(device).manual_seed(0)
    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS, "do": HEADS}
    return {
        name: torch.randn(tokens, count, dim, generator=generator, device=device).to(dtype)
        for name, count in heads.items()
    }


def at_once(mask: da.Mask, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return o, dq, dk and dv, computed by one call of the Triton kernel on the entire axis."""
    device, dim = x["q"].device, x["q"].shape[2]
    plan = Case(mask, da.Layout.contiguous([mask.n], 1), x).plan("ring")
    work = kernel_preparer("triton", kernel_requirements(plan.call, device))(
        LaunchMask.from_mask(mask, HEADS, KV_HEADS)
    )
    work, score = schedule_to_device(work, device), ScoreMod(dim**-0.5)
    o, lse = triton_attention.forward(x["q"], x["k"], x["v"], work, score)
    delta = (x["do"].float() * o.to(x["q"].dtype).float()).sum(-1)
    dq, dk, dv = triton_attention.backward(x["do"], x["q"], x["k"], x["v"], lse, delta, work, score)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill all uninitialized memory with NaN while in the block."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def far(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def too_far(errors: dict[str, float]) -> str:
    """Return a message about the largest error if it exceeds the tolerance, or else an empty string."""
    name, error = max(
        errors.items(), key=lambda pair: pair[1] if pair[1] == pair[1] else float("inf"), default=("", 0.0)
    )
    # "not <=" also catches NaN
    return "" if error <= TOLERANCE else f"{name} is off by {error:.1e} (allowed: {TOLERANCE:.0e})"


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Merge overlapping time spans. Return disjoint spans in order."""
    out: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((begin, end))
    return out


if __name__ == "__main__":
    sys.exit(main())
