"""The table of all ranks whose tokens make up a loss: which ranks share attention, hold the same data, or only serve."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist

from distattn.batch.collectives import shared_name
from distattn.ir.errors import DistattnError
from distattn.parallel.attention_config import AttentionConfig
from distattn.parallel.runtime.communication.collective_calls import run_collective
from distattn.parallel.runtime.communication.communicator import all_gather_objects


class RankTable(NamedTuple):
    """The ranks of an exchange, numbered as in its group.

    name: unique to this exchange. members: the ranks' numbers in the default group. rank: this rank. sharing: the ranks that
    share attention with it. first_of_block: for each rank, the first rank that holds the same batch. has_model: False for server
    ranks.
    """

    config: AttentionConfig
    name: str
    members: list[int]
    rank: int
    sharing: list[int]
    first_of_block: list[int]
    has_model: list[bool]

    @staticmethod
    def gather(
        config: AttentionConfig | None, group: dist.ProcessGroup | None, exchange: dist.ProcessGroup | None
    ) -> RankTable:
        """Gather the table of all ranks of `exchange`. A collective call. config: None on server ranks.

        group: the ranks that share attention with this rank. Raise DistattnError on all ranks if settings differ.
        """
        local = config, [0] if group is None else dist.get_process_group_ranks(group)
        if exchange is None:
            members, name, from_ranks = [0], "", [local]
        else:
            members = dist.get_process_group_ranks(exchange)

            def compare() -> tuple[list[Any], str]:
                return all_gather_objects(exchange, local), shared_name(exchange)

            from_ranks, name = run_collective(exchange, "creating a ContextParallel", compare)
        first = _checked(from_ranks, members)
        rank = members.index(dist.get_rank()) if len(members) > 1 else 0
        first_of_block, has_model = [], []
        for number, (_, ranks) in enumerate(from_ranks):
            position, models = ranks.index(members[number]), len(ranks) - first.servers
            has_model.append(position < models)
            block = position - position % first.block_ranks(len(ranks)) if position < models else position
            first_of_block.append(members.index(ranks[block]))
        sharing = [members.index(other) for other in from_ranks[rank][1]]
        return RankTable(first, name, members, rank, sharing, first_of_block, has_model)

    @property
    def blocks(self) -> list[int]:
        """The first rank of each block."""
        return sorted(
            {first for first, has_model in zip(self.first_of_block, self.has_model, strict=True) if has_model}
        )

    def of_models(self, values: list[Any]) -> list[Any]:
        """Return the values of ranks with a model. values: one per rank."""
        return [value for value, has_model in zip(values, self.has_model, strict=True) if has_model]


def _checked(from_ranks: list[tuple[AttentionConfig | None, list[int]]], members: list[int]) -> AttentionConfig:
    """Return the settings that all ranks share. Raise DistattnError if they differ or do not fit the groups.

    from_ranks: each rank's settings, and the ranks with which it shares attention.
    """
    first = from_ranks[0][0]
    if first is None:
        raise DistattnError("the group's first rank must have a model; servers must be its last ranks.")
    for rank, (config, group) in zip(members, from_ranks, strict=True):
        if config is not None and config != first:
            field = next(name for name in first.__dict__ if getattr(config, name) != getattr(first, name))
            value, first_value = getattr(config, field), getattr(first, field)
            raise DistattnError(f"rank {rank} has {field} = {value!r}, rank {members[0]} {first_value!r}.")
        if missing := set(group) - set(members):
            raise DistattnError(
                f"the loss group lacks rank {min(missing)} of a group that shares attention; it is all ranks of these groups."
            )
    serving = sum(config is None for config, _ in from_ranks)
    if serving != first.servers:
        raise DistattnError(f"{serving} ranks serve, ContextParallel was made with servers={first.servers}.")
    if first.servers and len(members) != len(from_ranks[0][1]):
        raise DistattnError("servers belong to one group that shares attention; leave loss_group out.")
    return first
