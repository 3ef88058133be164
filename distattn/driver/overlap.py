"""Ping-pong: batches take turns on a rank, so that what one sends travels while another computes.

As in Zhuang et al. 2025 (arXiv 2510.18121, section 4.2). Forward, every batch runs on a thread of its own and hands over
whenever its messages have left. Its graph is cut at layers and at attention, so that backward can be driven piece by piece in
the same manner. One runs at a time: there is one order of issue, the same on all ranks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distattn.ir.errors import DistattnError
from distattn.ops.attention import REPEATING, STAGE, backward_pass, forward_pass, part_on_stage
from distattn.ops.executable import Lowered
from distattn.parallel.runtime.execute import PausableRun
from distattn.parallel.runtime.transport import Packet, PendingMessages, Transport


class PingPong:
    """Trains on batches that take turns.

    layers: the modules of `model` that hidden states pass one after another as their first argument, such as
    `model.model.layers` of a Hugging Face decoder, or any list of layers. Each may call attention once or more.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = list(layers)
        if not self.layers:
            raise DistattnError("ping-pong needs at least one layer.")
        self.spans: list[Span] = []

    def step(self, losses: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Forward and backward of each: functions that return the loss of one batch. Gradients add up in the parameters.

        Under torch.no_grad only forward. Returns the losses, detached.
        """
        self.spans = []
        turns = _Turns(len(losses), self.spans)
        parts = [_Part(number, turns, self.spans) for number in range(len(losses))]
        hooks = [layer.register_forward_pre_hook(_enter, with_kwargs=True) for layer in self.layers]
        hooks.append(self.layers[-1].register_forward_hook(_leave))
        try:
            found = _forward_together(parts, losses)
            if torch.is_grad_enabled():
                _backward_together(parts, found, self.spans)
        finally:
            for hook in hooks:
                hook.remove()
        return [loss.detach() for loss in found]

    def trace(self, rank: int = 0) -> dict[str, Any]:
        """The last step as trace events for ui.perfetto.dev: of each batch when it ran, and when its messages were under way."""
        first = min((span.begin for span in self.spans), default=0.0)
        events: list[dict[str, Any]] = [
            {
                "name": f"{span.what} {span.part}",
                "ph": "X",
                "pid": rank,
                "tid": 2 * span.part + (span.what == "moves"),
                "ts": (span.begin - first) * 1e6,
                "dur": (span.end - span.begin) * 1e6,
            }
            for span in self.spans
        ]
        names = {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        return {"traceEvents": [names, *events], "displayTimeUnit": "ms"}


class Span(NamedTuple):
    """What batch `part` did from `begin` to `end` (seconds): "runs", or has "moves" under way."""

    part: int
    what: str
    begin: float
    end: float


class _Call(NamedTuple):
    """One attention call of a part: its inputs, and its output as a leaf of the graph that follows."""

    lowered: Lowered
    inputs: tuple[Tensor, Tensor, Tensor]
    sink: Tensor | None
    slopes: Tensor | None
    score: tuple[float, float]
    o: Tensor
    lse: Tensor
    kept: Tensor


class _Part:
    """One batch. cuts: (end of the graph before a layer, the leaf the layer begins with); calls: those of each layer."""

    def __init__(self, number: int, turns: _Turns, spans: list[Span]):
        self.number, self.turns, self.spans = number, turns, spans
        self.cuts: list[tuple[Tensor, Tensor]] = []
        self.calls: list[list[_Call]] = []
        # layers whose forward is repeated in the backward pass (activation checkpointing): their calls, in order
        self.again: list[_Call] | None = None

    def cut(self, hidden: Tensor) -> Tensor:
        """Where a layer begins, or the last one has ended."""
        if self.again is not None or not torch.is_grad_enabled():
            return hidden.detach().requires_grad_() if self.again is not None else hidden
        leaf = hidden.detach().requires_grad_()
        self.cuts.append((hidden, leaf))
        self.calls.append([])
        return leaf

    def attention(
        self,
        lowered: Lowered,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        slopes: Tensor | None,
        scale: float,
        softcap: float,
    ) -> Tensor:
        """Called by `distattn.attention` on this part's thread."""
        if self.again is not None:
            return self.again.pop(0).o.detach().requires_grad_()
        if lowered.watch is not None and not lowered.watch.alternates:
            raise DistattnError("ranks that only serve do not take turns; use PingPong in a pool without servers.")
        with torch.no_grad():
            run = forward_pass(lowered, q, k, v, sink, slopes, scale, softcap, self.traced(lowered.transport))
            o, lse, kept = self.turns.run(self.number, run)
        if torch.is_grad_enabled():
            o.requires_grad_()
            if not self.calls:
                raise DistattnError(
                    "attention was called before the first layer; give PingPong every layer that attends."
                )
            self.calls[-1].append(_Call(lowered, (q, k, v), sink, slopes, (scale, softcap), o, lse, kept))
        return o

    def backward(self, loss: Tensor) -> Generator[None, None, None]:
        """The whole backward pass, pausing while messages travel."""
        loss.backward()
        if self.calls.pop():
            raise DistattnError("attention was called after the last layer; give PingPong every layer that attends.")
        end, leaf = self.cuts.pop()
        while self.calls:
            calls = self.calls.pop()
            self._into([end], [leaf.grad], calls)
            for call in reversed(calls):
                do = torch.zeros_like(call.o) if call.o.grad is None else call.o.grad
                given = (do, None, *call.inputs, call.sink, call.slopes, call.o, call.lse, call.kept, *call.score)
                with torch.no_grad():
                    grads = yield from backward_pass(call.lowered, *given, self.traced(call.lowered.transport))
                wanted = [*call.inputs, *([] if call.sink is None else [call.sink])]
                pairs = [(x, grad) for x, grad in zip(wanted, grads, strict=False) if x.requires_grad]
                self._into([x for x, _ in pairs], [grad for _, grad in pairs], calls)
            end, leaf = self.cuts.pop()
        if end.requires_grad:
            torch.autograd.backward(end, leaf.grad)

    def _into(self, ends: list[Tensor], grads: list[Tensor | None], calls: list[_Call]) -> None:
        self.again = list(calls)
        REPEATING.append(self)
        try:
            # what comes before attention and what comes after it may share a norm: both go through it
            torch.autograd.backward(ends, grads, retain_graph=True)
        finally:
            REPEATING.pop()
            self.again = None

    def traced(self, transport: Transport) -> Transport:
        return _Traced(transport, self.number, self.spans)


def _enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    part = part_on_stage()
    if not isinstance(part, _Part):
        return args, kwargs
    others = [*args[1:], *kwargs.values()] if args else [x for name, x in kwargs.items() if name != "hidden_states"]
    if any(isinstance(x, Tensor) and x.requires_grad for x in others):
        raise DistattnError(
            "a layer takes tensors with gradients besides its hidden states; ping-pong cannot cut there."
        )
    if args:
        return (part.cut(args[0]), *args[1:]), kwargs
    if "hidden_states" not in kwargs:
        raise DistattnError("ping-pong layers take hidden states first, or as hidden_states=.")
    return args, kwargs | {"hidden_states": part.cut(kwargs["hidden_states"])}


def _leave(layer: nn.Module, args: Any, output: Any) -> Any:
    part = part_on_stage()
    if not isinstance(part, _Part) or part.again is not None:
        return output
    if isinstance(output, Tensor):
        return part.cut(output)
    return (part.cut(output[0]), *output[1:])


class _Turns:
    """Who may run: one at a time, in turn."""

    def __init__(self, parts: int, spans: list[Span]):
        self.changed, self.spans = threading.Condition(), spans
        self.waiting = list(range(parts))
        self.failure: BaseException | None = None
        self.began = 0.0

    def begin(self, part: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.failure or self.waiting[0] == part)
            if self.failure:
                raise _Cancelled
            self.began = time.perf_counter()

    def hand_over(self, part: int) -> None:
        """To the next one, and wait for one's turn."""
        with self.changed:
            self._ran(part)
            self.waiting.append(self.waiting.pop(0))
            self.changed.notify_all()
        self.begin(part)

    def end(self, part: int, failure: BaseException | None) -> None:
        with self.changed:
            if self.waiting[0] == part:
                self._ran(part)
            self.waiting.remove(part)
            self.failure = self.failure or failure
            self.changed.notify_all()

    def run(self, part: int, paused: PausableRun[Any]) -> Any:
        """To its end, handing over at every pause."""
        while True:
            try:
                next(paused)
            except StopIteration as stop:
                return stop.value
            self.hand_over(part)

    def _ran(self, part: int) -> None:
        self.spans.append(Span(part, "runs", self.began, time.perf_counter()))


class _Cancelled(Exception):
    """Another part has failed."""


def _forward_together(parts: list[_Part], losses: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    found: list[Any] = [None] * len(parts)
    modes = (
        torch.is_grad_enabled(),
        [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def work(part: _Part, loss: Callable[[], Tensor]) -> None:
        failure: BaseException | None = None
        try:
            part.turns.begin(part.number)
            STAGE.part = part
            with ExitStack() as stack:
                if device is not None:
                    torch.cuda.set_device(device)
                # both are a thread's own
                stack.enter_context(torch.set_grad_enabled(modes[0]))
                for kind, enabled, dtype in modes[1]:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
                found[part.number] = loss()
        except BaseException as error:
            failure = None if isinstance(error, _Cancelled) else error
        part.turns.end(part.number, failure)

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in zip(parts, losses, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if parts and parts[0].turns.failure is not None:
        raise parts[0].turns.failure
    return found


def _backward_together(parts: list[_Part], losses: list[Tensor], spans: list[Span]) -> None:
    waiting = [(part.number, part.backward(loss)) for part, loss in zip(parts, losses, strict=True)]
    while waiting:
        number, run = waiting.pop(0)
        began = time.perf_counter()
        try:
            next(run)
            waiting.append((number, run))
        except StopIteration:
            pass
        spans.append(Span(number, "runs", began, time.perf_counter()))


class _Traced:
    """A transport whose messages are noted: from when they leave until they are known to be there."""

    def __init__(self, transport: Transport, part: int, spans: list[Span]):
        self.transport, self.part, self.spans = transport, part, spans

    def exchange(self, sends: list[Packet], receives: list[Packet], collective: bool) -> PendingMessages:
        began = time.perf_counter()
        work = self.transport.exchange(sends, receives, collective)
        return _Noted(work, self, began) if sends or receives else work


class _Noted(NamedTuple):
    work: PendingMessages
    traced: _Traced
    began: float

    def wait(self) -> None:
        self.work.wait()
        self.traced.spans.append(Span(self.traced.part, "moves", self.began, time.perf_counter()))
