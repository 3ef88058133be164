"""A layer call of one rank on meta tensors, at full size: which operators run around the kernels, what they move, and the peak.

Nothing is computed, so a million tokens take a moment. An operator that would make a GPU's host wait, or copy between the two,
is an error.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distattn.ir.plan import Plan
from distattn.ops.attention import backward_pass, forward_pass
from distattn.parallel.analysis.verify import Proof
from distattn.parallel.runtime import execute
from distattn.parallel.runtime.program import lower, on_device
from distattn.parallel.runtime.transport import GroupTransport

META = torch.device("meta")
_SYNCHRONISE = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero")
# read or write nothing, or only their result's shape
_FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias")


@dataclass
class Traffic:
    """What one pass does around its kernels. launches: of operators; bytes: read and written by them; peak: of new tensors."""

    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    kernels: int = 0
    messages: int = 0

    def seconds(self, bytes_per_second: float = 2.5e12) -> float:
        return sum(self.bytes.values()) / bytes_per_second


class Watch(TorchDispatchMode):
    """Counts what passes through PyTorch's dispatcher."""

    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic, self._alive, self._storages = traffic, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        assert name not in _SYNCHRONISE, f"{name} waits for the device"
        kinds = {x.device.type for x in (*given, *made)}
        assert kinds != {"cpu", "meta"}, f"{name} copies between host and device"
        assert not (name.startswith("index") and any(x.dtype == torch.bool for x in given)), (
            f"{name} counts on the host"
        )
        before = {x.untyped_storage()._cdata for x in given}
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
        if key in self._storages:
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


class MetaKernel:
    """Results of the right shapes, in the way of the GPU kernels."""

    DIFFERENTIABLE_LSE = ACCUMULATES = True

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, q, k, v, schedule, score, into=None, merge=False):  # noqa: ANN001
        self.calls += 1
        o = q.new_empty(*q.shape[:2], v.shape[2], dtype=torch.float32)
        return into or (o, q.new_empty(q.shape[:2], dtype=torch.float32))

    def backward(self, do, q, k, v, lse, delta, schedule, score, into=(None, None), add=(False, False)):  # noqa: ANN001
        self.calls += 1
        # log-sum-exp and delta by head
        lse.new_empty(2, q.shape[1], (len(q) // 256 + 2) * 256)
        dq = q.new_empty(q.shape, dtype=torch.float32) if into[0] is None else into[0]
        dk, dv = into[1] or (x.new_empty(x.shape, dtype=torch.float32) for x in (k, v))
        return dq, dk, dv


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


_GROUP = _Group()


def layer_call(plan: Plan, rank: int, proof: Proof | None = None) -> tuple[Traffic, Traffic, int]:
    """(forward, backward, bytes that stay from the one to the other) of a rank's layer call."""
    program = on_device(lower(plan, rank, lambda mask: None, proof), META)
    call, kernel, backend = plan.call, MetaKernel(), MetaBackend()
    ready: Any = SimpleNamespace(
        program=program,
        key=SimpleNamespace(device=META, kernel="triton"),
        kernel=kernel,
        transport=GroupTransport(_GROUP, backend),  # type: ignore[arg-type]
        begin_pass=lambda direction, score: None,
    )

    def tensor(heads: int, width: int) -> Tensor:
        return torch.empty(program.tokens, heads, width, dtype=getattr(torch, call.dtype), device=META)

    q, k = tensor(call.heads, call.head_dim), tensor(call.kv_heads, call.head_dim)
    v, do = tensor(call.kv_heads, call.v_head_dim), tensor(call.heads, call.v_head_dim)
    passes = []

    def watched(run: execute.PausableRun[Any]) -> Any:
        traffic, before = Traffic(), (kernel.calls, backend.messages)
        with Watch(traffic) as watch:
            result = execute.run_to_completion(run)
            kept = watch._alive
        traffic.kernels, traffic.messages = kernel.calls - before[0], backend.messages - before[1]
        passes.append(traffic)
        return result, kept

    (o, lse, kept), stays = watched(forward_pass(ready, q, k, v, None, None, 0.1, 0.0))
    watched(backward_pass(ready, do, None, q, k, v, None, None, o, lse, kept, 0.1, 0.0))
    return passes[0], passes[1], stays
