"""Runs one rank's layer call on meta tensors at full size, and counts the operators around the kernels, bytes moved and
peak memory.

Nothing is computed, so a million tokens take a moment. It is an error if an operator would make a GPU's host wait or
copy data between host and GPU.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import meta_kernel
import torch
from imitated_allocator import QUEUE, HeldBytes
from imitated_nccl import GROUP
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from waits import META, wait_of

# importing this module registers the operators for latents
import distattn.ops.latent  # noqa: F401
from distattn.ir.plan import Plan
from distattn.kernels.registry import KERNELS
from distattn.ops.attention import backward_pass, forward_pass
from distattn.ops.executable import Executable, checked_program
from distattn.ops.planned_op import IMPLEMENTATIONS
from distattn.parallel.runtime.arenas import ARENAS
from distattn.parallel.runtime.communication.transport import GroupTransport
from distattn.parallel.runtime.execution import execute

# operators that access no data
_FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "set_")


@dataclass
class Traffic:
    """The work of one pass outside its kernels. launches: operator launches. bytes: bytes read and written. peak: bytes
    of new tensors.

    predicted_peak: the peak predicted before the pass.
    """

    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    predicted_peak: int = 0
    kernels: int = 0
    messages: int = 0

    def seconds(self, bytes_per_second: float = 2.5e12) -> float:
        return sum(self.bytes.values()) / bytes_per_second


class Watch(TorchDispatchMode):
    """A dispatch mode that counts the operators passing through PyTorch's dispatcher.

    memory: counts the tensors created while the mode is active.
    """

    def __init__(self, traffic: Traffic, memory: HeldBytes | None = None):
        super().__init__()
        self.traffic, self.memory = traffic, memory or HeldBytes()
        self._older: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        arguments = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        assert (wait := wait_of(func, args, kwargs, results)) is None, wait
        before = {x.untyped_storage()._cdata for x in arguments}
        # a view of an existing tensor is not new
        for x in arguments:
            self._leave_out(x.untyped_storage())
        in_place = name.endswith("_") or name.startswith("_index_put") or "out" in (kwargs or {})
        view = bool(results) and not in_place and all(x.untyped_storage()._cdata in before for x in results)
        if not view and name not in _FREE:
            self.traffic.launches[name] += 1
            self.traffic.bytes[name] += _row_bytes(name, args) or (
                sum(x.nbytes for x in arguments) + (0 if in_place else sum(x.nbytes for x in results))
            )
        for x in results:
            self._track(x)
        return out

    def _leave_out(self, storage: UntypedStorage) -> None:
        key = storage._cdata
        if not self.memory.knows(storage) and key not in self._older:
            self._older.add(key)
            # a later storage may reuse this address
            weakref.finalize(storage, self._older.discard, key).atexit = False

    def _track(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if not self.memory.knows(storage) and storage._cdata not in self._older:
            self.memory.allocate(storage)
            self.traffic.peak = self.memory.peak


def _row_bytes(name: str, args: tuple[Any, ...]) -> int:
    """Return the bytes that an operator of `kernels.glue` reads and writes, counting only the rows that it accesses."""
    if name not in ("copy_rows", "copy_rows_with_products", "add_rows", "merge_rows"):
        return 0
    count, tensors = args[-1], [x for x in args if isinstance(x, Tensor) and x.dtype.is_floating_point]
    row = [x[:1].numel() * x.element_size() for x in tensors]
    # results come first among the arguments. They are also read if the operator adds to them or merges into them
    read_too = {"add_rows": 1, "merge_rows": 2}.get(name, 0)
    return int(count * (sum(row) + sum(row[:read_too])))


class MetaBackend:
    """A backend that accepts messages as NCCL does but delivers none. memory: records the storage of each message."""

    supports_coalescing = True

    def __init__(self) -> None:
        self.messages = 0
        self.memory: HeldBytes | None = None

    def _start_coalescing(self) -> None:
        return None

    def _end_coalescing(self) -> MetaBackend:
        return self

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> None:
        assert tensors[0].is_contiguous() and tensors[0].device == META
        self.messages += 1
        if self.memory is not None:
            self.memory.record(tensors[0].untyped_storage())

    recv = send

    def wait(self) -> None:
        return None


class Layer:
    """One rank's layer of a plan, built as `prepare` builds it. memory: the predicted memory."""

    def __init__(self, plan: Plan, rank: int):
        self.backend = MetaBackend()
        with mock.patch.dict(KERNELS, {"meta": "meta_kernel"}):
            key, program = checked_program(plan, rank, "meta", META, max_buffer_bytes=None, proven=True)
            self.ready = Executable(program, key, GroupTransport(GROUP, self.backend))  # type: ignore[arg-type]
            self.memory = self.ready.memory()
        self.new_inputs()

    def new_inputs(self) -> None:
        """Create the rank's inputs: q, k, v, the weights of latent attention and the output gradient."""
        call, op = self.ready.program.call, self.ready.program.call.op

        def tensor(heads: int, width: int, rows: int = self.ready.program.tokens) -> Tensor:
            return torch.empty(rows, heads, width, dtype=getattr(torch, call.dtype), device=META)

        self.q, self.do = tensor(call.heads, call.head_dim), tensor(call.heads, call.v_head_dim)
        self.k, self.v = (tensor(call.kv_heads, width) for width, _ in op.fields(call.head_dim, call.v_head_dim)["KV"])
        self.up: Tensor | None = None
        if op.kind == "latent_attention":
            self.up = tensor(call.head_dim - op.rotary_dim + call.v_head_dim, op.latent_dim, rows=call.heads)

    def forward(self) -> Any:
        """Run the forward pass. Return (o, lse, kept)."""
        if self.up is not None:
            facts = self.ready.handle, self.ready.kept_elements, 0.1
            return IMPLEMENTATIONS["distattn::latent_forward"](self.q, self.k, self.v, self.up, *facts)
        return execute.run_to_completion(forward_pass(self.ready, self.q, self.k, self.v, None, None, 0.1, 0.0))

    def backward(self, o: Tensor, lse: Tensor, kept: Tensor) -> Any:
        """Run the backward pass. Return the gradients of the inputs."""
        if self.up is not None:
            tensors = self.do, self.q, self.k, self.v, self.up, o, lse, kept
            return IMPLEMENTATIONS["distattn::latent_backward"](*tensors, self.ready.handle, 0.1)
        tensors = self.do, None, self.q, self.k, self.v, None, None, o, lse, kept
        return execute.run_to_completion(backward_pass(self.ready, *tensors, 0.1, 0.0))


def layer_call(plan: Plan, rank: int) -> tuple[Traffic, Traffic, int]:
    """Return (forward traffic, backward traffic, bytes kept for the backward pass) of one rank's layer call."""
    layer = Layer(plan, rank)
    passes = []

    def watched(direction: str, run: Any, *tensors: Tensor) -> Any:
        traffic, before = (
            Traffic(predicted_peak=layer.memory[direction].peak),
            (len(meta_kernel.CALLS), layer.backend.messages),
        )
        # otherwise an arena left over from another pass would be reused and not counted
        ARENAS.free(META)
        with Watch(traffic) as watch:
            result = run(*tensors)
            kept = watch.memory.alive - sum(ARENAS.idle_bytes(META))
        traffic.kernels, traffic.messages = len(meta_kernel.CALLS) - before[0], layer.backend.messages - before[1]
        passes.append(traffic)
        return result, kept

    outputs, stays = watched("forward", layer.forward)
    watched("backward", layer.backward, *outputs)
    return passes[0], passes[1], stays


def layers_ahead(plan: Plan, rank: int, layers: int, launches: int) -> dict[str, HeldBytes]:
    """Return the memory that `layers` layers use in each direction while the host runs ahead of the device.

    launches: launches per layer and direction. Each layer has its own inputs. The forward pass counts inputs, outputs
    and kept tensors.
    """
    layer = Layer(plan, rank)
    ARENAS.free(META)
    by_direction, saved = {}, []
    for direction in ("forward", "backward"):
        memory = layer.backend.memory = by_direction[direction] = HeldBytes(QUEUE)
        with Watch(Traffic(), memory):
            for _ in range(layers):
                if direction == "forward":
                    layer.new_inputs()
                    saved.append((layer.q, layer.k, layer.v, layer.forward()))
                else:
                    layer.q, layer.k, layer.v, outputs = saved.pop()
                    layer.backward(*outputs)
                memory.launch(launches)
    return by_direction


class _Repeated(torch.autograd.Function):
    """A checkpointed layer: the backward pass repeats the layer's forward pass, then runs its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, memory: HeldBytes, launches: int) -> Tensor:
        ctx.repeat = layer, memory, launches
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        layer, memory, launches = ctx.repeat
        with torch.no_grad():
            outputs = layer.forward()
            memory.launch(launches)
            layer.backward(*outputs)
            memory.launch(launches)
        return grad, None, None, None


def repeated_layers(plan: Plan, rank: int, layers: int, launches: int) -> HeldBytes:
    """Return the memory of the backward pass of checkpointed layers while the host runs ahead of the device. See
    `layers_ahead`.

    Before these layers, another layer brings the arena to its full size; its messages are not counted.
    """
    layer, memory = Layer(plan, rank), HeldBytes(QUEUE)
    ARENAS.free(META)
    with Watch(Traffic(), memory):
        layer.backward(*layer.forward())
    layer.backend.memory = memory
    x = hidden = torch.ones(1, device=META, requires_grad=True)
    for _ in range(layers):
        hidden = _Repeated.apply(hidden, layer, memory, launches)
    with Watch(Traffic(), memory):
        torch.autograd.backward(hidden, torch.ones_like(x))
    return memory
