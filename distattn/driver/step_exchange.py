"""What ranks tell each other of a step, once and ahead: on a host group, on a thread of its own, which then plans."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from distattn.batch.awaited_result import AwaitedResult
from distattn.batch.collectives import HostGroup
from distattn.batch.local_batch import LocalBatch
from distattn.batch.packed_batch import Batch
from distattn.batch.planner import AttentionShape, Planned, Planner
from distattn.ir.errors import DistattnError
from distattn.ops.executable import plan_summary, raise_disagreement
from distattn.parallel.runtime.streams import Handover

Shapes = tuple[tuple[AttentionShape, torch.device], ...]


class StepInfo(NamedTuple):
    """What a rank tells of a step: of each micro-batch its documents and a digest of its tokens; how many labels in all.

    ended: the rank has no more steps. speed: how fast its kernels have been (see `RankSpeeds`). loader: what its loader is known
    by, where that knows all steps (see `global_loader`).
    """

    documents: tuple[tuple[int, ...], ...]
    digests: tuple[str, ...]
    valid_labels: int
    ended: bool = False
    speed: float | None = None
    loader: str = ""

    @staticmethod
    def of(micro_batches: Sequence[Batch] | None, speed: float | None, compared: bool, loader: str) -> StepInfo:
        """Of a step's micro-batches; None: there are no more steps. compared: other ranks are to have the same tokens."""
        given = micro_batches or ()
        digests = tuple(batch.digest for batch in given) if compared else ("",) * len(given)
        labels = sum(batch.valid_labels for batch in given)
        return StepInfo(tuple(batch.lengths for batch in given), digests, labels, micro_batches is None, speed, loader)


class GatheredStep(NamedTuple):
    """A step as all ranks announced it: its number in the run, and every rank's info. made: what was made of it ahead."""

    number: int
    infos: list[StepInfo]
    made: Any = None


class PlanningThread:
    """Runs one function after another on a daemon thread: at the end of the process nobody waits for it."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="distattn-planning")
        self._thread.start()

    @property
    def ident(self) -> int:
        """The thread's, as `threading.get_ident` gives it there."""
        assert self._thread.ident is not None
        return self._thread.ident

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work`, which raises nothing, after all that was submitted before."""
        self._queue.put(work)

    def close(self) -> None:
        """Let the thread end once it has done what was submitted."""
        self._queue.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
            # nothing may hold on to a step until the next one comes
            del work


class StepExchange:
    """Gathers steps over the ranks of a host group, and plans their batches ahead.

    host: None for a single rank. same_batch: of each rank of the host group, the rank whose batches it is to have as well.
    sharing: the ranks of the host group that share attention with this one. names: ranks as errors call them.
    """

    def __init__(self, host: HostGroup | None, same_batch: Sequence[int], sharing: Sequence[int], names: Sequence[int]):
        self._host, self.same_batch, self._sharing, self._names = host, list(same_batch), list(sharing), list(names)
        self._thread = PlanningThread()
        # steps announced so far
        self.steps = 0

    def announce(
        self,
        micro_batches: Sequence[Batch] | None,
        make: Callable[[GatheredStep], tuple[Any, list[LocalBatch]]],
        planner: Planner,
        speed: float | None = None,
        same_batch: Sequence[int] | None = None,
        loader: str = "",
        known: list[StepInfo] | None = None,
    ) -> AwaitedResult[GatheredStep]:
        """Tell the others of this rank's next step, and hear of theirs; all ranks call it in the same order.

        loader: see `StepInfo`; known: what they would tell, where every rank knows it, so that nobody is asked.
        make: what is to be made of the gathered step, and all batches in it; called on the thread, where the batches' plans
        follow for the shapes that are known now.
        """
        number, shapes = self.steps, planner.registered_shapes(self.steps)
        same = self.same_batch if same_batch is None else list(same_batch)
        self.steps += 1
        future = AwaitedResult[GatheredStep](self._thread.ident)
        # this thread's stream may still have to fill a loader's tensors on a GPU
        given = Handover.of(tensor for batch in micro_batches or () for tensor in batch.tensors)

        def gather_and_plan() -> None:
            try:
                given.join()
                infos = known
                if infos is None:
                    compared = any(rank != first for rank, first in enumerate(same))
                    infos = self._gather(StepInfo.of(micro_batches, speed, compared, loader), same)
                made, batches = make(GatheredStep(number, infos))
                step = GatheredStep(number, infos, made)
                pending = [known for batch in batches for known in batch.plan_ahead(shapes)]
            except BaseException as error:
                future.set_exception(error)
                return
            # whoever waits for the step goes on; the plans follow here, in the same order on all ranks
            future.set_result(step)
            self._plan(batches, pending, planner, shapes)

        self._thread.submit(gather_and_plan)
        return future

    def close(self) -> None:
        """End the thread and the host group."""
        self._thread.close()
        if self._host is not None:
            self._host.close()

    def _gather(self, info: StepInfo, same: Sequence[int]) -> list[StepInfo]:
        infos = [info] if self._host is None else self._host.all_gather(info, "the exchange of a step")
        self._check(infos, same)
        return infos

    def _check(self, infos: list[StepInfo], same: Sequence[int]) -> None:
        """Raise DistattnError where ranks that are to have the same batches have others."""
        for rank, first in enumerate(same):
            mine, theirs = infos[rank], infos[first]
            if mine._replace(speed=None) == theirs._replace(speed=None):
                continue
            where = ""
            for number, both in enumerate(zip(mine.digests, theirs.digests, strict=False)):
                if both[0] != both[1]:
                    where = f" (micro-batch {number})" if len(mine.digests) > 1 else ""
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
            found = [_attempt(planner, batch, *shape) for batch in batches for shape in shapes]
            self._compare(found)
        except BaseException as error:
            for future in pending:
                future.set_exception(error)
            return
        for future, result in zip(pending, found, strict=True):
            if isinstance(result, DistattnError):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _compare(self, found: Sequence[Planned | DistattnError]) -> None:
        # of the whole host group, also where a rank has nothing to compare: the others may have
        if self._host is None:
            return
        refusal = next((one for one in found if isinstance(one, DistattnError)), None)
        mine = [one.plan.digest if isinstance(one, Planned) else "" for one in found]
        gathered = self._host.all_gather((mine, str(refusal or "")), "the comparison of plans")
        everyone = [gathered[rank] for rank in self._sharing]
        if all(digests == mine and not refused for digests, refused in everyone):
            return
        # every rank of the host group has come here; those that agree among themselves have gone on, so no more is asked
        odd = next((at for at, (digests, refused) in enumerate(everyone) if refused or digests != everyone[0][0]), 0)
        if refusal is not None:
            raise refusal
        name = self._names[self._sharing[odd]]
        if everyone[odd][1]:
            raise DistattnError(f"rank {name} refuses this step: {everyone[odd][1]}")
        raise DistattnError(
            f"rank {name} plans other attention calls than rank {self._names[self._sharing[0]]} for the same documents: its "
            "versions of distattn, numpy or the cluster's description differ."
        )


def agree_on_plan(host: HostGroup | None, make: Callable[[], Planned]) -> Planned:
    """Plan by `make` and compare the plan with the other ranks' of a host group, which all call this.

    Raises PlanError where a rank has another plan or refuses it; where one raises, all do.
    """
    planned, refusal = None, None
    try:
        planned = make()
    except DistattnError as error:
        refusal = error
    if host is not None and host.ranks > 1:
        summary = {} if planned is None else plan_summary(planned.plan)
        mine = "" if planned is None else planned.plan.digest, summary | {"refusal": str(refusal or "")}
        everyone = host.all_gather(mine, "the comparison of a new plan")
        raise_disagreement([digest for digest, _ in everyone], [summary for _, summary in everyone], refusal)
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
