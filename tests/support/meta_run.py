"""A layer call of one rank on meta tensors, at full size: which operators run around the kernels, what they move, and the peak.

Nothing is computed, so a million tokens take a moment. An operator that would make a GPU's host wait, or copy between the two,
is an error.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import meta_kernel
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from waits import META, wait_of

from distattn.ir.plan import Plan
from distattn.kernels.registry import KERNELS
from distattn.ops import latent
from distattn.ops.attention import backward_pass, forward_pass
from distattn.ops.executable import Executable, checked_program
from distattn.parallel.runtime import execute
from distattn.parallel.runtime.transport import GroupTransport

# read or write nothing, or only their result's shape
_FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias")


@dataclass
class Traffic:
    """What one pass does around its kernels. launches: of operators; bytes: read and written by them; peak: of new tensors.

    said: the peak that is known before the pass.
    """

    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    said: int = 0
    kernels: int = 0
    messages: int = 0

    def seconds(self, bytes_per_second: float = 2.5e12) -> float:
        return sum(self.bytes.values()) / bytes_per_second


class Watch(TorchDispatchMode):
    """Counts what passes through PyTorch's dispatcher."""

    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic, self._alive, self._storages = traffic, 0, {}
        self._older: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        assert (wait := wait_of(func, args, kwargs, made)) is None, wait
        before = {x.untyped_storage()._cdata for x in given}
        # a view of what was there is not new
        self._older |= before - self._storages.keys()
        in_place = name.endswith("_") or name.startswith("_index_put") or "out" in (kwargs or {})
        view = bool(made) and not in_place and all(x.untyped_storage()._cdata in before for x in made)
        if not view and name not in _FREE:
            self.traffic.launches[name] += 1
            self.traffic.bytes[name] += _row_bytes(name, args) or (
                sum(x.nbytes for x in given) + (0 if in_place else sum(x.nbytes for x in made))
            )
        for x in made:
            self._track(x)
        return out

    def _track(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or key in self._older:
            return
        self._storages[key] = size
        self._alive += size
        self.traffic.peak = max(self.traffic.peak, self._alive)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._alive -= self._storages.pop(key)


def _row_bytes(name: str, args: tuple[Any, ...]) -> int:
    """What the operators of `kernels.glue` read and write: some rows, not whole tensors."""
    if name not in ("copy_rows", "add_rows", "merge_rows"):
        return 0
    count, tensors = args[-1], [x for x in args if isinstance(x, Tensor) and x.dtype.is_floating_point]
    row = [x[:1].numel() * x.element_size() for x in tensors]
    # results are read before they are added to, or merged into; they come first
    read_too = {"copy_rows": 0, "add_rows": 1, "merge_rows": 2}[name]
    return int(count * (sum(row) + sum(row[:read_too])))


class MetaBackend:
    """Takes messages as NCCL does, and delivers nothing."""

    supports_coalescing = True

    def __init__(self) -> None:
        self.messages = 0

    def _start_coalescing(self) -> None:
        return None

    def _end_coalescing(self) -> MetaBackend:
        return self

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> None:
        assert tensors[0].is_contiguous() and tensors[0].device == META
        self.messages += 1

    recv = send

    def wait(self) -> None:
        return None


class _Group:
    """Stands for a process group."""


GROUP = _Group()


def layer_call(plan: Plan, rank: int) -> tuple[Traffic, Traffic, int]:
    """(forward, backward, bytes that stay from the one to the other) of a rank's layer call, made ready as `prepare` does."""
    call, backend = plan.call, MetaBackend()
    with mock.patch.dict(KERNELS, {"meta": "meta_kernel"}):
        key, program = checked_program(plan, rank, "meta", META, max_buffer_bytes=None, proven=True)
        ready = Executable(program, key, GroupTransport(GROUP, backend))  # type: ignore[arg-type]
        said = ready.memory()

    def tensor(heads: int, width: int, rows: int | None = None) -> Tensor:
        """(rows, heads, width), by default of this rank's tokens."""
        shape = (program.tokens if rows is None else rows, heads, width)
        return torch.empty(*shape, dtype=getattr(torch, call.dtype), device=META)

    q, do = tensor(call.heads, call.head_dim), tensor(call.heads, call.v_head_dim)
    k, v = (tensor(call.kv_heads, width) for width, _ in call.op.fields(call.head_dim, call.v_head_dim)["KV"])
    passes = []

    def watched(run: Callable[[], Any]) -> Any:
        traffic, before = Traffic(), (len(meta_kernel.CALLS), backend.messages)
        with Watch(traffic) as watch:
            result = run()
            kept = watch._alive
        traffic.kernels, traffic.messages = len(meta_kernel.CALLS) - before[0], backend.messages - before[1]
        passes.append(traffic)
        return result, kept

    if call.op.kind == "latent_attention":
        up = tensor(call.head_dim - call.op.rotary_dim + call.v_head_dim, call.op.latent_dim, rows=call.heads)
        facts = ready.handle, ready.kept_elements, 0.1
        (o, lse, kept), stays = watched(lambda: latent._forward(q, k, v, up, *facts))
        watched(lambda: latent._backward(do, q, k, v, up, o, lse, kept, ready.handle, 0.1))
    else:
        ahead = forward_pass(ready, q, k, v, None, None, 0.1, 0.0)
        (o, lse, kept), stays = watched(lambda: execute.run_to_completion(ahead))
        back = backward_pass(ready, do, None, q, k, v, None, None, o, lse, kept, 0.1, 0.0)
        watched(lambda: execute.run_to_completion(back))
    for direction, traffic in zip(said, passes, strict=True):
        traffic.said = said[direction].peak
    return passes[0], passes[1], stays
