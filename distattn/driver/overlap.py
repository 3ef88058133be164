"""Overlap: micro-batches take turns on a rank, so that one computes while another's messages travel (ping-pong execution).

The method is from Zhuang et al. 2025 (arXiv 2510.18121, section 4.2). In the forward pass each micro-batch has its own thread,
and the next one continues when its messages have been sent. All micro-batches enter and leave a layer together: outside the
layers there is one autograd graph, in which a layer is one node for all micro-batches. The node's backward pass takes turns in
the same way. FSDP2 therefore gathers a layer's parameters, and reduces their gradients, once for all micro-batches. One
micro-batch runs at a time, in the same order on all ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from distattn.driver.turns import Arrived, MicroBatchThread, RandomState, Returned, Span, ThreadModes, Turns, device_of
from distattn.ir.errors import DistattnError
from distattn.kernels.devices import current_device
from distattn.ops.attention import backward_pass, forward_pass
from distattn.ops.current_micro_batch import INTERLEAVED, RECOMPUTING
from distattn.ops.executable import Executable
from distattn.parallel.runtime.execution.execute import PausableRun

# the positional and keyword arguments with which one micro-batch calls a module
Call = tuple[tuple[Any, ...], dict[str, Any]]
_OUTSIDE = "attention was called outside of the layers; give OverlapSchedule every layer that attends."
_LEAVES = "a layer's tensors with gradients leave it other than through its output; OverlapSchedule cannot cut there."


class OverlapSchedule:
    """A training schedule in which micro-batches take turns.

    layers: a model's modules that run one after another and take hidden states as their first argument, such as
    `model.model.layers` of a Hugging Face decoder. Each may call attention once or more.
    model: the module that the losses call; required if `fully_shard` (FSDP2) has sharded the layers.
    """

    def __init__(self, layers: Sequence[nn.Module], model: nn.Module | None = None):
        # zero-dimensional arrays and tensors have an iterable type, but cannot be iterated over
        self.layers = list(layers) if isinstance(layers, Iterable) and not hasattr(layers, "ndim") else []
        if not self.layers or not all(isinstance(layer, nn.Module) for layer in self.layers):
            raise DistattnError("an overlap schedule needs a list of at least one layer, each a module.")
        if not isinstance(model, (nn.Module, type(None))):
            raise DistattnError(f"model must be the module whose layers take turns, not a {type(model).__name__}.")
        # the modules that all micro-batches call together
        self._joined = [*self.layers, *_sharded_around(self.layers, model)]
        self._turns = Turns()
        self._micro_batches: list[_MicroBatch] = []
        self._device: torch.device | None = None

    @property
    def spans(self) -> list[Span]:
        """The activities of all micro-batches in the last step, with their times."""
        return self._turns.spans

    def step(self, losses: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Run forward and backward passes of micro-batches; gradients accumulate in the parameters. Return the detached losses.

        losses: for each micro-batch, a function that returns its loss. Under torch.no_grad only the forward passes run. Raise
        DistattnError if a micro-batch cannot take turns.
        """
        self._turns = Turns()
        self._device = device_of(self.layers)
        modes, states = ThreadModes.current(self._device), RandomState.drawn(self._device, len(losses))
        present = RandomState.current(self._device)
        self._micro_batches = [
            _MicroBatch(number, self, loss, modes, state)
            for number, (loss, state) in enumerate(zip(losses, states, strict=True))
        ]
        # run the backward pass in this context, too, because transformers' layers check their class when they are recomputed
        with _calls_joined(self._joined):
            try:
                loss_tensors = self._run_to_return([None] * len(losses))
            finally:
                for micro_batch in self._micro_batches:
                    micro_batch.thread.cancel()
                self._micro_batches = []
                present.set()
            if torch.is_grad_enabled() and loss_tensors:
                torch.autograd.backward(loss_tensors)
        return [loss.detach() for loss in loss_tensors]

    def trace(self, rank: int = 0) -> dict[str, Any]:
        """Return trace events of the last step for ui.perfetto.dev: when micro-batches ran and their messages travelled."""
        first = min((span.begin for span in self.spans), default=0.0)
        events: list[dict[str, Any]] = [
            {
                "name": f"{span.activity} {span.micro_batch}",
                "ph": "X",
                "pid": rank,
                "tid": 2 * span.micro_batch + (span.activity == "moves"),
                "ts": (span.begin - first) * 1e6,
                "dur": (span.end - span.begin) * 1e6,
            }
            for span in self.spans
        ]
        names = {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        return {"traceEvents": [names, *events], "displayTimeUnit": "ms"}

    def _run_to_return(self, values: Sequence[Any]) -> list[Any]:
        """Resume all micro-batches with `values` until they return; return their results. Joined modules are called only once."""
        while True:
            threads = [micro_batch.thread for micro_batch in self._micro_batches]
            events = self._turns.run([thread.resume(value) for thread, value in zip(threads, values, strict=True)])
            returned = [event.value for event in events if isinstance(event, Returned)]
            arrived = [event for event in events if isinstance(event, Arrived)]
            if not arrived:
                return returned
            if returned or len({id(event.module) for event in arrived}) > 1:
                raise DistattnError(
                    "micro-batches that take turns call the same layers in the same order; these do not."
                )
            values = self._call(arrived[0].module, [(event.args, event.kwargs) for event in arrived])

    def _call(self, module: nn.Module, calls: list[Call]) -> list[Any]:
        """Call a module once for all micro-batches; return the output of each."""
        if not isinstance(module, FSDPModule):
            return self._run_module(module, functools.partial(_original_class(module).__call__, module), calls)
        # FSDP2's hooks run once, with the arguments and outputs of all micro-batches
        forward, replaced = module.forward, module.__dict__.get("forward")
        module.forward = lambda *joined: self._run_module(module, forward, list(joined))
        try:
            return nn.Module.__call__(module, *calls)  # type: ignore[no-any-return]
        finally:
            if replaced is None:
                del module.__dict__["forward"]
            else:
                module.forward = replaced

    def _run_module(self, module: nn.Module, body: Callable[..., Any], calls: list[Call]) -> list[Any]:
        """Run the body of a module for all micro-batches, each on its own thread."""
        if not torch.is_grad_enabled() or not any(module is layer for layer in self.layers):
            return self._run_to_return([(body, *call) for call in calls])
        segments = [
            _Segment(micro_batch, module, *call, self._device)
            for micro_batch, call in zip(self._micro_batches, calls, strict=True)
        ]
        joined = _JoinedSegments(self._turns, segments, lambda inner: self._run_to_return([(body, *c) for c in inner]))
        # pass an input that requires a gradient, so that the node computes its parameters' gradients in any case
        gradient = torch.zeros((), requires_grad=True)
        outputs = _JoinedLayer.apply(joined, gradient, *(segment.hidden for segment in segments))
        joined.enter_graph()
        return [segment.with_output(output) for segment, output in zip(segments, outputs, strict=True)]


class _MicroBatch:
    """A micro-batch with its own thread. segment: the layer that it is in; None outside layers."""

    def __init__(
        self, number: int, schedule: OverlapSchedule, loss: Callable[[], Tensor], modes: ThreadModes, state: RandomState
    ):
        self.number, self.turns = number, schedule._turns
        self.segment: _Segment | None = None
        self.thread = MicroBatchThread(loss, self, modes, state)

    @property
    def layer(self) -> nn.Module | None:
        """The layer that the micro-batch is in. See `InterleavedBatch.layer`."""
        return None if self.segment is None else self.segment.module

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
        """Compute attention on this micro-batch's thread. See `InterleavedBatch.attention`."""
        if executable.observer is not None and not executable.observer.allows_interleaving:
            raise DistattnError("ranks that only serve do not take turns; use OverlapSchedule without servers.")
        if self.segment is None and torch.is_grad_enabled():
            raise DistattnError(_OUTSIDE)
        transport = self.turns.traced(executable.transport, self.number)
        # the current device is set per thread, and only this micro-batch uses the thread
        with torch.no_grad(), current_device(q.device):
            o, lse, kept = self.thread.run(forward_pass(executable, q, k, v, sink, slopes, scale, softcap, transport))
        if self.segment is None:
            return o
        return self.segment.record(_AttentionCall(executable, (q, k, v), sink, slopes, (scale, softcap), o, lse, kept))

    def checkpoint(self, *call: Any) -> Any:
        """Run a checkpointed layer. See `InterleavedBatch.checkpoint`."""
        assert self.segment is not None
        return self.segment.checkpoint(*call)


class _AttentionCall(NamedTuple):
    """One attention call of a micro-batch. inputs: q, k and v. o: its output, a leaf of the graph that follows."""

    executable: Executable
    inputs: tuple[Tensor, ...]
    sink: Tensor | None
    slopes: Tensor | None
    score: tuple[float, float]
    o: Tensor
    lse: Tensor
    kept: Tensor


class _Repetition(NamedTuple):
    """The recomputation of a checkpointed layer. ticket: a handle to its input, if moved to the host, otherwise None."""

    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ticket: Any
    modes: ThreadModes
    random: RandomState


class _Segment:
    """One layer of one micro-batch: a separate graph from its hidden states, a leaf, to its output, cut at attention calls."""

    def __init__(
        self,
        micro_batch: _MicroBatch,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        device: torch.device | None,
    ):
        self.micro_batch, self.module, self._device = micro_batch, module, device
        others = [*args[1:], *kwargs.values()] if args else [x for name, x in kwargs.items() if name != "hidden_states"]
        if any(isinstance(x, Tensor) and x.requires_grad for x in others):
            raise DistattnError(
                "a layer takes tensors with gradients besides its hidden states; OverlapSchedule cannot cut there."
            )
        if not args and "hidden_states" not in kwargs:
            raise DistattnError("layers of an OverlapSchedule take hidden states first, or as hidden_states=.")
        self._args, self._kwargs = args, kwargs
        self.hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self.calls: list[_AttentionCall] = []
        self._leaf: Tensor | None = None
        self._output: Tensor | None = None
        self._other_outputs: tuple[Any, ...] | None = None
        self._repetition: _Repetition | None = None
        # indices of the recorded attention calls that the layer's recomputation has not yet reached
        self._repeated: list[int] = []
        self.layer: nn.Module | None = None

    def enter(self) -> Call:
        """Enter the layer; return the arguments to call it with."""
        self.micro_batch.segment = self
        self._leaf = self.hidden.detach().requires_grad_()
        call = self._arguments(self._args, self._kwargs, self._leaf)
        del self.hidden
        self._args, self._kwargs = (), {}
        return call

    def leave(self, output: Any) -> Tensor:
        """Leave the layer; return its hidden states for the next layer, detached."""
        self.micro_batch.segment = None
        self._output, self._other_outputs = (output, None) if isinstance(output, Tensor) else (output[0], output[1:])
        if any(isinstance(x, Tensor) and x.requires_grad for x in self._other_outputs or ()):
            raise DistattnError(_LEAVES)
        return self._output.detach()

    def with_output(self, output: Tensor) -> Any:
        """Return the layer's output with its hidden states replaced by `output`."""
        others, self._other_outputs = self._other_outputs, None
        return output if others is None else (output, *others)

    def record(self, call: _AttentionCall) -> Tensor:
        """Record an attention call for the backward pass; return its output."""
        if self._repetition is not None:
            # do not keep the inputs, since they are recomputed
            self.calls.append(call._replace(inputs=(), sink=None, slopes=None))
        elif torch.is_grad_enabled():
            self.calls.append(call)
        return call.o.requires_grad_() if torch.is_grad_enabled() else call.o

    def checkpoint(
        self,
        forward: Callable[..., Any],
        put: Callable[[Tensor], Any] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a checkpointed layer without a graph, and record how to recompute it. See `InterleavedBatch.checkpoint`."""
        assert self._leaf is not None
        ticket = None if put is None else put(self._leaf.detach())
        if ticket is not None:
            self._leaf = None
        kept = self._arguments(args, kwargs, None)
        random = RandomState.current(self._device)
        self._repetition = _Repetition(forward, *kept, ticket, ThreadModes.current(self._device), random)
        with torch.no_grad():
            return forward(*args, **kwargs)

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
        """Return a recorded output while the layer is recomputed, on the thread of the backward pass."""
        if not self._repeated:
            raise DistattnError(
                "a layer was recomputed that had not been recorded: reentrant activation checkpointing does not take "
                "turns; use checkpoint(..., use_reentrant=False)."
            )
        number = self._repeated.pop(0)
        call = self.calls[number]
        o = call.o.detach().requires_grad_()
        if self._repetition is not None:
            self.calls[number] = call._replace(inputs=(q, k, v), sink=sink, slopes=slopes, o=o)
        return o

    def backward(self, gradient: Tensor) -> PausableRun[Tensor | None]:
        """Run the layer's backward pass, pausing while messages travel; return the gradient of its hidden states."""
        if self._repetition is not None:
            self._repeat(self._repetition)
        if self._leaf is None or self._leaf.grad is not None or any(call.o.grad is not None for call in self.calls):
            raise DistattnError(_LEAVES)
        outputs: list[Tensor] = [self._output] if self._output is not None and self._output.requires_grad else []
        gradients: list[Tensor] = [gradient] if outputs else []
        self._backward(outputs, gradients)
        for call in reversed(self.calls):
            do = torch.zeros_like(call.o) if call.o.grad is None else call.o.grad
            transport = self.micro_batch.turns.traced(call.executable.transport, self.micro_batch.number)
            kept: Any = (*call.inputs, call.sink, call.slopes, call.o, call.lse, call.kept, *call.score, transport)
            call_gradients = yield from _by_steps(backward_pass(call.executable, do, None, *kept), call.o.device)
            leaves = [*call.inputs, *([] if call.sink is None else [call.sink])]
            pairs = [(x, grad) for x, grad in zip(leaves, call_gradients, strict=False) if x.requires_grad]
            self._backward([x for x, _ in pairs], [grad for _, grad in pairs])
        return self._leaf.grad

    def _backward(self, outputs: list[Tensor], gradients: list[Tensor]) -> None:
        """Run the backward pass from `outputs`, with their gradients, to the leaves at which the graph is cut."""
        with self._repeating():
            # retain the graph, because its parts before and after attention may share a node, such as a norm
            torch.autograd.backward(outputs, gradients, retain_graph=True)

    def _repeat(self, repetition: _Repetition) -> None:
        """Recompute the layer with a graph, reusing attention's outputs from the forward pass."""
        if repetition.ticket is not None:
            self._leaf = repetition.ticket.get().requires_grad_()
        with repetition.random.restored(), repetition.modes.entered(), torch.enable_grad(), self._repeating():
            args, kwargs = self._arguments(repetition.args, repetition.kwargs, self._leaf)
            output = repetition.forward(*args, **kwargs)
        self._output = output if isinstance(output, Tensor) else output[0]

    @contextmanager
    def _repeating(self) -> Iterator[None]:
        """Answer attention calls with the recorded outputs while the context is open."""
        self._repeated = list(range(len(self.calls)))
        RECOMPUTING.append(self)
        try:
            yield
        finally:
            RECOMPUTING.pop()

    @staticmethod
    def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor | None) -> Call:
        """Return the layer's arguments with its hidden states replaced by `hidden`."""
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


class _JoinedSegments:
    """One layer for all micro-batches. run: calls the layer for each micro-batch, and returns its outputs."""

    def __init__(self, turns: Turns, segments: list[_Segment], run: Callable[[list[Call]], list[Any]]):
        self._turns, self._segments = turns, segments
        self._run: Callable[[list[Call]], list[Any]] | None = run

    def forward(self) -> tuple[Tensor, ...]:
        """Run the layer for all micro-batches; return their hidden states after it, detached."""
        assert self._run is not None
        outputs = self._run([segment.enter() for segment in self._segments])
        return tuple(segment.leave(output) for segment, output in zip(self._segments, outputs, strict=True))

    def enter_graph(self) -> None:
        """Drop `run`, which only the forward pass needs."""
        self._run = None

    def backward(self, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradients of the hidden states; accumulate the gradients of parameters."""
        segments, self._segments = self._segments, []
        if not segments:
            raise DistattnError("a step that takes turns has one backward pass, which has run.")
        return self._turns.run(
            [segment.backward(gradient) for segment, gradient in zip(segments, gradients, strict=True)]
        )


class _JoinedLayer(torch.autograd.Function):
    """A layer for all micro-batches, as a single node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, joined: _JoinedSegments, gradient: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
        ctx.joined = joined
        return joined.forward()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return (None, None, *ctx.joined.backward(gradients))


def _sharded_around(layers: Sequence[nn.Module], model: nn.Module | None) -> list[nn.Module]:
    """Return the FSDP2-sharded modules that contain layers. Raise DistattnError if the sharding does not permit turns."""
    sharded = [layer for layer in layers if isinstance(layer, FSDPModule)]
    if sharded and model is None:
        raise DistattnError("FSDP2 has sharded the layers: give OverlapSchedule the whole model, too (model=).")
    for layer in layers:
        inner = [module for module in layer.modules() if module is not layer and isinstance(module, FSDPModule)]
        if inner:
            raise DistattnError(
                f"FSDP2 has sharded a {type(inner[0]).__name__} inside of a layer; OverlapSchedule takes whole layers only."
            )
    for layer in sharded:
        if getattr(layer, "gradient_checkpointing", False):
            raise DistattnError(
                "layers that FSDP2 has sharded are not checkpointed by transformers where micro-batches take turns; use "
                "distattn.memory.activation_checkpointing.checkpoint_layers instead."
            )
    ids = {id(layer) for layer in layers}
    around = (module for module in (model.modules() if model is not None else ()) if id(module) not in ids)
    return [
        module
        for module in around
        if isinstance(module, FSDPModule) and any(id(inner) in ids for inner in module.modules())
    ]


@contextmanager
def _calls_joined(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Make micro-batches wait for each other before and after these modules while the context is open."""
    for module in modules:
        original: Any = type(module)
        module.__class__ = _joining_class(original)
    try:
        yield
    finally:
        for module in modules:
            module.__class__ = _original_class(module)


@functools.cache
def _joining_class(original: Any) -> type[nn.Module]:
    """Return a subclass of a module's class that hands calls to the schedule before hooks, such as FSDP2's, run."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        micro_batch = INTERLEAVED.batch
        if not isinstance(micro_batch, _MicroBatch):
            return original.__call__(self, *args, **kwargs)
        body, args, kwargs = micro_batch.thread.suspend(Arrived(self, args, kwargs))
        return micro_batch.thread.suspend(Returned(body(*args, **kwargs)))

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})


def _original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before its calls were joined."""
    return type(module).__mro__[1]


def _by_steps(run: PausableRun[Any], device: torch.device) -> PausableRun[Any]:
    """Continue a run on a device under torch.no_grad; restore the device and the gradient mode at each pause.

    Both belong to the thread, not to the generator: a context manager left open across a pause would affect the runs that take
    their turns in the meantime.
    """
    while True:
        with torch.no_grad(), current_device(device):
            try:
                next(run)
            except StopIteration as stop:
                return stop.value
        yield
