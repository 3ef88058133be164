"""What a run needs on a rank's device, by kind: weights by arithmetic, activations by running the model on meta tensors.

A step of a model on the meta device allocates what the same step allocates on a GPU, and computes nothing. `AllocationWatch`
counts that. What an attention pass has inside is known of its executable to the byte (`Executable.memory()`, the kernel's own
memory left out where the kernel is not here to tell).
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

# parts of a step
ATTENTION, FEED_FORWARD, LOSS, OTHER = "attention", "feed-forward", "loss", "other"
SECTIONS = (ATTENTION, FEED_FORWARD, LOSS, OTHER)
# the operators of attention, and the number of their argument that names the plan's executable
_PASSES = {
    "distattn::forward": ("forward", 5),
    "distattn::backward": ("backward", 10),
    "distattn::latent_forward": ("forward", 4),
    "distattn::latent_backward": ("backward", 8),
}


class StateBytes(NamedTuple):
    """Bytes a rank has of the weights' state all the time, and of whole layers while they are computed (FSDP2).

    gathered: weights of two layers, one of them on its way, and those that belong to no layer. reduced: gradients of a layer and
    their copy that is being summed over ranks, and those of the weights of no layer, until the end of the step.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    reduced: int

    @staticmethod
    def of(model: nn.Module, layers: list[nn.Module], ranks: int, *, master_weights: bool) -> StateBytes:
        """Of a model whose parameters are sharded over so many ranks, with AdamW.

        master_weights: parameters, gradients and both moments are fp32, and layers are gathered in the model's dtype; else all of
        it is in that.
        """
        whole = sum(one.numel() for one in model.parameters())
        widest = max((sum(one.numel() for one in layer.parameters()) for layer in layers), default=0)
        rest = whole - sum(one.numel() for layer in layers for one in layer.parameters())
        narrow = next(model.parameters()).element_size()
        wide = 4 if master_weights else narrow
        shard = -(-whole // ranks)
        gathered = (2 * widest + rest) * narrow
        reduced = widest * (narrow + wide) + rest * narrow
        return StateBytes(shard * wide, shard * wide, 2 * shard * wide, gathered, reduced)


class RankCounts(NamedTuple):
    """Bytes of activations. saved: on the device between the last layer and the loss, for the backward pass.

    arena: what attention keeps between passes, and from step to step: the largest arena, and where layers are repeated in the
    backward pass, what they receive for their own.
    working: by section, what is alive at its worst moment besides both; they are not there at once. host: in pinned memory.
    """

    saved: int
    arena: int
    working: dict[str, int]
    host: int


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device of ranks that have equally many tokens, of the one that needs most; host: in pinned memory."""

    ranks: tuple[int, ...]
    tokens: int
    state: StateBytes
    counts: RankCounts
    host: int

    @property
    def total(self) -> int:
        """The most that is there at once."""
        return sum(self.state) + self.counts.saved + self.counts.arena + max(self.counts.working.values())


class AllocationWatch(TorchDispatchMode):
    """Counts the storages that are made in its context on one device and alive, and the most of them by section.

    alive: bytes at this moment. peaks: the most by section. arena: see `RankCounts`; it is in neither of them.
    host: the most bytes that a `CountingOffload` had on the host.
    """

    def __init__(self, device: torch.device | str = "meta") -> None:
        super().__init__()
        self.device = torch.device(device)
        self.alive, self.section = 0, OTHER
        self._largest_arena = self._most_repeated = 0
        # bytes that repeated passes have received for their backward, by storage
        self._repeated: dict[int, int] = {}
        self.peaks = dict.fromkeys(SECTIONS, 0)
        self.host = self._host_alive = 0
        self._to_host = False
        self._sizes: dict[int, tuple[int, bool]] = {}
        self._older: set[int] = set()

    @property
    def arena(self) -> int:
        """Bytes that passes keep between them."""
        return self._largest_arena + self._most_repeated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        direction = ""
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._leave_out(x)
        if func.name() in _PASSES:
            direction, number = _PASSES[func.name()]
            executable = EXECUTABLES.by_handle(args[number]).for_direction(direction)
            memory = executable.memory()[direction]
            self._largest_arena = max(self._largest_arena, memory.arena)
            # what a repeated pass receives for its backward is counted with the arena: see `_repeat`
            kept = executable.program.kept_places.bytes if direction == "forward" and runs_backward() else 0
            self._note(self.alive + memory.beside_arena - kept)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # a model that asks for a number, as transformers does whether a batch is packed, gets no
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
        """What is made in here is on the host."""
        self._to_host = True
        try:
            yield
        finally:
            self._to_host = False

    def _leave_out(self, x: Tensor) -> None:
        """What was there before is not counted, nor are views of it, while it lives: its address comes again."""
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

    def _repeat(self, kept: Tensor) -> None:
        """Count what a repeated pass has received for its backward; it lies in memory of the pool (see `runtime.arenas`)."""
        storage = kept.untyped_storage()
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
    """An offload on a device without streams, whose copies a watch counts as the host's."""

    def __init__(self, watch: AllocationWatch, in_flight: int = 2):
        super().__init__(in_flight)
        self._watch = watch

    def put(self, x: Tensor) -> Ticket:
        """See `HostOffload.put`."""
        with self._watch.on_host():
            return super().put(x)


def count_step(watch: AllocationWatch, model: nn.Module, parts: Mapping[nn.Module, str], forward: Any) -> RankCounts:
    """Count a step: `forward()` makes the loss, which goes backward. Gradients of weights are dropped as they come.

    parts: modules that are sections of the step, one of them the loss: their forward passes, and what comes between the gradients
    of their outputs and of their inputs.
    """

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    saved: list[int] = []
    hooks = [one.register_post_accumulate_grad_hook(drop) for one in model.parameters() if one.requires_grad]
    for module, name in parts.items():
        hooks += _mark(watch, module, name)
        if name == LOSS:
            hooks.append(module.register_forward_pre_hook(lambda *_: saved.append(watch.alive)))
    try:
        with watch:
            forward().backward()
    finally:
        for one in hooks:
            one.remove()
    working = {name: max(peak - saved[0], 0) for name, peak in watch.peaks.items()}
    return RankCounts(saved[0], watch.arena, working, watch.host)


def _mark(watch: AllocationWatch, module: nn.Module, name: str) -> list[Any]:
    """Hooks that make a module's passes a section of a watch; a repeated forward pass returns to the section that it is in."""
    before: list[str] = []

    def enter(*_: Any) -> None:
        before.append(watch.section)
        watch.section = name

    def leave(module: nn.Module, given: Any, out: Any) -> None:
        # what becomes of logits is the loss, too
        watch.section = name if name == LOSS else before.pop()
        y = out[0] if isinstance(out, tuple) else out
        # a repetition may end early, without output
        if isinstance(y, Tensor) and y.requires_grad:
            y.register_hook(lambda gradient: setattr(watch, "section", name))
            for x in given:
                if isinstance(x, Tensor) and x.requires_grad:
                    x.register_hook(lambda gradient: setattr(watch, "section", OTHER))

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


class PlannedAttention:
    """Attention of a batch by one executable, which need not be able to run: on meta tensors nothing is."""

    used = True
    # any length: frequencies of positions have no values
    longest_document = 1

    def __init__(self, executable: Executable):
        self.executable = executable

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, **how: Any) -> Tensor:
        """`distattn.attention` of this rank's tokens (T, heads, dim); all layers have one shape."""
        modifiers = {name: value for name, value in how.items() if name not in ("window", "layer")}
        out: Tensor = attention(q, k, v, self.executable, scale=scale, **modifiers)
        return out

    def latent_attention(
        self, q: Tensor, rope: Tensor, latent: Tensor, up: Tensor, scale: float | None = None, **how: Any
    ) -> Tensor:
        """`distattn.latent_attention` of this rank's tokens (T, heads, dim)."""
        out: Tensor = latent_attention(q, rope, latent, up, self.executable, scale=scale)
        return out

    def check_positions(self, given: Tensor) -> None:
        """Positions are of no matter."""
