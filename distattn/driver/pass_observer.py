"""An observer of a batch's passes: it announces each pass to servers, and counts its work for the rank speeds."""

from __future__ import annotations

from collections.abc import Callable

from distattn.batch.planner import AttentionShape
from distattn.driver.control_channel import ControlChannel
from distattn.driver.rank_speeds import RankSpeeds
from distattn.ir.plan import Plan, select_rows
from distattn.kernels.registry import Kernel
from distattn.kernels.spec import ScoreMod
from distattn.parallel.tables.cost import CostModel

# rows per kernel tile, for the cost of a pass
_BLOCK = 128


class BatchObserver:
    """The observer of one batch and shape. control: None if this rank announces nothing.

    speeds: None if speeds are not measured. check: raises if the batch may no longer be used.
    """

    def __init__(
        self,
        batch: int,
        shape: AttentionShape,
        plan: Plan,
        rank: int,
        control: ControlChannel | None,
        speeds: RankSpeeds | None,
        check: Callable[[], None],
    ):
        self._batch, self._shape, self._control, self._speeds, self._check = batch, shape, control, speeds, check
        self.allows_interleaving = control is None
        self._work: dict[str, int] = {}
        if speeds is not None:
            for direction, table in (("forward", plan.forward), ("backward", plan.backward)):
                tasks = select_rows(table.tasks, table.tasks["rank"] == rank)
                cost = CostModel.for_cluster(None, direction, plan.call.head_dim, _BLOCK)
                self._work[direction] = int(cost.task_costs(plan.call, tasks).sum())

    def on_pass_begin(self, direction: str, score: ScoreMod) -> None:
        """Announce the pass to servers, and count its work."""
        if self._control is not None:
            self._check()
            self._control.begin_pass(direction, self._batch, self._shape, score)
        if self._speeds is not None:
            self._speeds.count_pass(self._work[direction])

    def wrap_kernel(self, kernel: Kernel) -> Kernel:
        """Return the kernel, timed if speeds are measured."""
        return kernel if self._speeds is None else self._speeds.timed(kernel)
