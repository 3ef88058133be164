"""The state digest: weights and optimizer state must not change between an update and the next; where they do, memory is damaged.

A bit that flips in a weight between two steps is trained like any other value: the loss moves a little, or a lot, and goes on.
So every rank digests its shard of weights and optimizer state right after an update, and again right before the next. A
difference names the rank and the tensor, and the run goes back to a checkpoint. One digest reads every byte of the shard once.
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
from distattn.parallel.runtime.communicator import sendable_device
from distattn.training.engines.engine import COUNTS, WEIGHT, StateTensor
from distattn.training.module_observer import gathered, local_part, plain_name
from distattn.training.replay_check import row_sums

# changes of one rank in one process that end the run: repeated ones are not chance
MOST_OF_ONE_RANK = 3
# devices whose memory is hashed by the processor
_HOST = ("cpu",)


class Damage(NamedTuple):
    """State that changed though no update was taken. text: a sentence for people; step: number of the step before whose update it
    was found; ranks: whose state it was; tensors: the first of each of these ranks; repeats: whether a rank had it several times.
    """

    step: int
    text: str
    ranks: tuple[int, ...]
    tensors: tuple[str, ...]
    repeats: bool


class StateDigest:
    """Compares a state with what the last update left. All ranks of `group` call alike; None is this process alone.

    tensors: returns this rank's part of weights and optimizer state, such as `state_tensors` does; their memory is read, and
    nothing is kept of it but a number for each tensor.
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
        """Digest the state as it is now. after: what has changed it last, such as "the update of step 41"."""
        self._taken, self._after = _digests(self._tensors()), after

    def forget(self) -> None:
        """Compare nothing until `take` is called: the state is about to change."""
        self._taken = None

    @torch.no_grad()
    def changed(self) -> list[str]:
        """Return the names of this rank's tensors that have changed since `take`; none where nothing was taken.

        Nothing is sent, but a device is waited for. A rank that finds any must have all ranks call `explain`.
        """
        if self._taken is None:
            return []
        self.comparisons += 1
        return self._taken.changed(_digests(self._tensors()))

    def compare(self, step: int, until: str = "") -> Damage | None:
        """Return what has changed since `take` on any rank, on all ranks the same; None where nothing has. A collective call.

        step, until: as for `explain`.
        """
        if self._taken is None:
            return None
        changed = self.changed()
        return self.explain(step, changed, until) if self.tell(bool(changed))() else None

    def tell(self, changed: bool) -> Callable[[], bool]:
        """Begin to tell all ranks whether this one has found a change; return a function that waits, and says whether any has.

        A collective call; ranks may send other things meanwhile, so that the two are under way at once. Where nothing was taken
        nothing is sent.
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
        """Return what has changed on any rank, None where nothing has. A collective call.

        step: the number of the step, from 0. changed: what `changed` returned. until: before what it was found, by default the
        update of the step.
        """
        changed_by_rank = gathered(self._group, (changed, socket.gethostname()))
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
    """Yield this rank's parts of parameters and of what an optimizer of PyTorch keeps of them, its counts of steps among them.

    For models that are whole on a rank, such as DDP's, and for those that FSDP2 shards.
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
        # one digest for all counts, which have four bytes each
        yield COUNTS, "", torch.stack(counts)


class _Digests(NamedTuple):
    """host: of each tensor in the host's memory, by its kind and name. names, ends: tensors of a device, and where the sums of
    their rows end in `device`, int64 on it: one kernel a tensor, since launches of small ones would cost more than the memory.
    """

    host: dict[tuple[str, str], int]
    names: list[tuple[str, str]]
    ends: list[int]
    device: Tensor | None

    def changed(self, now: _Digests) -> list[str]:
        """Return the names of tensors whose digest has changed, or that are gone."""
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
    """Return the memory of a tensor on the host; that of a copy where the tensor is not contiguous."""
    whole = tensor.contiguous()
    # numpy does not know bfloat16
    return (whole if whole.dtype in (torch.float32, torch.float64) else whole.reshape(-1).view(torch.uint8)).numpy()
