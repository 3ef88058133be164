"""Elastic runs: the number of nodes, and with it of data-parallel replicas, may change between attempts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distattn.ir.errors import DistattnError
from distattn.ir.text_format import print_message
from distattn.launch.node_needs import node_needs
from distattn.launch.start_run import change_config
from distattn.training.config.checks import problems_of
from distattn.training.config.run_file import Config
from distattn.training.run_folder import RunFolder


def node_counts(config: Config, most: int = 0) -> tuple[int, ...]:
    """Return a run's possible node counts, largest first. Each gives complete replicas with the same number of packs per step.

    most: the node count at the run's start, if it was larger than now. Raises DistattnError if `ray.min_nodes` leaves no choice.
    """
    ranks, least = node_needs(config).ranks, config.ray.min_nodes
    now = config.parallel.ranks // ranks
    if not least:
        return (now,)
    most = max(most, now)
    if least >= most:
        raise DistattnError(f"ray.min_nodes: {least}, but the run has {most} nodes; use a smaller number, or 0.")
    counts = tuple(count for count in range(most, least - 1, -1) if not problems_of(_resized(config, count)))
    if len(counts) < 2:
        parallel = config.parallel
        raise DistattnError(
            f"ray.min_nodes: {least}, but no number of nodes from {least} to {most - 1} has whole replicas of "
            f"{parallel.ranks // parallel.data_parallel_size} ranks with equal numbers of packs per step; use another, or 0."
        )
    return counts


class ElasticRun:
    """A run's possible node counts, and its configuration for the current count. facts: recorded for each attempt."""

    def __init__(self, run: RunFolder, config: Config, most: int, facts: Mapping[str, Any]):
        """Find the counts. most: see `node_counts`, whose errors this raises. facts: additional facts about each attempt."""
        self._run, self._config = run, config
        self.counts = node_counts(config, most)
        self.facts = dict(facts)
        self._note(config.parallel.ranks // node_needs(config).ranks)

    def resize(self, nodes: int) -> None:
        """Set the node count of the next attempt. No rank may be running. Raises the same errors as `change_config`."""
        if nodes == self.facts["nodes"]:
            return
        config = _resized(self._config, nodes)
        change_config(self._run, config)
        self._config = config
        self._note(nodes)
        print_message(f"the run goes on with {nodes} nodes: {self.facts['replicas']} data-parallel replicas.")

    def _note(self, nodes: int) -> None:
        self.facts |= {"nodes": nodes, "replicas": self._config.parallel.data_parallel_size}


def _resized(config: Config, nodes: int) -> Config:
    """Return the configuration with as many ranks as `nodes` nodes have."""
    return replace(config, parallel=replace(config.parallel, ranks=nodes * node_needs(config).ranks))
