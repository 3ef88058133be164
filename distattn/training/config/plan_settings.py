"""Converts a run's configuration into attention settings, and into the settings with which batches are planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from distattn.batch.pooled_layout import BlockLayouts
from distattn.cluster.spec import AnyCluster, load
from distattn.cluster.topology import Cluster
from distattn.ir.plan import Plan
from distattn.parallel.attention_config import AttentionConfig
from distattn.parallel.latent_plan import make_latent_plan
from distattn.parallel.make_plan import make_plan
from distattn.training.config.run_file import Config


def attention_config(config: Config) -> AttentionConfig:
    """Return a run's attention settings in the form that `ContextParallel` and `make_plan` accept."""
    parallel = config.parallel
    return AttentionConfig.of(
        parallel,
        layout_options=parallel.layout_options,
        cluster=_cluster_of(config),
        context_parallel_size=parallel.split_ranks if parallel.data == "per_rank" else None,
    )


@dataclass(frozen=True)
class PlanSettings:
    """Everything that a plan depends on except the document lengths.

    ranks: number of ranks that share attention. heads, kv_heads: numbers of query and of key/value heads. head_dim: width of one
    head. v_head_dim: width of a value head, if it differs from head_dim. latents: widths of rotary keys and of latents, if
    latents may be sent instead of keys and values.
    """

    ranks: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    config: AttentionConfig = field(default_factory=AttentionConfig)
    v_head_dim: int | None = None
    latents: tuple[int, int] | None = None

    @staticmethod
    def of_config(config: Config) -> PlanSettings:
        """Return the plan settings of a run."""
        model, parallel = config.model, config.parallel
        return PlanSettings(
            ranks=parallel.attention_ranks,
            heads=model.num_attention_heads // parallel.tensor_parallel_size,
            kv_heads=max(model.num_key_value_heads // parallel.tensor_parallel_size, 1),
            head_dim=model.head_size,
            dtype=model.dtype,
            config=attention_config(config),
        )

    @property
    def data_parallel_size(self) -> int:
        """Number of packs in one attention call: one pack split by all ranks, or one pack for each rank or block of ranks."""
        return self.ranks // self.config.block_ranks(self.ranks)

    def plan(self, *packs: Sequence[int]) -> Plan:
        """Return the plan of one attention call. packs: the document lengths of each pack.

        Raises DistattnError if no plan is possible.
        """
        layouts = BlockLayouts(self.ranks, self.config.block_ranks(self.ranks), self.config)
        mask, layout = layouts.of_batch(tuple(tuple(lengths) for lengths in packs))
        make: Callable[..., Plan] = partial(make_plan, kv_heads=self.kv_heads)
        if self.latents is not None:
            make = partial(make_latent_plan, rotary_dim=self.latents[0], latent_dim=self.latents[1])
        widths = partial(make, head_dim=self.head_dim, v_head_dim=self.v_head_dim or self.head_dim)
        return widths(mask, layout, config=self.config, heads=self.heads, dtype=self.dtype)


def _cluster_of(config: Config) -> AnyCluster | None:
    """Return the nodes of the ranks that share attention, with the speeds of cluster.description if it is set."""
    nodes = config.parallel.cluster
    if not config.cluster.description:
        return nodes
    nodes = nodes or Cluster(1, config.parallel.attention_ranks)
    return replace(load(config.cluster.description), nodes=nodes.nodes, devices=nodes.devices)
