"""The state digest: detects weights and optimizer state that change between two updates because memory is damaged.

Training would silently continue from a weight whose bit flips between two steps. So every rank hashes its shard of
weights and optimizer state right after an update, and again right before the next one. A difference identifies the rank
and the tensor, and the run goes back to a checkpoint. Each digest reads every byte of the shard once.
"""

from __future__ import annotations

import socket
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from distattn.ir.errors import named_ranks
from distattn.parallel.runtime.communication.communicator import sendable_device
from distattn.training.engines.engine import COUNTS, WEIGHT, StateTensor
from distattn.training.watch.module_observer import gather_values, local_part, plain_name
from distattn.training.watch.replay_check import row_sums

# the run ends after this many changes on one rank in one process: repeated changes are no coincidence
MOST_OF_ONE_RANK = 3
# device types whose memory the CPU hashes
_HOST = ("cpu",)


class Damage(NamedTuple):
    """A change of the state without an update. step: the change was found before the update of this step.

    text: a sentence for the user. ranks: the ranks whose state changed. tensors: the first changed tensor of each of these
    ranks. repeats: True if one rank has had MOST_OF_ONE_RANK changes.
    """

    step: int
    text: str
    ranks: tuple[int, ...]
    tensors: tuple[str, ...]
    repeats: bool


class StateDigest:
    """Compares the state with its digest after the last update. All ranks of `group` must make the same calls.

    group: None for a single process. tensors: returns this rank's shard of weights and optimizer state, as `state_tensors`
    does. Only digests are kept.
    """

    def __init__(self, tensors: Callable[[], Iterable[StateTensor]], group: dist.ProcessGroup | None = None):
        self._tensors, self._group = tensors, group
        self._rank = 0 if group is None else dist.get_rank(group)
        self._taken: _Digests | None = None
        self._after = ""
        self._found: Counter[int] = Counter()
        self.comparisons = 0

    @torch.no_grad()
    def take(self, after: str) -> None:
        """Hash the current state. after: what changed the state last, such as "the update of step 41"."""
        self._taken, self._after = _digests(self._tensors()), after

    def forget(self) -> None:
        """Discard the digest, because the state is about to change. Nothing is compared until the next `take`."""
        self._taken = None

    @torch.no_grad()
    def changed(self) -> list[str]:
        """Return the names of this rank's tensors that changed since `take`; an empty list before the first `take`.

        Synchronizes with the device, but does not communicate. If any rank finds a change, all ranks must call `explain`.
        """
        if self._taken is None:
            return []
        self.comparisons += 1
        return self._taken.changed(_digests(self._tensors()))

    def compare(self, step: int, until: str = "") -> Damage | None:
        """Describe the change since `take` on any rank; None if no state changed. Equal on all ranks. A collective call.

        step, until: see `explain`.
        """
        if self._taken is None:
            return None
        changed = self.changed()
        return self.explain(step, changed, until) if self.share(bool(changed))() else None

    def share(self, changed: bool) -> Callable[[], bool]:
        """Start sharing whether this rank found a change. Returns a function that waits and returns whether any rank did.

        A collective call. Ranks may send other messages before they call that function. Sends nothing before the first `take`.
        """
        if self._taken is None or self._group is None or dist.get_world_size(self._group) == 1:
            return lambda: changed
        flag = torch.tensor(int(changed), device=sendable_device(self._group))
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None

        def told() -> bool:
            work.wait()
            return bool(flag)

        return told

    def explain(self, step: int, changed: list[str], until: str = "") -> Damage | None:
        """Describe the change found on any rank; None if no state changed. A collective call.

        step: counted from 0. changed: the result of `changed`. until: the event by which the change was found, by
        default the update of the step.
        """
        changed_by_rank = gather_values(self._group, (changed, socket.gethostname()))
        ranks = tuple(rank for rank, (names, _) in enumerate(changed_by_rank) if names)
        if not ranks:
            return None
        self._found.update(ranks)
        changes = []
        for rank in ranks:
            names, host = changed_by_rank[rank]
            others = f" and {len(names) - 1:,} more tensors" if names[1:] else ""
            changes.append(f"rank {rank} on {host}: {names[0]}{others}")
        text = (
            f"{'; '.join(changes)} changed between {self._after} and {until or f'the update of step {step + 1}'}, though only an "
            f"update may change it: memory of {named_ranks(ranks)} is damaged, or something writes into it."
        )
        repeats = max(self._found[rank] for rank in ranks) >= MOST_OF_ONE_RANK
        return Damage(step, text, ranks, tuple(changed_by_rank[rank][0][0] for rank in ranks), repeats)


def state_tensors(
    named_parameters: Iterable[tuple[str, Tensor]], optimizer: torch.optim.Optimizer
) -> Iterator[StateTensor]:
    """Yield this rank's shards of the parameters and of a PyTorch optimizer's state, including its step counts.

    The model may be replicated, as by DDP, or sharded by FSDP2.
    """
    counts: list[Tensor] = []
    for name, parameter in named_parameters:
        yield WEIGHT, name, local_part(parameter)
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                part = local_part(value)
                if part.dim():
                    yield kind, name, part
                else:
                    counts.append(part)
    if counts:
        # all step counts, of four bytes each, share one digest
        yield COUNTS, "", torch.stack(counts)


class _Digests(NamedTuple):
    """Digests of tensors. host: digests of the tensors in host memory, keyed by (kind, name).

    device: row sums of all tensors on the device, int64. names, ends: the names of those tensors, and the index in
    `device` at which each tensor's sums end. Each tensor takes one kernel, since launching more for small tensors would
    take longer than reading the memory.
    """

    host: dict[tuple[str, str], int]
    names: list[tuple[str, str]]
    ends: list[int]
    device: Tensor | None

    def changed(self, now: _Digests) -> list[str]:
        """Return the names of tensors whose digest changed or that are missing now."""
        different = [name for name, digest in self.host.items() if now.host.get(name) != digest]
        if self.device is not None:
            if (now.names, now.ends) != (self.names, self.ends) or now.device is None:
                different += self.names
            else:
                rows = (self.device != now.device).nonzero().flatten().tolist()
                different += [self.names[at] for at in sorted({bisect_right(self.ends, row) for row in rows})]
        return [f"{kind} {plain_name(name)}".rstrip() for kind, name in different]


def _digests(tensors: Iterable[StateTensor]) -> _Digests:
    host: dict[tuple[str, str], int] = {}
    names: list[tuple[str, str]] = []
    sums: list[Tensor] = []
    for kind, name, tensor in tensors:
        if not tensor.numel():
            continue
        if tensor.device.type in _HOST:
            host[kind, name] = xxhash.xxh3_64_intdigest(_bytes_of(tensor))
        else:
            names.append((kind, name))
            sums.append(row_sums(tensor))
    return _Digests(host, names, list(accumulate(map(len, sums))), torch.cat(sums) if sums else None)


def _bytes_of(tensor: Tensor) -> Any:
    """Return the bytes of a host tensor as a numpy array, copied only if the tensor is not contiguous."""
    contiguous = tensor.contiguous()
    # numpy has no bfloat16
    return (
        contiguous if contiguous.dtype in (torch.float32, torch.float64) else contiguous.reshape(-1).view(torch.uint8)
    ).numpy()
