"""Executables: plans made ready to run on this rank. Operators refer to them by an integer handle.

Lowering a plan to this rank's program involves no other rank and may happen ahead of time on a thread (`EXECUTABLES.program`).
Agreeing with the other ranks and opening a communicator are collective; `prepare` does both on the caller's thread.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from distattn.ir.arguments import checked
from distattn.ir.bands import BK, BQ, MAX_BLOCK
from distattn.ir.errors import DistattnError, LostRankError, PlanError, named_ranks
from distattn.ir.plan import Call, Plan
from distattn.kernels.latent import latent_workspace
from distattn.kernels.registry import AUTO, Kernel, choose_kernel, kernel_preparer, load_kernel
from distattn.kernels.spec import KernelRequirements, ScoreMod
from distattn.kernels.trials import Trial
from distattn.ops.kernel_choice import (
    common_kernel_ranking,
    first_supported,
    in_larger_job,
    local_kernel_trials,
    may_choose_kernel,
)
from distattn.parallel.analysis.verify import check_max_buffer_bytes, verify
from distattn.parallel.runtime.communication.collective_calls import run_collective
from distattn.parallel.runtime.communication.communicator import (
    all_gather_objects_over_gloo,
    open_communicator,
    open_host_communicator,
    timeout_of,
)
from distattn.parallel.runtime.communication.transport import GroupTransport, SingleRankTransport, Transport
from distattn.parallel.runtime.execution.kept_tensors import kept_size
from distattn.parallel.runtime.lowering.lower import lower
from distattn.parallel.runtime.lowering.memory import PassMemory, backward_memory, forward_memory
from distattn.parallel.runtime.lowering.recurrence_workspace import recurrence_workspace
from distattn.parallel.runtime.lowering.upload_program import copy_program_to_device
from distattn.parallel.runtime.program import Program


class ExecutionKey(NamedTuple):
    """The key of a program: the rank in the plan, the kernel's name, and the device."""

    rank: int
    kernel: str
    device: torch.device


class PassObserver(Protocol):
    """An observer that is called before each forward or backward pass of an executable, and may wrap its kernel."""

    # True if passes of two micro-batches may interleave on this rank
    allows_interleaving: bool

    def on_pass_begin(self, direction: str, score: ScoreMod) -> None: ...

    def wrap_kernel(self, kernel: Kernel) -> Kernel: ...


class Executable:
    """A plan ready to run on this rank: its program, kernel and transport.

    `handle` and `kept_elements` (how many elements the forward pass keeps for the backward pass) are plain integers, so that
    under torch.compile only the second executable triggers a recompilation. Keep a reference to the executable until the backward
    pass has run.
    """

    def __init__(self, program: Program, key: ExecutionKey, transport: Transport, observer: PassObserver | None = None):
        self.program, self.key, self.transport, self.observer = program, key, transport, observer
        kernel: Kernel = load_kernel(key.kernel)
        self.kernel = kernel if observer is None else observer.wrap_kernel(kernel)
        # count bytes for a recurrence, because its kept tensors have several dtypes
        is_recurrence = program.forward_states is not None
        self.kept_elements = kept_size(program) if is_recurrence else program.kept_places.numbers
        self.handle = EXECUTABLES.add(self)
        self._memory: dict[str, PassMemory] = {}

    def memory(self) -> dict[str, PassMemory]:
        """Return the memory that a layer's "forward" and "backward" passes need on this rank's device, in bytes.

        It is exact for the triton and gluon kernels, and an upper bound for "flash". For recurrences with the kernels "chunked"
        and "triton_chunked" it includes the largest launch. Allocations inside fla-core and PyTorch's operators are unknown.
        """
        if not self._memory:
            self._memory = self._count_memory()
        return dict(self._memory)

    def _count_memory(self) -> dict[str, PassMemory]:
        kernel, call = load_kernel(self.key.kernel), self.program.call
        workspace = getattr(kernel, "workspace_bytes", None)
        if call.op.kind == "latent_attention":
            workspace = latent_workspace(call.op, getattr(torch, call.dtype), workspace)
        passes = {
            "forward": forward_memory(self.program, workspace),
            "backward": backward_memory(self.program, workspace),
        }
        if call.op.kind == "recurrence":
            for direction, memory in passes.items():
                passes[direction] = memory._replace(workspace=recurrence_workspace(self.program, direction, kernel))
        return passes

    def begin_pass(self, direction: str, score: ScoreMod) -> None:
        """Wait on this thread's current stream for the program's upload, and tell the observer about the pass."""
        if self.program.uploaded is not None:
            self.program.uploaded.join()
        if self.observer is not None:
            self.observer.on_pass_begin(direction, score)


class ExecutableCache:
    """A cache of programs keyed by plan, communicators keyed by group, and executables keyed by handle.

    Programs live as long as their plan, communicators as long as their group, handles as long as their executable.
    """

    def __init__(self) -> None:
        # handles start at 2, because torch.compile specialises on 0 and 1
        self._handles = itertools.count(2)
        self._by_handle: weakref.WeakValueDictionary[int, Executable] = weakref.WeakValueDictionary()
        self._programs: weakref.WeakKeyDictionary[Plan, dict[ExecutionKey, Program]] = weakref.WeakKeyDictionary()
        self._plan_locks: weakref.WeakKeyDictionary[Plan, threading.Lock] = weakref.WeakKeyDictionary()
        self._transports: weakref.WeakKeyDictionary[Any, dict[Any, GroupTransport]] = weakref.WeakKeyDictionary()
        self._hosts: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def forget_locks(self) -> None:
        """Create new locks in a forked process, because the threads that may hold the old locks do not exist there."""
        self._lock, self._plan_locks = threading.Lock(), weakref.WeakKeyDictionary()

    def add(self, executable: Executable) -> int:
        """Return a new handle for an executable. The cache does not keep the executable alive."""
        handle = next(self._handles)
        self._by_handle[handle] = executable
        return handle

    def by_handle(self, handle: int) -> Executable:
        """Return the executable with this handle. Raise DistattnError if it has been freed."""
        executable = self._by_handle.get(handle)
        if executable is None:
            raise DistattnError(
                f"handle {handle} belongs to no executable that is still alive; hold what prepare returned until the "
                "backward has run."
            )
        return executable

    def program(self, plan: Plan, key: ExecutionKey, proven: bool = True) -> Program:
        """Return a plan's program, lowered at the first call, and proven if `proven`. May be called on any thread."""
        with self._lock:
            lock = self._plan_locks.setdefault(plan, threading.Lock())
        # use one lock per plan, so that other plans' programs need not wait for this plan's
        with lock:
            programs = self._programs.setdefault(plan, {})
            if key not in programs:
                proof = next((other.proof for other in programs.values() if other.proof), None)
                proof = verify(plan) if proof is None and proven else proof
                make = kernel_preparer(key.kernel, kernel_requirements(plan.call, key.device))
                finishes = getattr(load_kernel(key.kernel), "FINISHES", ())
                lowered = lower(plan, key.rank, make, proof, in_larger_job(), finishes)
                programs[key] = copy_program_to_device(lowered, key.device)
            return programs[key]

    def transport(
        self, group: dist.ProcessGroup, device: torch.device, timeout: timedelta | None = None
    ) -> GroupTransport:
        """Return a group's communicator for this type of device. The first call opens it and is collective.

        timeout: the longest time that a message may take; by default the group's timeout.
        """
        transports = self._transports.setdefault(group, {})
        if (device.type, timeout) not in transports or not transports[device.type, timeout].is_open:
            backend = open_communicator(group, device, timeout or timeout_of(group))
            transports[device.type, timeout] = GroupTransport(group, backend)
        return transports[device.type, timeout]

    def host(self, group: dist.ProcessGroup) -> Any:
        """Return a host-side communicator of a group. The first call opens it and is collective."""
        if group not in self._hosts:
            self._hosts[group] = open_host_communicator(group, timeout_of(group))
        return self._hosts[group]


EXECUTABLES = ExecutableCache()
os.register_at_fork(after_in_child=EXECUTABLES.forget_locks)
_SINGLE_RANK = SingleRankTransport()


@checked
def prepare(
    plan: Plan,
    group: dist.ProcessGroup | None = None,
    *,
    kernel: str | None = None,
    device: torch.device | str | int = "cpu",
    max_buffer_bytes: int | None = None,
    proven: bool = True,
    modifiers: Sequence[str] = (),
) -> Executable:
    """Make a plan ready to run. A collective call of all ranks of the plan, which compare their plans every time.

    group: by default the default process group; a plan for one rank needs no group. kernel: a key of KERNELS, or of OTHER_KERNELS
    for ops other than attention. On GPUs the default, "auto", is the fastest kernel that a trial found correct (see
    `kernels.trials`), the same on all ranks; `Executable.key` has its name. modifiers: what the kernel has to support: "softcap"
    and "alibi_slopes" if calls will use them, "lse" if gradients flow through the log-sum-exp. max_buffer_bytes: the maximum
    total size of the buffers that a rank may need at one time (see `verify`). proven: False skips the proof, for callers that
    prove only some of their plans; with max_buffer_bytes, the plan is proven in any case. Keep the result until the backward pass
    has run: under torch.compile, no other reference keeps its program alive.

    Raise PlanError if the plan cannot be proven, needs more than max_buffer_bytes, or differs between ranks; DistattnError if it
    does not fit the kernel. If one rank refuses the plan, all ranks do. A group of the wrong size is refused without asking the
    other ranks.
    """
    rank, group = _membership(plan, group)
    device = with_device_index(device)
    refusal = program = key = None
    trials: dict[str, Trial] = {}
    needed = kernel_requirements(plan.call, device, modifiers)
    is_chosen = kernel in (None, AUTO) and may_choose_kernel(plan.call.op)
    try:
        trials = local_kernel_trials(plan, rank, needed) if is_chosen else {}
    except DistattnError as error:
        # raise the error only after the exchange of trials, because the other ranks wait for this rank's
        refusal = error
    try:
        if (ranked := common_kernel_ranking(trials, device, _gather_over(group), plan.call.op)) and is_chosen:
            kernel = first_supported(ranked, needed)
        if refusal is None:
            key, program = checked_program(plan, rank, kernel, device, max_buffer_bytes, proven)
    except LostRankError:
        raise
    except DistattnError as error:
        refusal = refusal or error
    if group is not None:
        _agree(plan, group, refusal)
    if refusal is not None or program is None or key is None:
        raise refusal or DistattnError("this plan has no program.")
    return Executable(program, key, _SINGLE_RANK if group is None else EXECUTABLES.transport(group, device))


def _gather_over(group: dist.ProcessGroup | None) -> Callable[[Any], list[Any]]:
    if group is None:
        return lambda value: [value]
    host = EXECUTABLES.host(group)
    return lambda value: run_collective(
        group, "the trial of kernels", lambda: all_gather_objects_over_gloo(host, value)
    )


def with_device_index(device: torch.device | str | int) -> torch.device:
    """Return the device with its index; "cuda" becomes this thread's current device, which may differ between threads.

    Raise DistattnError if there is no such device.
    """
    try:
        parsed = torch.device(device)
    except (RuntimeError, ValueError):
        raise DistattnError(f"there is no device {device!r}; write cpu, cuda or cuda:0.") from None
    if parsed.type == "cuda" and parsed.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return parsed


def checked_program(
    plan: Plan, rank: int, kernel: str | None, device: torch.device, max_buffer_bytes: int | None, proven: bool
) -> tuple[ExecutionKey, Program]:
    """Return the key and the program of a rank's part of a plan, without communication. Raise the errors of `prepare`."""
    key = ExecutionKey(rank, choose_kernel(kernel, kernel_requirements(plan.call, device)), device)
    program = EXECUTABLES.program(plan, key, proven)
    if max_buffer_bytes is not None:
        check_max_buffer_bytes(program.proof or verify(plan), max_buffer_bytes)
    return key, program


def kernel_requirements(call: Call, device: torch.device, modifiers: Sequence[str] = ()) -> KernelRequirements:
    """Return a call's requirements for its kernel, as far as the plan determines them.

    modifiers: "softcap", "alibi_slopes", "lse", "grouped".
    """
    steps = call.mask.pieces[:, [BQ, BK]]
    climbs = steps[(steps != 1).any(1), 0]
    return KernelRequirements(
        getattr(torch, call.dtype),
        call.head_dim,
        call.v_head_dim,
        device,
        "softcap" in modifiers,
        "alibi_slopes" in modifiers,
        "lse" in modifiers,
        int(climbs.min(initial=MAX_BLOCK)) if len(climbs) else 0,
        call.op,
        "grouped" in modifiers,
    )


def plan_difference(digests: list[str], summaries: list[dict[str, Any]]) -> str:
    """Return a sentence that names the ranks whose plans differ, and the difference. Each list has one entry per rank."""
    # assume that the majority is right; in a tie, trust the ranks that agree with rank 0
    counts = Counter(digests)
    usual = max(counts, key=lambda digest: (counts[digest], digest == digests[0]))
    odd = [rank for rank, digest in enumerate(digests) if digest != usual]
    like = digests.index(usual)
    ours, theirs = summaries[odd[0]], summaries[like]
    field = next((name for name in theirs if name != "refusal" and ours[name] != theirs[name]), "tables")
    difference = f"its {field} differ"
    if field == "documents":
        pairs = itertools.zip_longest(ours[field], theirs[field])
        first = next(i for i, (a, b) in enumerate(pairs) if a != b)
        difference += f" from rank {like}'s from number {first + 1} on"
    else:
        difference += f" from rank {like}'s"
    verb = "plans" if len(odd) == 1 else "plan"
    return (
        f"{named_ranks(odd)} {verb} a different call (digest {digests[odd[0]][:8]}, others {usual[:8]}): {difference}."
    )


def plan_summary(plan: Plan) -> dict[str, Any]:
    """Return a description of a plan's call that can be compared between ranks."""
    call = plan.call
    starts = [0, *call.layout.ends.tolist()]
    return {
        "documents": [b - a for a, b in itertools.pairwise(starts)],
        "mask": call.mask.digest,
        "layout": call.layout.digest,
        "op": call.op.name,
        "heads and dims": (call.heads, call.kv_heads, call.head_dim, call.v_head_dim),
        "dtype": call.dtype,
        "strategy": (plan.strategy, plan.policy),
    }


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


def _agree(plan: Plan, group: dist.ProcessGroup, refusal: DistattnError | None) -> None:
    """Compare all ranks' plan digests and refusals on the host. On any disagreement, every rank raises.

    Ranks compare every time, even a plan that this rank has seen before, because it may be new to another rank.
    """
    host = EXECUTABLES.host(group)
    mine = plan.digest, refusal is not None
    digests = run_collective(group, "the comparison of plans", lambda: all_gather_objects_over_gloo(host, mine))
    if all(other == mine for other in digests) and refusal is None:
        return
    summary = plan_summary(plan) | {"refusal": str(refusal or "")}
    summaries = run_collective(group, "the comparison of plans", lambda: all_gather_objects_over_gloo(host, summary))
    raise_disagreement([digest for digest, _ in digests], summaries, refusal)


def raise_disagreement(digests: list[str], summaries: list[dict[str, Any]], refusal: DistattnError | None) -> None:
    """Raise this rank's refusal, else a PlanError about the first rank that refuses, else a PlanError if plans differ."""
    if refusal is not None:
        raise refusal
    refused = next((rank for rank, summary in enumerate(summaries) if summary["refusal"]), None)
    if refused is not None:
        raise PlanError(f"rank {refused} refuses this plan: {summaries[refused]['refusal']}")
    if len(set(digests)) > 1:
        raise PlanError(plan_difference(digests, summaries))
