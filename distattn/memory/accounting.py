"""The memory that a run needs on a rank's device, by kind: weights by arithmetic, activations from a step on meta tensors.

A step of a model on the meta device allocates the same storages as on a GPU but computes nothing. `AllocationWatch` counts them.
The memory of an attention pass is known exactly from its executable (`Executable.memory()`), except for that of the kernel itself
if it is not available here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distattn.memory.host_offload import HostOffload, Ticket
from distattn.ops.attention import attention
from distattn.ops.executable import EXECUTABLES, Executable
from distattn.ops.latent import latent_attention
from distattn.parallel.runtime.arenas import runs_backward

# the sections of a step
ATTENTION, FEED_FORWARD, LOSS, OTHER = "attention", "feed-forward", "loss", "other"
SECTIONS = (ATTENTION, FEED_FORWARD, LOSS, OTHER)
# each attention operator's direction, and the index of its argument that holds the executable's handle
_PASSES = {
    "distattn::forward": ("forward", 5),
    "distattn::backward": ("backward", 10),
    "distattn::latent_forward": ("forward", 4),
    "distattn::latent_backward": ("backward", 8),
}


class StateBytes(NamedTuple):
    """Bytes of the sharded state that a rank always holds, and of the layers that FSDP2 gathers while they are computed.

    gathered: the weights of two layers (one in use, the next being gathered) and those outside layers. reduced: one layer's
    gradients, the copy of them that is being summed over ranks, and the gradients of weights outside layers, which stay until
    the end of the step.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    reduced: int

    @staticmethod
    def of(model: nn.Module, layers: list[nn.Module], ranks: int, *, master_weights: bool) -> StateBytes:
        """Return the bytes for a model trained with AdamW whose parameters are sharded over `ranks` ranks.

        master_weights: True if parameters, gradients and both moments are fp32 and layers are gathered in the model's dtype;
        otherwise all of them have the model's dtype.
        """
        total = sum(parameter.numel() for parameter in model.parameters())
        layer_sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
        widest, rest = max(layer_sizes, default=0), total - sum(layer_sizes)
        narrow_bytes = next(model.parameters()).element_size()
        wide_bytes = 4 if master_weights else narrow_bytes
        shard = -(-total // ranks)
        gathered = (2 * widest + rest) * narrow_bytes
        reduced = widest * (narrow_bytes + wide_bytes) + rest * narrow_bytes
        return StateBytes(shard * wide_bytes, shard * wide_bytes, 2 * shard * wide_bytes, gathered, reduced)


class RankCounts(NamedTuple):
    """Bytes of activations. saved: device memory held for the backward pass when the loss starts.

    arena: memory that attention keeps between passes and steps. This is the largest arena and, if layers are recomputed in the
    backward pass, the receive buffers of the recomputed passes. working: each section's peak beyond saved and arena; the peaks
    do not coincide. host: pinned host memory.
    """

    saved: int
    arena: int
    working: dict[str, int]
    host: int

    def times(self, micro_batches: int) -> RankCounts:
        """Return an upper bound for `micro_batches` interleaved micro-batches: the sum of their memory."""
        working = {name: micro_batches * size for name, size in self.working.items()}
        return RankCounts(micro_batches * self.saved, micro_batches * self.arena, working, micro_batches * self.host)


@dataclass(frozen=True)
class RankMemory:
    """Device bytes that ranks with the same number of tokens need at most. host: bytes of pinned host memory."""

    ranks: tuple[int, ...]
    tokens: int
    state: StateBytes
    counts: RankCounts
    host: int

    @property
    def total(self) -> int:
        """The peak number of bytes on the device."""
        return sum(self.state) + self.counts.saved + self.counts.arena + max(self.counts.working.values())


class AllocationWatch(TorchDispatchMode):
    """A context that counts the bytes of the storages created in it on one device, and their peak in each section.

    alive: the bytes alive now. peaks: the highest `alive` in each section. arena: see `RankCounts`; `alive` and `peaks` do not
    include it. host: the peak bytes of a `CountingOffload` on the host.
    """

    def __init__(self, device: torch.device | str = "meta") -> None:
        super().__init__()
        self.device = torch.device(device)
        self.alive, self.section = 0, OTHER
        self._largest_arena = self._most_repeated = 0
        # the sizes of storages that recomputed passes have received into for their backward pass, keyed by storage
        self._repeated: dict[int, int] = {}
        self.peaks = dict.fromkeys(SECTIONS, 0)
        self.host = self._host_alive = 0
        self._to_host = False
        self._sizes: dict[int, tuple[int, bool]] = {}
        self._older: set[int] = set()

    @property
    def arena(self) -> int:
        """The bytes that attention keeps between passes."""
        return self._largest_arena + self._most_repeated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        direction = ""
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._exclude(x)
        if func.name() in _PASSES:
            direction, number = _PASSES[func.name()]
            executable = EXECUTABLES.by_handle(args[number])
            memory = executable.memory()[direction]
            self._largest_arena = max(self._largest_arena, memory.arena)
            # leave out the buffer that a recomputed pass receives into for its backward pass, since `_repeat` counts it
            kept = executable.program.kept_places.bytes if direction == "forward" and runs_backward() else 0
            self._note(self.alive + memory.beside_arena - kept)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # return 0 to a model that reads a value, as transformers' models do to detect a packed batch
            return torch.zeros((), dtype=args[0].dtype).item()
        out = func(*args, **(kwargs or {}))
        if direction == "forward" and runs_backward():
            self._repeat(out[-1])
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type == self.device.type:
                self._track(x)
        return out

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Count storages created in this context as host memory."""
        self._to_host = True
        try:
            yield
        finally:
            self._to_host = False

    def _exclude(self, x: Tensor) -> None:
        """Exclude a storage created before the context, and its views, until it is freed and its address may be reused."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._sizes and key not in self._older:
            self._older.add(key)
            weakref.finalize(storage, self._older.discard, key).atexit = False

    def _track(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes or key in self._older or key in self._repeated:
            return
        self._sizes[key] = size, self._to_host
        weakref.finalize(storage, self._freed, key).atexit = False
        if self._to_host:
            self._host_alive += size
            self.host = max(self.host, self._host_alive)
            return
        self.alive += size
        self._note(self.alive)

    def _repeat(self, received: Tensor) -> None:
        """Count the buffer, from the pool in `runtime.arenas`, that a recomputed pass received into for its backward pass."""
        storage = received.untyped_storage()
        if storage._cdata not in self._repeated:
            self._repeated[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._repeated.pop, storage._cdata).atexit = False
        self._most_repeated = max(self._most_repeated, sum(self._repeated.values()))

    def _note(self, alive: int) -> None:
        self.peaks[self.section] = max(self.peaks[self.section], alive)

    def _freed(self, key: int) -> None:
        size, on_host = self._sizes.pop(key)
        if on_host:
            self._host_alive -= size
        else:
            self.alive -= size


class CountingOffload(HostOffload):
    """An offload for a device without streams. A watch counts its copies as host memory."""

    def __init__(self, watch: AllocationWatch, in_flight: int = 2):
        super().__init__(in_flight)
        self._watch = watch

    def put(self, x: Tensor) -> Ticket:
        """Copy a tensor as `HostOffload.put` does, and count the copy as host memory."""
        with self._watch.on_host():
            return super().put(x)


def count_step(watch: AllocationWatch, model: nn.Module, parts: Mapping[nn.Module, str], forward: Any) -> RankCounts:
    """Count the memory of a step whose weight gradients are dropped immediately. forward: returns the loss to differentiate.

    parts: the modules that are sections of the step, one of them the loss. A section is the module's forward pass and, in the
    backward pass, the time between the gradients of its outputs and of its inputs.
    """

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    saved: list[int] = []
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(drop) for parameter in parameters]
    for module, name in parts.items():
        hooks += _mark(watch, module, name)
        if name == LOSS:
            hooks.append(module.register_forward_pre_hook(lambda *_: saved.append(watch.alive)))
    try:
        with watch:
            forward().backward()
    finally:
        for hook in hooks:
            hook.remove()
    working = {name: max(peak - saved[0], 0) for name, peak in watch.peaks.items()}
    return RankCounts(saved[0], watch.arena, working, watch.host)


def _mark(watch: AllocationWatch, module: nn.Module, name: str) -> list[Any]:
    """Make a module's passes a section of a watch, and return the hooks. After recomputation, the outer section resumes."""
    before: list[str] = []

    def enter(*_: Any) -> None:
        before.append(watch.section)
        watch.section = name

    def leave(module: nn.Module, inputs: Any, out: Any) -> None:
        # work on the logits after the module also belongs to the loss
        watch.section = name if name == LOSS else before.pop()
        y = out[0] if isinstance(out, tuple) else out
        # a recomputation may end early, without output
        if isinstance(y, Tensor) and y.requires_grad:
            y.register_hook(lambda gradient: setattr(watch, "section", name))
            for x in inputs:
                if isinstance(x, Tensor) and x.requires_grad:
                    x.register_hook(lambda gradient: setattr(watch, "section", OTHER))

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


class PlannedAttention:
    """A batch's attention with a single executable. It need not be runnable, since nothing is computed on meta tensors."""

    used = True
    # any length is fine, since rotary frequencies have no values on the meta device
    longest_document = 1

    def __init__(self, executable: Executable):
        self.executable = executable

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, **options: Any) -> Tensor:
        """Return `distattn.attention` of this rank's tokens, (T, heads, dim). All layers have the same shape."""
        modifiers = {name: value for name, value in options.items() if name not in ("window", "layer")}
        out: Tensor = attention(q, k, v, self.executable, scale=scale, **modifiers)
        return out

    def latent_attention(
        self, q: Tensor, rope: Tensor, latent: Tensor, up: Tensor, scale: float | None = None, **options: Any
    ) -> Tensor:
        """Return `distattn.latent_attention` of this rank's tokens, (T, heads, dim)."""
        out: Tensor = latent_attention(q, rope, latent, up, self.executable, scale=scale)
        return out

    def check_positions(self, positions: Tensor) -> None:
        """Accept any positions, since positions on the meta device have no values."""
