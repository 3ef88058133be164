"""A counter of the bytes that PyTorch functions allocate, for meta tensors, on which nothing is computed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")


class MetaBytes(TorchDispatchMode):
    """A counter of the bytes of meta tensors created in this context: the bytes `alive` now, and their `peak`.

    Memory that operators allocate internally, such as a BLAS library's workspace, is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        # the bytes of each storage, keyed by address; 0 for storages that already existed
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _meta_tensors((args, kwargs)):
            # note the arguments' storages first, so that results that are views of arguments are not counted
            self._note(tensor.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for tensor in _meta_tensors(result):
            self._note(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return result

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._bytes:
            self._bytes[key] = size
            self.alive += size
            self.peak = max(self.peak, self.alive)
            # forget freed storages, because their addresses may be reused
            weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.alive -= self._bytes.pop(key)


def _meta_tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device == META]
