"""Placement groups of a Ray cluster with one bundle a node, and reservations of more nodes while an attempt runs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from distattn.launch.node_needs import NodeNeeds

# between two questions to the cluster
_LOOK_SECONDS = 1.0
# that further nodes may take to follow the last one: nodes that come together are taken in together
_SETTLE_SECONDS = 10.0


def hold_nodes(needs: NodeNeeds, count: int, without: Sequence[str]) -> PlacementGroup:
    """Ask for room on so many nodes at once, each another one. without: Ray's numbers of nodes that are not taken."""
    bundle = {"CPU": float(needs.cpus)} | ({"GPU": float(needs.gpus)} if needs.gpus else {})
    # no blanks: Ray takes them for a part of the number
    others = {"ray.io/node-id": f"!in({','.join(without)})"} if without else {}
    return placement_group([bundle] * count, strategy="STRICT_SPREAD", bundle_label_selector=[others] * count)


def node_slots(needs: NodeNeeds) -> int:
    """How many nodes' ranks the cluster could hold if nobody used it; a large node may hold those of several runs."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": needs.cpus, "GPU": needs.gpus}
    return sum(min(int(has.get(kind, 0) // count) for kind, count in wanted.items() if count) for has in resources)


def bundle_nodes(group: PlacementGroup) -> dict[int, str]:
    """Ray's number of the node of each bundle; a bundle whose node is gone has none."""
    found: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return {bundle: node for bundle, node in found.items() if node}


class NodeReservation:
    """A reservation of nodes for an attempt that may grow: it holds them until they make up one of the larger node counts.

    A placement group that waits is what Ray's autoscaler adds nodes for.
    """

    def __init__(self, needs: NodeNeeds, nodes: Sequence[str], counts: Sequence[int], left_out: Sequence[str]):
        """nodes: Ray's numbers of those of the attempt. counts: how many it may have. left_out: nodes that are not taken."""
        self._needs, self._without = needs, [*left_out, *nodes]
        self._counts = [len(nodes), *sorted(count for count in counts if count > len(nodes))]
        # of the second count, the third and so on; only the last may wait
        self._groups: list[PlacementGroup] = []
        self._placed = 0
        self._looked = self._found_at = float("-inf")

    def available_nodes(self) -> int:
        """Return how many nodes the run can have now, those of the attempt included.

        Return 0 if there are no more, or if further ones may follow soon.
        """
        now = time.monotonic()
        if self._placed + 1 < len(self._counts) and now - self._looked > _LOOK_SECONDS:
            self._looked = now
            self._look(now)
        settled = self._placed + 1 == len(self._counts) or now - self._found_at > _SETTLE_SECONDS
        return self._counts[self._placed] if self._placed and settled else 0

    def close(self) -> None:
        """Give the nodes back."""
        while self._groups:
            remove_placement_group(self._groups.pop())

    def _look(self, now: float) -> None:
        if len(self._groups) > self._placed:
            if placement_group_table(self._groups[-1])["state"] != "CREATED":
                return
            self._placed, self._found_at = self._placed + 1, now
            self._without += bundle_nodes(self._groups[-1]).values()
        if self._placed + 1 < len(self._counts):
            missing = self._counts[self._placed + 1] - self._counts[self._placed]
            self._groups.append(hold_nodes(self._needs, missing, self._without))
