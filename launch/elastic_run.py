"""A run whose number of nodes may change between its attempts, and with it the number of data-parallel replicas, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distattn.ir.errors import DistattnError
from distattn.launch.command_line import say
from distattn.launch.node_needs import node_needs
from distattn.launch.start_run import change_config
from distattn.training.config import Config
from distattn.training.config_checks import problems_of
from distattn.training.run_folder import RunFolder


def node_counts(config: Config, most: int = 0) -> tuple[int, ...]:
    """The numbers of nodes that a run may have, the most first: those with whole replicas that each have packs of every step.

    most: of which it was started with, if these were more. Raises DistattnError where `ray.min_nodes` leaves no choice.
    """
    ranks, least = node_needs(config).ranks, config.ray.min_nodes
    now = config.parallel.ranks // ranks
    if not least:
        return (now,)
    most = max(most, now)
    if least >= most:
        raise DistattnError(f"ray.min_nodes: {least}, and the run has {most} nodes; take fewer, or 0.")
    counts = tuple(count for count in range(most, least - 1, -1) if not problems_of(_resized(config, count)))
    if len(counts) < 2:
        parallel = config.parallel
        raise DistattnError(
            f"ray.min_nodes: {least}, but no number of nodes from {least} to {most - 1} has whole replicas of "
            f"{parallel.ranks // parallel.data_parallel_size} ranks with equally many packs of a step; take another, or 0."
        )
    return counts


class ElasticRun:
    """The numbers of nodes of a run, and its configuration with the one it has. facts: of that, for notes of attempts."""

    def __init__(self, run: RunFolder, config: Config, most: int, facts: Mapping[str, Any]):
        """Raises DistattnError as `node_counts`. facts: others."""
        self._run, self._config = run, config
        self.counts = node_counts(config, most)
        self.facts = dict(facts)
        self._note(config.parallel.ranks // node_needs(config).ranks)

    def resize(self, nodes: int) -> None:
        """Have the next attempt's ranks be those of so many nodes. No rank may run. Raises DistattnError as `change_config`."""
        if nodes == self.facts["nodes"]:
            return
        config = _resized(self._config, nodes)
        change_config(self._run, config)
        self._config = config
        self._note(nodes)
        say(f"the run goes on with {nodes} nodes: {self.facts['replicas']} data-parallel replicas.")

    def _note(self, nodes: int) -> None:
        self.facts |= {"nodes": nodes, "replicas": self._config.parallel.data_parallel_size}


def _resized(config: Config, nodes: int) -> Config:
    """The same configuration for another number of nodes."""
    return replace(config, parallel=replace(config.parallel, ranks=nodes * node_needs(config).ranks))
