"""Settings that all attention plans of a run share: the one place that turns a run's configuration into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distattn.batch.pooled_layout import BlockLayouts
from distattn.cluster.spec import AnyCluster, load
from distattn.cluster.topology import Cluster
from distattn.ir.plan import Plan
from distattn.parallel.latent_plan import make_latent_plan
from distattn.parallel.make_plan import STRATEGIES, make_plan
from distattn.training.config.run_file import Config


@dataclass(frozen=True)
class PlanSettings:
    """Everything that a plan depends on, except the lengths of the documents.

    heads and kv_heads are query and key/value heads, head_dim is the width of one head, v_head_dim that of values where
    it differs. latents: the widths of rotary keys and of latents, where latents may be sent in place of keys and
    values. None leaves a choice to the strategy (backward), the device (kernel) or the accumulation dtype (comm_dtype),
    or sets no limit (max_buffer_bytes).
    """

    ranks: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    strategy: str = "ring"
    data: str = "replicated"
    context_parallel_size: int | None = None
    layout: str = "zigzag"
    layout_options: dict[str, int] = field(default_factory=dict)
    kernel: str | None = None
    backward: str | None = None
    comm_dtype: str | None = None
    cluster: AnyCluster | None = None
    max_buffer_bytes: int | None = None
    v_head_dim: int | None = None
    latents: tuple[int, int] | None = None

    @staticmethod
    def of_config(config: Config) -> PlanSettings:
        """Return the settings of a run."""
        model, parallel = config.model, config.parallel
        return PlanSettings(
            ranks=parallel.attention_ranks,
            heads=model.num_attention_heads // parallel.tensor_parallel_size,
            kv_heads=max(model.num_key_value_heads // parallel.tensor_parallel_size, 1),
            head_dim=model.head_size,
            dtype=model.dtype,
            strategy=parallel.strategy,
            data=parallel.data,
            context_parallel_size=parallel.split_ranks if parallel.data == "per_rank" else None,
            layout=parallel.layout,
            layout_options=parallel.layout_options,
            kernel=parallel.kernel,
            backward=parallel.backward or None,
            comm_dtype=parallel.comm_dtype or None,
            cluster=_cluster_of(config),
            max_buffer_bytes=parallel.max_buffer_bytes or None,
        )

    @property
    def data_parallel_size(self) -> int:
        """Number of packs of one attention call: one that all ranks split, or one for each rank or block of ranks."""
        return 1 if self.data == "replicated" else self.ranks // (self.context_parallel_size or 1)

    def plan(self, *packs: Sequence[int]) -> Plan:
        """Return the plan of one attention call on a step's packs, given by the lengths of their documents.

        Raises DistattnError where no plan is possible.
        """
        block_ranks = self.ranks // self.data_parallel_size
        layouts = BlockLayouts(self.ranks, block_ranks, self.layout, self.layout_options, "causal")
        mask, layout = layouts.of_batch(tuple(tuple(lengths) for lengths in packs))
        options: dict[str, Any] = dict(
            strategy=self.strategy,
            heads=self.heads,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim or self.head_dim,
            dtype=self.dtype,
            backward=self.backward,
            comm_dtype=self.comm_dtype,
            cluster=self.cluster,
            options=self.strategy_options,
            max_buffer_bytes=self.max_buffer_bytes,
        )
        if self.latents is None:
            return make_plan(mask, layout, kv_heads=self.kv_heads, **options)
        rotary_dim, latent_dim = self.latents
        return make_latent_plan(mask, layout, rotary_dim=rotary_dim, latent_dim=latent_dim, **options)

    @property
    def strategy_options(self) -> dict[str, Any]:
        """Options of the strategy, with max_buffer_bytes where it can keep to that."""
        limited = self.max_buffer_bytes is not None and STRATEGIES[self.strategy].takes("max_buffer_bytes")
        return {"max_buffer_bytes": self.max_buffer_bytes} if limited else {}

    def context_parallel_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments with which `ContextParallel` makes the same plans; it takes shapes from the
        model.
        """
        return {
            "strategy": self.strategy,
            "data": self.data,
            "layout": self.layout,
            "layout_options": self.layout_options,
            "kernel": self.kernel,
            "backward": self.backward,
            "comm_dtype": self.comm_dtype,
            "cluster": self.cluster,
            "max_buffer_bytes": self.max_buffer_bytes,
        }


def _cluster_of(config: Config) -> AnyCluster | None:
    """Return the nodes of the ranks that share attention, with the speeds of cluster.description where it is given."""
    nodes = config.parallel.cluster
    if not config.cluster.description:
        return nodes
    nodes = nodes or Cluster(1, config.parallel.attention_ranks)
    return replace(load(config.cluster.description), nodes=nodes.nodes, devices=nodes.devices)
