"""Copies of a state's tensors in host memory, whose buffers are reused by the next save."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

from distattn.checkpoints.pickled_names import check_value
from distattn.ir.errors import DistattnError
from distattn.kernels.devices import has_streams
from distattn.memory import pinned_memory

# the maximum number of copies that `HostBuffers.keep` has in flight
_IN_FLIGHT = 2
# immutable types, whose values need no copy
_PLAIN = (int, float, complex, bool, str, bytes, type(None))


class HostBuffers:
    """Host buffers for copies of tensors, keyed by tensor name. Buffers for GPU tensors are pinned."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        # the names of buffers that `keep` has returned since the last save, keyed by the buffer's id
        self._kept: dict[int, str] = {}
        self._streams: dict[torch.device, Any] = {}
        # tensors that `keep` is copying, each with the event recorded after its copy, oldest first
        self._leaving: deque[tuple[torch.Tensor, Any]] = deque()

    def keep(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor into its buffer and return the buffer. The caller may drop the tensor immediately.

        On a GPU, the copy overlaps with other work on the device. At most two copies are in flight: after a third is queued, the
        current stream waits for the oldest. Call `finish_kept` after the last tensor.
        """
        source = tensor.detach()
        buffer = self.like(name, source)
        self._kept[id(buffer)] = name
        if not has_streams(source.device):
            buffer.copy_(source)
            return buffer
        if source.device not in self._streams:
            self._streams[source.device] = torch.cuda.Stream(source.device)
        stream = self._streams[source.device]
        stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(stream):
            buffer.copy_(source, non_blocking=True)
            self._leaving.append((source, stream.record_event()))
        while len(self._leaving) > _IN_FLIGHT:
            self._leave()
        return buffer

    def build_state(self, state: dict[str, Any] | Callable[[HostBuffers], dict[str, Any]]) -> dict[str, Any]:
        """Return the state, or the result of calling it with these buffers. Make the current stream wait for `keep`'s copies."""
        state_dict = state(self) if callable(state) else state
        self.finish_kept()
        return state_dict

    def finish_kept(self) -> None:
        """Make the current stream wait for `keep`'s copies, so that later work on that stream may change the tensors."""
        while self._leaving:
            self._leave()

    def _leave(self) -> None:
        source, event = self._leaving.popleft()
        torch.cuda.current_stream(source.device).wait_event(event)

    def wait_kept(self) -> None:
        """Wait until all copies by `keep` are complete."""
        for stream in self._streams.values():
            stream.synchronize()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is a buffer that `keep` returned since the last save."""
        # an id may be reused once its buffer is gone
        return self._buffers.get(self._kept.get(id(tensor), "")) is tensor

    def like(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the host buffer for a tensor, with the tensor's shape and dtype."""
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = (
                pinned_memory.pinned_like(tensor)
                if has_streams(tensor.device)
                else torch.empty_like(tensor, device="cpu")
            )
            self._buffers[name] = buffer
        return buffer

    def forget_others(self, names: set[str]) -> None:
        """Drop all buffers except those whose names are in `names` and those that `keep` has returned since the last save."""
        names = names | set(self._kept.values())
        self._buffers = {name: buffer for name, buffer in self._buffers.items() if name in names}
        self._kept = {}


class StagedState(DefaultSavePlanner):
    """A snapshot of a state: a DCP save planner that takes the values from copies in host memory.

    Create it on the training thread. `copy_tensors` may run on another thread. No tensor may change until it returns.
    """

    def __init__(self, state: dict[str, Any], is_coordinator: bool, buffers: HostBuffers):
        super().__init__()
        self.set_up_planner(state, is_coordinator=is_coordinator)
        self._staged: dict[str, Any] = {}
        self._buffers = buffers
        self._refusal: DistattnError | None = None
        # (name, tensor, count of in-place changes)
        self._sources: list[tuple[str, torch.Tensor, int]] = []
        signature: list[tuple[Any, ...]] = []
        for name, value in self.state_dict.items():
            if not isinstance(value, torch.Tensor):
                try:
                    self._staged[name] = value if type(value) in _PLAIN else _copied(name, value)
                except DistattnError as error:
                    # let `copy_tensors` raise it, since its errors are raised on all ranks
                    self._refusal = self._refusal or error
                signature.append((name,))
                continue
            if buffers.holds(value):
                self._staged[name] = value
                signature.append((name, value.shape, value.dtype, value.shape))
                continue
            local = value.detach()
            local = local.to_local() if isinstance(local, DTensor) else local
            self._sources.append((name, local, local._version))
            where = (value.device_mesh, value.placements) if isinstance(value, DTensor) else ()
            signature.append((name, value.shape, value.dtype, local.shape, *where))
        # states with equal signatures have the same DCP plan
        self.signature = tuple(signature)
        # copies start after all work submitted to the device so far, and overlap with later work
        self._streams = {
            local.device: torch.cuda.Stream(local.device) for _, local, _ in self._sources if local.is_cuda
        }
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))

    def copy_tensors(self) -> None:
        """Copy all tensors. Raises DistattnError if a tensor was changed in the meantime or another value cannot be saved."""
        if self._refusal is not None:
            raise self._refusal
        sources = self._sources
        for name, local, _ in sources:
            buffer = self._buffers.like(name, local)
            if local.is_cuda:
                with torch.cuda.stream(self._streams[local.device]):
                    buffer.copy_(local, non_blocking=True)
            else:
                buffer.copy_(local)
            self._staged[name] = buffer
        for stream in self._streams.values():
            stream.synchronize()
        self._buffers.wait_kept()
        changed = [name for name, local, version in sources if local._version != version]
        # release the device memory
        self._sources = []
        self._buffers.forget_others({name for name, _, _ in sources})
        if changed:
            raise DistattnError(
                f"{changed[0]} was changed while it was copied for a checkpoint; call wait_staged() before whatever changes it."
            )

    def forget_originals(self) -> None:
        """Drop the original tensors, which `create_local_plan` needs but writing does not."""
        self.state_dict = {}

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the copy that DCP writes. For a tensor sharded over ranks, it is this rank's part."""
        return self._staged[index.fqn]


def _copied(name: str, value: Any) -> Any:
    """Return a copy of a non-tensor value. Raises DistattnError if the value could not be read back safely."""
    pickled = io.BytesIO()
    try:
        torch.save(value, pickled)
        check_value(Path(name), pickled)
        pickled.seek(0)
        return torch.load(pickled, weights_only=True)
    # a value that cannot be pickled may raise almost any error
    except Exception:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise DistattnError(
            f"{name} ({kind}) cannot be read again without unpickling more than plain values; a state has tensors, numbers, "
            "texts, and lists, tuples and dictionaries of them."
        ) from None
