"""Our own communicators alongside a process group: they have the same ranks, but carry only our messages.

A communicator is created from the job's store and the kind of backend that the group has for a device. `new_group` is unsuitable
for two reasons. If the world is bound to devices (`device_id=`), it splits the world's communicator, and ranks outside the group
do not take part in that call. It also keeps the new group until destroy_process_group.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from distattn.ir.errors import DistattnError
from distattn.parallel.runtime.communication.collective_calls import default_store, run_collective
from distattn.parallel.runtime.communication.communicator_end import end_communicator, end_with_group
from distattn.parallel.runtime.communication.sealed_values import seal, unseal

# the time after which PyTorch's own watchdog may kill a waiting process
_WATCHDOG = timedelta(hours=1)
# A new communicator connects each rank with this many neighbours on either side, so in groups of up to 65 ranks it connects
# all pairs. In a larger group, the other pairs connect when a plan first uses them, because connecting all pairs of 240 ranks
# took 3 to 20 minutes (github.com/NVIDIA/nccl-tests/issues/78).
_CONNECTED_NEIGHBOURS = 32
# the number of communicators that this process has opened for each group
_OPENED: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def open_communicator(group: dist.ProcessGroup, device: torch.device, timeout: timedelta) -> Any:
    """Open a backend of the same kind as the group's for messages between devices of `device`'s type. All ranks of the group
    must call this.

    The backend is returned already warmed up (`warm_up`). It ends when `end_communicator` is called, when the group ends, or at
    exit. timeout: the longest wait for other ranks, here and in each message. Raise DistattnError if the group has no suitable
    backend for the device, LostRankError if a rank does not join.
    """
    kind = backend_name(group, device)
    if kind is None or kind != _SENDS_FROM.get(device.type):
        raise DistattnError(
            f"the process group has {kind or 'no backend'} for {device.type} tensors; attention's messages need gloo for the "
            'CPU and nccl for GPUs: init_process_group("cpu:gloo,cuda:nccl").'
        )
    return _opened(group, _OPEN[kind], device, timeout)


def warm_up(backend: Any, rank: int, ranks: int, device: torch.device, timeout: timedelta) -> None:
    """Make a communicator's first calls. All of its ranks must call this. Raise RuntimeError after the timeout.

    NCCL requires all ranks to take part in a communicator's first call, but a step of a plan may involve only some of them.
    NCCL also connects two ranks at their first message, which blocks the host until both take part
    (github.com/NVIDIA/nccl/issues/415).
    """
    first = torch.zeros(1, device=device)
    if not backend.supports_coalescing:
        # gloo connects all pairs when it is created, and its waits have a timeout
        backend.allreduce([first]).wait()
        return
    # Neither of NCCL's two waits has a timeout. `abort` ends the second wait. Whether it also ends the first, in which the
    # communicator is created, has never been tried on GPUs, but all ranks have just shown that they are alive.
    alarm = threading.Timer(timeout.total_seconds(), backend.abort)
    alarm.daemon = True
    alarm.start()
    try:
        backend.allreduce([first]).wait()
        _connect_pairs(backend, rank, ranks, device)
    finally:
        alarm.cancel()


def _connect_pairs(backend: Any, rank: int, ranks: int, device: torch.device) -> None:
    """Exchange one byte with up to _CONNECTED_NEIGHBOURS ranks on either side, all in one call."""
    distances = range(1, min(_CONNECTED_NEIGHBOURS, ranks // 2) + 1)
    peers = sorted({(rank + sign * distance) % ranks for distance in distances for sign in (-1, 1)})
    if not peers:
        return
    sent, received = (torch.zeros(len(peers), dtype=torch.uint8, device=device) for _ in range(2))
    backend._start_coalescing()
    for number, peer in enumerate(peers):
        backend.send([sent[number : number + 1]], peer, 0)
        backend.recv([received[number : number + 1]], peer, 0)
    backend._end_coalescing().wait()


def open_host_communicator(group: dist.ProcessGroup, timeout: timedelta) -> Any:
    """Open a gloo backend for small values between a group's processes, whatever the group's backend. All ranks must call
    this."""
    return _opened(group, _open_gloo, torch.device("cpu"), timeout)


def all_gather_objects_over_gloo(gloo: Any, value: Any) -> list[Any]:
    """Gather every rank's value over a gloo backend, in rank order. Values are pickled (`sealed_values`). All ranks must call
    this."""

    def gather(parts: list[Tensor], mine: Tensor) -> None:
        gloo.allgather([parts], [mine]).wait()

    return _gathered(gather, gloo.size(), torch.device("cpu"), value)


def all_gather_objects(group: dist.ProcessGroup, value: Any) -> list[Any]:
    """Gather every rank's value over a process group, in the group's rank order. All ranks must call this."""

    def gather(parts: list[Tensor], mine: Tensor) -> None:
        dist.all_gather(parts, mine, group=group)

    return _gathered(gather, dist.get_world_size(group), sendable_device(group), value)


def _gathered(
    gather: Callable[[list[Tensor], Tensor], None], ranks: int, device: torch.device, value: Any
) -> list[Any]:
    data = seal(value)
    size = torch.tensor([len(data)], device=device)
    sizes = [torch.empty_like(size) for _ in range(ranks)]
    gather(sizes, size)
    lengths = [int(length) for length in sizes]
    mine = torch.zeros(max(lengths), dtype=torch.uint8)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    mine = mine.to(device)
    gathered = [torch.empty_like(mine) for _ in range(ranks)]
    gather(gathered, mine)
    return [unseal(part.cpu().numpy()[:length].tobytes()) for part, length in zip(gathered, lengths, strict=True)]


def backend_name(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Return the kind of backend, such as "nccl" or "gloo", that a group has for a device, or None if it has no backend.

    `dist.get_backend` does not help here: it may return "undefined" after a plain init_process_group(), or
    "cpu:gloo,cuda:nccl".
    """
    kinds = [kind.type for kind in group._device_types]  # type: ignore[attr-defined]
    if device.type not in kinds:
        return None
    return str(group._get_backend(torch.device(device.type)).name()).lower()  # type: ignore[attr-defined]


def sendable_device(group: dist.ProcessGroup) -> torch.device:
    """Return a device whose tensors the group can send: the CPU if possible, otherwise this thread's current GPU."""
    if backend_name(group, torch.device("cpu")) is not None:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """Return the timeout of a process group, or the shortest if it has several backends."""
    kinds = group._device_types  # type: ignore[attr-defined]
    options = [group._get_backend(kind).options for kind in kinds]  # type: ignore[attr-defined]
    # some backends have no options
    return min((option._timeout for option in options if option is not None), default=default_pg_timeout)


def new_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """Create a process group of `ranks`, ranks of the default group, for trainers. Exactly these ranks must call this."""
    with _unbound_world():
        return dist.new_group(list(ranks), use_local_synchronization=True)


@contextmanager
def _unbound_world() -> Iterator[None]:
    """Let groups created in the block open their own communicators instead of splitting the communicator of a default group
    that is bound to devices."""
    world = dist.group.WORLD
    assert world is not None
    bound = world.bound_device_id  # type: ignore[attr-defined]
    world.bound_device_id = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        world.bound_device_id = bound  # type: ignore[attr-defined]


def _opened(group: dist.ProcessGroup, make: Callable[..., Any], device: torch.device, timeout: timedelta) -> Any:
    members, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
    # the number is the same on all ranks, since every rank makes the same number of these calls
    number = _OPENED[group] = _OPENED.get(group, 0) + 1
    members_digest = hashlib.sha1(str(members).encode()).hexdigest()[:12]
    name = f"distattn/communicator {number} of {group.group_name} {members_digest}"
    store = dist.PrefixStore(name, default_store())

    def work() -> Any:
        # wait for all ranks on the host, with a timeout, before anything waits on a device, where no wait has a timeout
        store.set(f"here/{rank}", "1")
        store.wait([f"here/{other}" for other in range(len(members))], timeout)
        backend = make(store, rank, members, timeout, name)

        def farewell(seconds: float) -> None:
            store.set(f"gone/{rank}", "1")
            store.wait([f"gone/{other}" for other in range(len(members))], timedelta(seconds=seconds))

        # only NCCL's shutdown waits for other ranks
        end_with_group(backend, group, farewell if backend.supports_coalescing else None)
        try:
            warm_up(backend, rank, len(members), device, timeout)
        except BaseException:
            end_communicator(backend, gracefully=False)
            raise
        return backend

    return run_collective(group, "opening a communicator", work)


def _open_gloo(store: dist.Store, rank: int, members: Sequence[int], timeout: timedelta, name: str) -> Any:
    return dist.ProcessGroupGloo(store, rank, len(members), timeout)


def _open_nccl(store: dist.Store, rank: int, members: Sequence[int], timeout: timedelta, name: str) -> Any:
    # give messages a high priority, so that they start before the kernels that they overlap
    options: Any = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    # `driver.message_watch` names lost ranks before this timeout; PyTorch's watchdog would kill the process without naming them
    options._timeout = max(10 * timeout, _WATCHDOG)
    # set the names shown by PyTorch's flight recorder
    options.global_ranks_in_group, options.group_name = list(members), name
    return dist.ProcessGroupNCCL(store, rank, len(members), options)


# for each device type, the backend that sends point-to-point messages
_SENDS_FROM = {"cpu": "gloo", "cuda": "nccl"}
_OPEN: dict[str, Callable[..., Any]] = {"gloo": _open_gloo, "nccl": _open_nccl}
