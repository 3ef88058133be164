"""What a driver knows of all ranks whose tokens make up a loss: who shares attention, who holds which data, who serves."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist

from distattn.batch.collectives import shared_name
from distattn.ir.errors import DistattnError
from distattn.parallel.attention_config import AttentionConfig
from distattn.parallel.runtime.collective_calls import run_collective
from distattn.parallel.runtime.communicator import all_gather_objects


class RankTable(NamedTuple):
    """The ranks of an exchange, numbered as in its group.

    name: what nobody else's exchange is called. members: the ranks as the default group numbers them. rank: this one.
    sharing: those that share attention with this one. first_of_block: of each rank the first that holds the same batch.
    has_model: false for those that only serve.
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
        """The table of the ranks of `exchange`, all of which call this. config: None on ranks that only serve.

        group: those that share attention with this rank. Raises DistattnError on all ranks for settings that differ.
        """
        mine = config, [0] if group is None else dist.get_process_group_ranks(group)
        if exchange is None:
            members, name, everyone = [0], "", [mine]
        else:
            members = dist.get_process_group_ranks(exchange)

            def compare() -> tuple[list[Any], str]:
                return all_gather_objects(exchange, mine), shared_name(exchange)

            everyone, name = run_collective(exchange, "the making of a ContextParallel", compare)
        first = _checked(everyone, members)
        rank = members.index(dist.get_rank()) if len(members) > 1 else 0
        first_of_block, has_model = [], []
        for number, (_, ranks) in enumerate(everyone):
            at, models = ranks.index(members[number]), len(ranks) - first.servers
            has_model.append(at < models)
            block = at - at % first.block_ranks(len(ranks)) if at < models else at
            first_of_block.append(members.index(ranks[block]))
        sharing = [members.index(other) for other in everyone[rank][1]]
        return RankTable(first, name, members, rank, sharing, first_of_block, has_model)

    @property
    def blocks(self) -> list[int]:
        """The first rank of each block."""
        return sorted({first for first, has in zip(self.first_of_block, self.has_model, strict=True) if has})

    def of_models(self, values: list[Any]) -> list[Any]:
        """Of values by rank, those of ranks with a model."""
        return [value for value, has in zip(values, self.has_model, strict=True) if has]


def _checked(everyone: list[tuple[AttentionConfig | None, list[int]]], members: list[int]) -> AttentionConfig:
    """The settings of all ranks. Raises DistattnError where they differ, or where groups do not fit them."""
    first = everyone[0][0]
    if first is None:
        raise DistattnError("the group's first rank has to have a model; servers are its last ranks.")
    for rank, (config, group) in zip(members, everyone, strict=True):
        if config is not None and config != first:
            field = next(name for name in first.__dict__ if getattr(config, name) != getattr(first, name))
            theirs, ours = getattr(config, field), getattr(first, field)
            raise DistattnError(f"rank {rank} has {field} = {theirs!r}, rank {members[0]} {ours!r}.")
        if missing := set(group) - set(members):
            raise DistattnError(
                f"the loss group lacks rank {min(missing)} of a group that shares attention; it is all ranks of these groups."
            )
    serving = sum(config is None for config, _ in everyone)
    if serving != first.servers:
        raise DistattnError(f"{serving} ranks serve, ContextParallel was made with servers={first.servers}.")
    if first.servers and len(members) != len(everyone[0][1]):
        raise DistattnError("servers belong to one group that shares attention; leave loss_group out.")
    return first
