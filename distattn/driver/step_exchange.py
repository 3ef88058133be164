"""Exchange of facts about steps between ranks, one step ahead, on a separate thread that then plans the step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from distattn.batch.awaited_result import AwaitedResult
from distattn.batch.collectives import HostGroup
from distattn.batch.local_batch import LocalBatch
from distattn.batch.packed_batch import Batch
from distattn.batch.planner import AttentionShape, Planned, Planner
from distattn.ir.errors import DistattnError
from distattn.ops.executable import plan_summary, raise_disagreement
from distattn.parallel.runtime.communication.streams import Handover

Shapes = tuple[tuple[AttentionShape, torch.device], ...]


class StepInfo(NamedTuple):
    """A rank's facts about a step: each micro-batch's documents and token digest, and the step's number of labels.

    ended: True if the rank has no more steps. speed: the speed of its kernels (see `RankSpeeds`). loader: the name of the data
    and steps that a `GlobalLoader` reads, "" for other loaders.
    """

    documents: tuple[tuple[int, ...], ...]
    digests: tuple[str, ...]
    valid_labels: int
    ended: bool = False
    speed: float | None = None
    loader: str = ""

    @staticmethod
    def of(micro_batches: Sequence[Batch] | None, speed: float | None, compared: bool, loader: str) -> StepInfo:
        """Return this rank's facts about a step. micro_batches: None after the last step.

        compared: True if other ranks must hold the same tokens.
        """
        batches = micro_batches or ()
        digests = tuple(batch.digest for batch in batches) if compared else ("",) * len(batches)
        labels = sum(batch.valid_labels for batch in batches)
        return StepInfo(
            tuple(batch.lengths for batch in batches), digests, labels, micro_batches is None, speed, loader
        )


class GatheredStep(NamedTuple):
    """A step that all ranks have announced: its number in the run, every rank's info, and the batches built from it."""

    number: int
    infos: list[StepInfo]
    batches: Sequence[LocalBatch] = ()


class PlanningThread:
    """A daemon thread that runs functions one after another, and does not delay the end of the process."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="distattn-planning")
        self._thread.start()

    @property
    def ident(self) -> int:
        """The thread's identifier, as `threading.get_ident` returns it on that thread."""
        assert self._thread.ident is not None
        return self._thread.ident

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` after all work submitted earlier. `work` must not raise."""
        self._queue.put(work)

    def close(self) -> None:
        """Stop the thread once all submitted work is done; wait at most 10 seconds."""
        self._queue.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
            # drop the reference, which would keep a step alive until the next step arrives
            del work


class StepExchange:
    """An exchange that gathers steps over the ranks of a host group, and plans their batches ahead.

    host: None for a single rank. same_batch: for each rank of the host group, the first rank that must have the same batches.
    sharing: the ranks of the host group that share attention with this one. names: the numbers that ranks have in error messages.
    """

    def __init__(self, host: HostGroup | None, same_batch: Sequence[int], sharing: Sequence[int], names: Sequence[int]):
        self._host, self.same_batch, self._sharing, self._names = host, list(same_batch), list(sharing), list(names)
        self._thread = PlanningThread()
        # the number of steps announced so far
        self.steps = 0

    def announce(
        self,
        micro_batches: Sequence[Batch] | None,
        make: Callable[[GatheredStep], list[LocalBatch]],
        planner: Planner,
        speed: float | None = None,
        loader: str = "",
        known_infos: list[StepInfo] | None = None,
    ) -> AwaitedResult[GatheredStep]:
        """Announce this rank's next step; return a future of the gathered step. All ranks call this in the same order.

        micro_batches: None after the last step. make: returns the gathered step's batches; called on the planning thread, which
        then plans them for the shapes registered by now. loader: see `StepInfo`. known_infos: all ranks' facts, if every rank can
        compute them without an exchange.
        """
        number, shapes = self.steps, planner.registered_shapes(self.steps)
        self.steps += 1
        future = AwaitedResult[GatheredStep](self._thread.ident)
        # work on this thread's stream may still be filling the loader's tensors on a GPU
        handover = Handover.of(tensor for batch in micro_batches or () for tensor in batch.tensors)

        def gather_and_plan() -> None:
            try:
                handover.join()
                infos = known_infos
                if infos is None:
                    compared = any(rank != first for rank, first in enumerate(self.same_batch))
                    infos = self._gather(StepInfo.of(micro_batches, speed, compared, loader))
                batches = make(GatheredStep(number, infos))
                step = GatheredStep(number, infos, batches)
                pending = [plan for batch in batches for plan in batch.plan_ahead(shapes)]
            except BaseException as error:
                future.set_exception(error)
                return
            # threads that wait for the step can continue; this thread makes the plans next, in the same order on all ranks
            future.set_result(step)
            self._plan(batches, pending, planner, shapes)

        self._thread.submit(gather_and_plan)
        return future

    def close(self) -> None:
        """Stop the thread and close the host group."""
        self._thread.close()
        if self._host is not None:
            self._host.close()

    def _gather(self, info: StepInfo) -> list[StepInfo]:
        infos = [info] if self._host is None else self._host.all_gather(info, "the exchange of a step")
        self._check(infos)
        return infos

    def _check(self, infos: list[StepInfo]) -> None:
        """Raise DistattnError if ranks that must have the same batches have different batches."""
        for rank, first in enumerate(self.same_batch):
            info, first_info = infos[rank], infos[first]
            if info._replace(speed=None) == first_info._replace(speed=None):
                continue
            where = ""
            for number, digests in enumerate(zip(info.digests, first_info.digests, strict=False)):
                if digests[0] != digests[1]:
                    where = f" (micro-batch {number})" if len(info.digests) > 1 else ""
                    break
            raise DistattnError(
                f"rank {self._names[rank]} holds another batch than rank {self._names[first]}{where}; ranks that split a "
                "sequence get the same micro-batches in the same order, so give each group of them one share of the data."
            )

    def _plan(
        self, batches: list[LocalBatch], pending: list[AwaitedResult[Planned]], planner: Planner, shapes: Shapes
    ) -> None:
        """Plan all batches of a step for all shapes, and compare the plans with the other ranks'."""
        try:
            results = [_attempt(planner, batch, *shape) for batch in batches for shape in shapes]
            self._compare(results)
        except BaseException as error:
            for future in pending:
                future.set_exception(error)
            return
        for future, result in zip(pending, results, strict=True):
            if isinstance(result, DistattnError):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _compare(self, results: Sequence[Planned | DistattnError]) -> None:
        # the entire host group takes part: other ranks may have something to compare even if this rank has nothing
        if self._host is None:
            return
        refusal = next((result for result in results if isinstance(result, DistattnError)), None)
        local_digests = [result.plan.digest if isinstance(result, Planned) else "" for result in results]
        gathered = self._host.all_gather((local_digests, str(refusal or "")), "the comparison of plans")
        from_sharing = [gathered[rank] for rank in self._sharing]
        if all(digests == local_digests and not refused for digests, refused in from_sharing):
            return
        # no further exchange is possible here: ranks that agree among themselves have already moved on
        first_digests = from_sharing[0][0]
        odd = next((at for at, (digests, refused) in enumerate(from_sharing) if refused or digests != first_digests), 0)
        if refusal is not None:
            raise refusal
        name = self._names[self._sharing[odd]]
        if from_sharing[odd][1]:
            raise DistattnError(f"rank {name} refuses this step: {from_sharing[odd][1]}")
        raise DistattnError(
            f"rank {name} plans other attention calls than rank {self._names[self._sharing[0]]} for the same documents: its "
            "versions of distattn, numpy or the cluster's description differ."
        )


def agree_on_plan(host: HostGroup | None, make: Callable[[], Planned]) -> Planned:
    """Make a plan with `make` and compare it with the plans of the other ranks of a host group. A collective call.

    Raise PlanError if plans differ or a rank refuses its plan; if one rank raises, all ranks raise.
    """
    planned, refusal = None, None
    try:
        planned = make()
    except DistattnError as error:
        refusal = error
    if host is not None and host.ranks > 1:
        summary = {} if planned is None else plan_summary(planned.plan)
        local = "" if planned is None else planned.plan.digest, summary | {"refusal": str(refusal or "")}
        gathered = host.all_gather(local, "the comparison of a new plan")
        raise_disagreement([digest for digest, _ in gathered], [summary for _, summary in gathered], refusal)
    if refusal is not None or planned is None:
        raise refusal or DistattnError("this batch has no plan.")
    return planned


def _attempt(
    planner: Planner, batch: LocalBatch, shape: AttentionShape, device: torch.device
) -> Planned | DistattnError:
    try:
        return planner.planned(batch.key, shape, device, batch.proven)
    except DistattnError as error:
        return error
