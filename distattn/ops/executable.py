"""Plans made ready to run: proven, lowered for this rank, agreed upon by all ranks, and known to operators by a handle.

Lowering can happen on a thread ahead of time (`lower_once`); agreeing and opening a communicator are collective and
happen in `prepare`, on the caller's thread.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from distattn.ir.errors import DistattnError, PlanError
from distattn.ir.plan import Call, Plan
from distattn.kernels.registry import Kernel, choose_kernel, kernel_preparer, load_kernel
from distattn.kernels.spec import KernelRequirements, ScoreMod
from distattn.parallel.analysis.verify import check_max_buffer_bytes, verify
from distattn.parallel.runtime import execute
from distattn.parallel.runtime.program import Program, lower, on_device
from distattn.parallel.runtime.transport import GroupTransport, SingleRankTransport, Transport


class Use(NamedTuple):
    """Where a plan runs: rank, kernel and device."""

    rank: int
    kernel: str
    device: torch.device


class Watch(Protocol):
    """Told before a program is made ready and before each of its passes; may put something in its kernel's place."""

    # whether passes of two batches may alternate
    alternates: bool

    def prepares(self) -> None: ...

    def begins(self, direction: str, score: ScoreMod) -> None: ...

    def kernel(self, kernel: Kernel) -> Kernel: ...


class Lowered:
    """A program with its kernel and transport, known to the operators by its handle."""

    def __init__(self, program: Program, use: Use, transport: Transport, watch: Watch | None = None):
        self.program, self.use, self.transport, self.watch = program, use, transport, watch
        kernel: Kernel = load_kernel(use.kernel)
        self.kernel = kernel if watch is None else watch.kernel(kernel)
        self.handle = next(_HANDLES)
        _BY_HANDLE[self.handle] = self


class Prepared(NamedTuple):
    """A plan ready to run on this rank. `handle` and `kept` are plain numbers: another batch's plan recompiles nothing."""

    handle: int
    # numbers that the forward keeps for the backward
    kept: int
    # keeps the program alive
    lowered: Lowered


# torch.compile specialises on 0 and 1
_HANDLES = itertools.count(2)
_BY_HANDLE: weakref.WeakValueDictionary[int, Lowered] = weakref.WeakValueDictionary()
# programs live as long as their plan
_PROGRAMS: weakref.WeakKeyDictionary[Plan, dict[Use, Program]] = weakref.WeakKeyDictionary()
_LOWERED: weakref.WeakKeyDictionary[Plan, dict[tuple[Use, Transport], Lowered]] = weakref.WeakKeyDictionary()
_LOCKS: weakref.WeakKeyDictionary[Plan, threading.Lock] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()
_ALONE = SingleRankTransport()
# the communicator of each group
_TRANSPORTS: weakref.WeakKeyDictionary[Any, GroupTransport] = weakref.WeakKeyDictionary()


def prepare(
    plan: Plan,
    group: dist.ProcessGroup | None = None,
    *,
    kernel: str | None = None,
    device: torch.device | str = "cpu",
    capacity: int | None = None,
    proven: bool = True,
    watch: Watch | None = None,
) -> Prepared:
    """Make a plan ready to run: a collective call of all its ranks, which compare their plans every time.

    group defaults to the default process group; a plan for one rank needs none. kernel: a name of KERNELS, by default
    that of the device. capacity: bytes of buffers a rank may need at once (see `verify`). proven=False: without a proof, for
    callers that prove every so many plans of one kind; a capacity asks for the proof all the same. watch: see `Watch`.
    Hold the result until the backward has run: under torch.compile nothing else keeps its program.

    Raises PlanError when the plan cannot be proven or needs more than the capacity, or when ranks have different plans;
    DistattnError when it does not fit the kernel. Where one rank refuses, all do. A group of another size is refused
    without asking the others.
    """
    rank, group = _membership(plan, group)
    device = torch.device(device)
    refusal = program = None
    try:
        use = Use(rank, choose_kernel(kernel, demand_of(plan.call, device)), device)
        program = lower_once(plan, use, proven)
        if capacity is not None:
            check_max_buffer_bytes(program.proof or verify(plan), capacity)
    except DistattnError as error:
        refusal = error
    if group is not None:
        _agree(plan, group, device, refusal)
    if refusal is not None or program is None:
        raise refusal or DistattnError("this plan has no program.")
    transport: Transport = _ALONE if group is None else open_transport(group)
    known = _LOWERED.setdefault(plan, {})
    lowered = known.get((use, transport)) if watch is None else None
    if lowered is None:
        lowered = Lowered(program, use, transport, watch)
        if watch is None:
            known[use, transport] = lowered
    return Prepared(lowered.handle, execute.kept_elements(program), lowered)


def lower_once(plan: Plan, use: Use, proven: bool = True) -> Program:
    """The program of a plan for one use, made at first call; proven then, if it shall be. May run on any thread."""
    with _LOCK:
        lock = _LOCKS.setdefault(plan, threading.Lock())
    # of this plan: another's program need not wait for it
    with lock:
        uses = _PROGRAMS.setdefault(plan, {})
        if use not in uses:
            proof = next((other.proof for other in uses.values() if other.proof), None)
            proof = verify(plan) if proof is None and proven else proof
            make = kernel_preparer(use.kernel, demand_of(plan.call, use.device))
            uses[use] = on_device(lower(plan, use.rank, make, proof), use.device)
        return uses[use]


def demand_of(call: Call, device: torch.device) -> KernelRequirements:
    """What a call asks of a kernel, as far as its plan knows."""
    return KernelRequirements(getattr(torch, call.dtype), call.head_dim, call.v_head_dim, device)


def lowered_of(handle: int) -> Lowered:
    """What a handle stands for."""
    if handle not in _BY_HANDLE:
        raise DistattnError(
            f"handle {handle} belongs to no plan that is still alive; hold what prepare returned until the backward has run."
        )
    return _BY_HANDLE[handle]


def _membership(plan: Plan, group: dist.ProcessGroup | None) -> tuple[int, dist.ProcessGroup | None]:
    ranks = plan.call.ranks
    if group is None and not (dist.is_available() and dist.is_initialized()):
        if ranks > 1:
            raise DistattnError(f"a plan for {ranks} ranks needs torch.distributed; call init_process_group first.")
        return 0, None
    if group is None and ranks == 1:
        return 0, None
    group = dist.group.WORLD if group is None else group
    size = dist.get_world_size(group)
    if size != ranks:
        raise DistattnError(
            f"the plan is for {ranks} ranks, the process group has {size}; pass the group it was made for."
        )
    return dist.get_rank(group), group


def open_transport(group: dist.ProcessGroup, patience: timedelta | None = None) -> GroupTransport:
    """The communicator of a group's plans, made at first call: a collective call then. patience: how long messages may take."""
    if group not in _TRANSPORTS:
        _TRANSPORTS[group] = GroupTransport.with_own_group(group, patience)
    return _TRANSPORTS[group]


def _agree(plan: Plan, group: dist.ProcessGroup, device: torch.device, refusal: DistattnError | None) -> None:
    """All ranks compare their plans' digests and tell of a refusal; where anything is amiss every rank raises.

    Always, not only where this rank has not seen the plan: what is new to one rank may be old to another.
    """
    words = [int(plan.digest[i : i + 8], 16) for i in range(0, 32, 8)]
    mine = torch.tensor([*words, refusal is not None], device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    told = torch.stack(everyone).tolist()
    digests = ["".join(f"{word:08x}" for word in row[:-1]) for row in told]
    if len(set(digests)) == 1 and not any(row[-1] for row in told):
        return
    calls: list[Any] = [None] * len(digests)
    dist.all_gather_object(calls, _summary(plan) | {"refusal": str(refusal or "")}, group=group)
    if refusal is not None:
        raise refusal
    refused = next((rank for rank, call in enumerate(calls) if call["refusal"]), None)
    if refused is not None:
        raise PlanError(f"rank {refused} refuses this plan: {calls[refused]['refusal']}")
    raise PlanError(_difference(digests, calls))


def _summary(plan: Plan) -> dict[str, Any]:
    """What a call is, in words that can be compared from rank to rank."""
    call = plan.call
    starts = [0, *call.layout.ends.tolist()]
    return {
        "documents": [b - a for a, b in itertools.pairwise(starts)],
        "mask": call.mask.digest,
        "layout": call.layout.digest,
        "heads and dims": (call.heads, call.kv_heads, call.head_dim, call.v_head_dim),
        "dtype": call.dtype,
        "strategy": (plan.strategy, plan.policy),
    }


def _difference(digests: list[str], calls: list[dict[str, Any]]) -> str:
    # the majority is right; among equals rank 0's
    counts = Counter(digests)
    usual = max(counts, key=lambda digest: (counts[digest], digest == digests[0]))
    odd = [rank for rank, digest in enumerate(digests) if digest != usual]
    like = digests.index(usual)
    ours, theirs = calls[odd[0]], calls[like]
    what = next((name for name in theirs if name != "refusal" and ours[name] != theirs[name]), "tables")
    how = f"its {what} differ"
    if what == "documents":
        pairs = itertools.zip_longest(ours[what], theirs[what])
        first = next(i for i, (a, b) in enumerate(pairs) if a != b)
        how += f" from rank {like}'s from number {first + 1} on"
    else:
        how += f" from rank {like}'s"
    ranks = ("rank " if len(odd) == 1 else "ranks ") + ", ".join(map(str, odd))
    verb = "plans" if len(odd) == 1 else "plan"
    return f"{ranks} {verb} a different call (digest {digests[odd[0]][:8]}, others {usual[:8]}): {how}."
