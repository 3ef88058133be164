"""What all attention plans of a run have in common: the one place that turns a run's configuration into plan settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distattn.cluster.spec import Machines
from distattn.ir.layout import lay_out
from distattn.ir.mask import Mask
from distattn.ir.plan import Plan
from distattn.parallel.make_plan import make_plan
from distattn.training.config import Config


@dataclass(frozen=True)
class PlanSettings:
    """Everything that a plan depends on, but for the lengths of the documents.

    heads and kv_heads are query and key/value heads, head_dim is the width of one. None leaves a choice to the strategy
    (backward), to the device (kernel), to the accumulation dtype (comm_dtype), or sets no limit (max_buffer_bytes).
    """

    ranks: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    strategy: str = "ring"
    layout: str = "zigzag"
    layout_options: dict[str, int] = field(default_factory=dict)
    kernel: str | None = None
    backward: str | None = None
    comm_dtype: str | None = None
    cluster: Machines | None = None
    max_buffer_bytes: int | None = None

    @staticmethod
    def of_config(config: Config) -> PlanSettings:
        """The settings of a run."""
        model, parallel = config.model, config.parallel
        return PlanSettings(
            ranks=parallel.ranks,
            heads=model.num_attention_heads,
            kv_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            dtype=model.dtype,
            strategy=parallel.strategy,
            layout=parallel.layout,
            layout_options=parallel.layout_options,
            kernel=parallel.kernel,
            backward=parallel.backward or None,
            comm_dtype=parallel.comm_dtype or None,
            cluster=parallel.cluster,
            max_buffer_bytes=parallel.max_buffer_bytes or None,
        )

    def plan(self, lengths: Sequence[int]) -> Plan:
        """The plan of one attention call on documents of these lengths. Raises DistattnError when it cannot be made."""
        mask = Mask.documents(lengths)
        return make_plan(
            mask,
            lay_out(self.layout, lengths, self.ranks, mask, **self.layout_options),
            strategy=self.strategy,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            backward=self.backward,
            wire=self.comm_dtype,
            cluster=self.cluster,
        )

    def context_parallel_arguments(self) -> dict[str, Any]:
        """The keyword arguments with which `ContextParallel` makes the same plans; it takes shapes from the model."""
        return {
            "strategy": self.strategy,
            "layout": self.layout,
            "layout_options": self.layout_options,
            "kernel": self.kernel,
            "backward": self.backward,
            "wire": self.comm_dtype,
            "cluster": self.cluster,
            "capacity": self.max_buffer_bytes,
        }
