"""Placement groups with one bundle per node of a Ray cluster, and reservations of more nodes while an attempt runs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from distattn.launch.node_needs import NodeNeeds

# seconds between requests to the cluster
_LOOK_SECONDS = 1.0
# seconds to wait for more nodes after a new one, so that nodes added together join in the same attempt
_SETTLE_SECONDS = 10.0


def hold_nodes(needs: NodeNeeds, count: int, without: Sequence[str]) -> PlacementGroup:
    """Request room on `count` different nodes in one group. without: Ray's ids of excluded nodes."""
    bundle = {"CPU": float(needs.cpus)} | ({"GPU": float(needs.gpus)} if needs.gpus else {})
    # no spaces, which Ray would treat as part of an id
    others = {"ray.io/node-id": f"!in({','.join(without)})"} if without else {}
    return placement_group([bundle] * count, strategy="STRICT_SPREAD", bundle_label_selector=[others] * count)


def node_slots(needs: NodeNeeds) -> int:
    """Return how many times the cluster, if idle, has room for a node with `needs`. A large node may count several times."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": needs.cpus, "GPU": needs.gpus}
    return sum(min(int(node.get(kind, 0) // count) for kind, count in wanted.items() if count) for node in resources)


def bundle_nodes(group: PlacementGroup) -> dict[int, str]:
    """Return Ray's node id for each bundle, without bundles whose node is gone."""
    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return {bundle: node for bundle, node in nodes.items() if node}


class NodeReservation:
    """Reserves nodes in addition to an attempt's nodes, to reach the next larger node count that the run may use.

    The pending request also makes Ray's autoscaler add nodes.
    """

    def __init__(self, needs: NodeNeeds, nodes: Sequence[str], counts: Sequence[int], left_out: Sequence[str]):
        """Start without reserved nodes.

        nodes: Ray's ids of the attempt's nodes. counts: possible node counts. left_out: Ray's ids of excluded nodes.
        """
        self._needs, self._without = needs, [*left_out, *nodes]
        self._counts = [len(nodes), *sorted(count for count in counts if count > len(nodes))]
        # groups by which the nodes grow to the second count, the third and so on; only the last group may still be pending
        self._groups: list[PlacementGroup] = []
        self._placed = 0
        self._looked = self._found_at = float("-inf")

    def available_nodes(self) -> int:
        """Return the node count that the run can now grow to; 0 if it cannot grow, or if more nodes may follow soon."""
        now = time.monotonic()
        if self._placed + 1 < len(self._counts) and now - self._looked > _LOOK_SECONDS:
            self._looked = now
            self._look(now)
        settled = self._placed + 1 == len(self._counts) or now - self._found_at > _SETTLE_SECONDS
        return self._counts[self._placed] if self._placed and settled else 0

    def close(self) -> None:
        """Give the reserved nodes back to the cluster."""
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
