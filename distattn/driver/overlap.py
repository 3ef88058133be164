"""Overlap: micro-batches take turns on a rank, so that messages of one travel while another computes (ping-pong execution).

As in Zhuang et al. 2025 (arXiv 2510.18121, section 4.2). Forward, every batch runs on a thread of its own and hands over
whenever its messages have left. Its graph is cut at layers and at attention, so that backward can be driven piece by piece in
the same manner. One runs at a time: there is one order of issue, the same on all ranks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distattn.ir.errors import DistattnError
from distattn.kernels.devices import current_device, has_streams
from distattn.ops.attention import backward_pass, forward_pass
from distattn.ops.current_micro_batch import INTERLEAVED, RECOMPUTING, current_micro_batch
from distattn.ops.executable import Executable
from distattn.parallel.runtime.execute import PausableRun
from distattn.parallel.runtime.transport import Packet, PendingMessages, Transport


class OverlapSchedule:
    """Trains on batches that take turns.

    layers: the modules of `model` that hidden states pass one after another as their first argument, such as
    `model.model.layers` of a Hugging Face decoder, or any list of layers. Each may call attention once or more.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        # arrays and tensors of no dims say that they can be iterated over
        self.layers = list(layers) if isinstance(layers, Iterable) and not hasattr(layers, "ndim") else []
        if not self.layers or not all(isinstance(layer, nn.Module) for layer in self.layers):
            raise DistattnError("an overlap schedule needs a list of at least one layer, each a module.")
        self.spans: list[Span] = []

    def step(self, losses: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Forward and backward of each: functions that return the loss of one batch. Gradients add up in the parameters.

        Under torch.no_grad only forward. Returns the losses, detached.
        """
        self.spans = []
        turns = _Turns(len(losses), self.spans)
        micro_batches = [_MicroBatch(number, turns, self.spans) for number in range(len(losses))]
        hooks = [layer.register_forward_pre_hook(_enter, with_kwargs=True) for layer in self.layers]
        hooks.append(self.layers[-1].register_forward_hook(_leave))
        try:
            sums_of_losses = _forward_together(micro_batches, losses, _current_stream(self.layers))
            if torch.is_grad_enabled():
                _backward_together(micro_batches, sums_of_losses, self.spans)
        finally:
            for hook in hooks:
                hook.remove()
        return [loss.detach() for loss in sums_of_losses]

    def trace(self, rank: int = 0) -> dict[str, Any]:
        """The last step as trace events for ui.perfetto.dev: of each batch when it ran, and when its messages were under way."""
        first = min((span.begin for span in self.spans), default=0.0)
        events: list[dict[str, Any]] = [
            {
                "name": f"{span.what} {span.micro_batch}",
                "ph": "X",
                "pid": rank,
                "tid": 2 * span.micro_batch + (span.what == "moves"),
                "ts": (span.begin - first) * 1e6,
                "dur": (span.end - span.begin) * 1e6,
            }
            for span in self.spans
        ]
        names = {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        return {"traceEvents": [names, *events], "displayTimeUnit": "ms"}


class Span(NamedTuple):
    """What batch `micro_batch` did from `begin` to `end` (seconds): "runs", or has "moves" under way."""

    micro_batch: int
    what: str
    begin: float
    end: float


class _Call(NamedTuple):
    """One attention call of a micro_batch: its inputs, and its output as a leaf of the graph that follows."""

    executable: Executable
    inputs: tuple[Tensor, Tensor, Tensor]
    sink: Tensor | None
    slopes: Tensor | None
    score: tuple[float, float]
    o: Tensor
    lse: Tensor
    kept: Tensor


class _MicroBatch:
    """One batch. cuts: (end of the graph before a layer, the leaf the layer begins with); calls: those of each layer."""

    def __init__(self, number: int, turns: _Turns, spans: list[Span]):
        self.number, self.turns, self.spans = number, turns, spans
        self.cuts: list[tuple[Tensor, Tensor]] = []
        self.calls: list[list[_Call]] = []
        # layers whose forward is repeated in the backward pass (activation checkpointing): their calls, in order
        self.recomputed: list[_Call] | None = None

    def cut(self, hidden: Tensor) -> Tensor:
        """Where a layer begins, or the last one has ended."""
        if self.recomputed is not None or not torch.is_grad_enabled():
            return hidden.detach().requires_grad_() if self.recomputed is not None else hidden
        leaf = hidden.detach().requires_grad_()
        self.cuts.append((hidden, leaf))
        self.calls.append([])
        return leaf

    def attention(
        self,
        executable: Executable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        slopes: Tensor | None,
        scale: float,
        softcap: float,
    ) -> Tensor:
        """Called by `distattn.attention` on this micro_batch's thread."""
        if self.recomputed is not None:
            if not self.recomputed:
                raise DistattnError(
                    "a layer was recomputed that had not been recorded: reentrant activation checkpointing does not take "
                    "turns; use checkpoint(..., use_reentrant=False)."
                )
            return self.recomputed.pop(0).o.detach().requires_grad_()
        if executable.observer is not None and not executable.observer.allows_interleaving:
            raise DistattnError("ranks that only serve do not take turns; use OverlapSchedule without servers.")
        # the current device belongs to the thread, and this thread is the micro-batch's own
        with torch.no_grad(), current_device(q.device):
            run = forward_pass(executable, q, k, v, sink, slopes, scale, softcap, self.traced(executable.transport))
            o, lse, kept = self.turns.run(self.number, run)
        if torch.is_grad_enabled():
            o.requires_grad_()
            if not self.calls:
                raise DistattnError(
                    "attention was called before the first layer; give OverlapSchedule every layer that attends."
                )
            self.calls[-1].append(_Call(executable, (q, k, v), sink, slopes, (scale, softcap), o, lse, kept))
        return o

    def backward(self, loss: Tensor) -> Generator[None, None, None]:
        """The whole backward pass, pausing while messages travel."""
        loss.backward()
        if self.calls.pop():
            raise DistattnError(
                "attention was called after the last layer; give OverlapSchedule every layer that attends."
            )
        end, leaf = self.cuts.pop()
        while self.calls:
            calls = self.calls.pop()
            self._into([end], [leaf.grad], calls)
            for call in reversed(calls):
                do = torch.zeros_like(call.o) if call.o.grad is None else call.o.grad
                given = (do, None, *call.inputs, call.sink, call.slopes, call.o, call.lse, call.kept, *call.score)
                grads = yield from _by_steps(
                    backward_pass(call.executable, *given, self.traced(call.executable.transport)), call.o.device
                )
                wanted = [*call.inputs, *([] if call.sink is None else [call.sink])]
                pairs = [(x, grad) for x, grad in zip(wanted, grads, strict=False) if x.requires_grad]
                self._into([x for x, _ in pairs], [grad for _, grad in pairs], calls)
            end, leaf = self.cuts.pop()
        if end.requires_grad:
            torch.autograd.backward(end, leaf.grad)

    def _into(self, ends: list[Tensor], grads: list[Tensor | None], calls: list[_Call]) -> None:
        self.recomputed = list(calls)
        RECOMPUTING.append(self)
        try:
            # what comes before attention and what comes after it may share a norm: both go through it
            torch.autograd.backward(ends, grads, retain_graph=True)
        finally:
            RECOMPUTING.pop()
            self.recomputed = None

    def traced(self, transport: Transport) -> Transport:
        return _TracedTransport(transport, self.number, self.spans)


def _enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    micro_batch = current_micro_batch()
    if not isinstance(micro_batch, _MicroBatch):
        return args, kwargs
    others = [*args[1:], *kwargs.values()] if args else [x for name, x in kwargs.items() if name != "hidden_states"]
    if any(isinstance(x, Tensor) and x.requires_grad for x in others):
        raise DistattnError(
            "a layer takes tensors with gradients besides its hidden states; OverlapSchedule cannot cut there."
        )
    if args:
        return (micro_batch.cut(args[0]), *args[1:]), kwargs
    if "hidden_states" not in kwargs:
        raise DistattnError("layers of an OverlapSchedule take hidden states first, or as hidden_states=.")
    return args, kwargs | {"hidden_states": micro_batch.cut(kwargs["hidden_states"])}


def _leave(layer: nn.Module, args: Any, output: Any) -> Any:
    micro_batch = current_micro_batch()
    if not isinstance(micro_batch, _MicroBatch) or micro_batch.recomputed is not None:
        return output
    if isinstance(output, Tensor):
        return micro_batch.cut(output)
    return (micro_batch.cut(output[0]), *output[1:])


class _Turns:
    """Who may run: one at a time, in turn."""

    def __init__(self, micro_batches: int, spans: list[Span]):
        self.changed, self.spans = threading.Condition(), spans
        self.waiting = list(range(micro_batches))
        self.failure: BaseException | None = None
        self.began = 0.0

    def begin(self, micro_batch: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.failure or self.waiting[0] == micro_batch)
            if self.failure:
                raise _Cancelled
            self.began = time.perf_counter()

    def hand_over(self, micro_batch: int) -> None:
        """To the next one, and wait for one's turn."""
        with self.changed:
            self._ran(micro_batch)
            self.waiting.append(self.waiting.pop(0))
            self.changed.notify_all()
        self.begin(micro_batch)

    def end(self, micro_batch: int, failure: BaseException | None) -> None:
        with self.changed:
            if self.waiting[0] == micro_batch:
                self._ran(micro_batch)
            self.waiting.remove(micro_batch)
            self.failure = self.failure or failure
            self.changed.notify_all()

    def run(self, micro_batch: int, paused: PausableRun[Any]) -> Any:
        """To its end, handing over at every pause."""
        while True:
            try:
                next(paused)
            except StopIteration as stop:
                return stop.value
            self.hand_over(micro_batch)

    def _ran(self, micro_batch: int) -> None:
        self.spans.append(Span(micro_batch, "runs", self.began, time.perf_counter()))


def _by_steps(run: PausableRun[Any], device: torch.device) -> PausableRun[Any]:
    """Continue a run on a device without recording gradients, and give both back at each pause.

    The mode and the current device belong to the thread, not to the generator: a context manager that is open across a pause
    would leave them to the runs that take their turn meanwhile.
    """
    while True:
        with torch.no_grad(), current_device(device):
            try:
                next(run)
            except StopIteration as stop:
                return stop.value
        yield


class _Cancelled(Exception):
    """Another micro_batch has failed."""


def _current_stream(layers: Sequence[nn.Module]) -> Any:
    """Return this thread's current stream of the layers' device, or None where there are no streams."""
    devices = (x.device for layer in layers for x in layer.parameters())
    # parameters that rest on the host (FSDP2's offload) do not say where their layers compute
    device = next((device for device in devices if has_streams(device)), None)
    if device is None and not torch.cuda.is_available():
        return None
    return torch.cuda.current_stream(device)


def _forward_together(
    micro_batches: list[_MicroBatch], losses: Sequence[Callable[[], Tensor]], stream: Any
) -> list[Tensor]:
    found: list[Any] = [None] * len(micro_batches)
    modes = (
        torch.is_grad_enabled(),
        [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
    )

    def work(micro_batch: _MicroBatch, loss: Callable[[], Tensor]) -> None:
        failure: BaseException | None = None
        try:
            micro_batch.turns.begin(micro_batch.number)
            INTERLEAVED.batch = micro_batch
            with ExitStack() as stack:
                # device, stream and modes are a thread's own
                stack.enter_context(torch.cuda.stream(stream))
                stack.enter_context(torch.set_grad_enabled(modes[0]))
                for kind, enabled, dtype in modes[1]:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
                found[micro_batch.number] = loss()
        except BaseException as error:
            failure = None if isinstance(error, _Cancelled) else error
        micro_batch.turns.end(micro_batch.number, failure)

    threads = [
        threading.Thread(target=work, args=pair, daemon=True) for pair in zip(micro_batches, losses, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if micro_batches and micro_batches[0].turns.failure is not None:
        raise micro_batches[0].turns.failure
    return found


def _backward_together(micro_batches: list[_MicroBatch], losses: list[Tensor], spans: list[Span]) -> None:
    waiting = [
        (micro_batch.number, micro_batch.backward(loss))
        for micro_batch, loss in zip(micro_batches, losses, strict=True)
    ]
    while waiting:
        number, run = waiting.pop(0)
        began = time.perf_counter()
        try:
            next(run)
            waiting.append((number, run))
        except StopIteration:
            pass
        spans.append(Span(number, "runs", began, time.perf_counter()))


class _TracedTransport:
    """A transport whose messages are noted: from when they leave until they are known to be there."""

    def __init__(self, transport: Transport, micro_batch: int, spans: list[Span]):
        self.transport, self.micro_batch, self.spans = transport, micro_batch, spans

    def exchange(
        self, sends: list[Packet], receives: list[Packet], collective: bool, where: str = ""
    ) -> PendingMessages:
        began = time.perf_counter()
        work = self.transport.exchange(sends, receives, collective, where)
        return _TracedMessages(work, self, began) if sends or receives else work


class _TracedMessages(NamedTuple):
    work: PendingMessages
    traced: _TracedTransport
    began: float

    def wait(self) -> None:
        self.work.wait()
        self.traced.spans.append(Span(self.traced.micro_batch, "moves", self.began, time.perf_counter()))
