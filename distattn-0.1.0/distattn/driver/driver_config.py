"""The settings of `ContextParallel`, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distattn.batch.planner import PlannerConfig
from distattn.ir.errors import DistattnError
from distattn.parallel.make_plan import STRATEGIES

DATA = ("replicated", "per_rank")


@dataclass(frozen=True, kw_only=True)
class DriverConfig(PlannerConfig):
    """Beside how attention is planned: who holds which data, and who computes.

    data: "replicated", all ranks of the group hold the same batch and split it; or "per_rank", every rank, or every block
    of `context_parallel_size` neighbouring ranks, has documents of its own, and attention is shared over all of them.
    servers: the last so many ranks have no model and call `serve` instead. adaptive: attention is shared out by measured
    speeds of ranks, or by a log of them (see `RankSpeeds`). timeout: seconds after which a rank that does not answer is named;
    by default the process group's own.
    """

    data: str = "replicated"
    context_parallel_size: int | None = None
    servers: int = 0
    adaptive: bool | Sequence[Sequence[int] | None] = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data not in DATA:
            raise DistattnError(f"data is {' or '.join(map(repr, DATA))}, not {self.data!r}.")
        if self.data == "replicated" and self.context_parallel_size is not None:
            raise DistattnError(
                'context_parallel_size belongs to data="per_rank"; with data="replicated" all ranks of the group split the '
                "same batch."
            )
        if self.servers and (self.backward or STRATEGIES[self.strategy].backward) == "keep":
            raise DistattnError('servers keep nothing from pass to pass; use backward "refetch-home".')
        if self.adaptive and not STRATEGIES[self.strategy].takes("speeds"):
            raise DistattnError(f'strategy {self.strategy} does not share out by speed; adaptive needs "cad".')
        if self.timeout is not None and not self.timeout > 0:
            raise DistattnError(f"timeout is a number of seconds above 0, not {self.timeout!r}.")

    def block_ranks(self, ranks: int) -> int:
        """How many neighbouring ranks hold the same batch, in a group of so many. Raises DistattnError where none fits."""
        if type(self.servers) is not int or not 0 <= self.servers < ranks:
            raise DistattnError(f"servers is 0 to {ranks - 1} of the group's {ranks} ranks, not {self.servers!r}.")
        models = ranks - self.servers
        if self.data == "replicated":
            return models
        size = self.context_parallel_size or 1
        if type(size) is not int or size < 1 or models % size:
            raise DistattnError(f"context_parallel_size {size!r} does not divide the {models} ranks with a model.")
        return size

    def with_buffer_limit(self) -> Any:
        """The same, where the strategy's planner is told of max_buffer_bytes, too, if it can keep to it."""
        if self.max_buffer_bytes is None or not STRATEGIES[self.strategy].takes("max_buffer_bytes"):
            return self
        return replace(self, options={"max_buffer_bytes": self.max_buffer_bytes, **(self.options or {})})
