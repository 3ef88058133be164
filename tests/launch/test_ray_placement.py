"""Nodes that are held during an attempt until there are enough of them. A stand-in replaces Ray."""

import importlib.util
from types import SimpleNamespace

import pytest

from distattn.launch.node_needs import NodeNeeds

if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is not installed", allow_module_level=True)

from distattn.launch.ray import nodes as ray_nodes
from distattn.launch.ray import placement
from distattn.launch.ray.nodes import NodeCounts, RayNodes, _natural_order
from distattn.training.run_folder import RunFolder


@pytest.fixture
def ray(monkeypatch):
    """Return a cluster that provides nodes when a test says so. asked: (count, excluded nodes) of each request. now:
    the time in seconds.
    """
    cluster = SimpleNamespace(asked=[], given={}, held=[], now=0.0)

    def hold(needs, count, without):
        cluster.asked.append((count, list(without)))
        cluster.held.append(len(cluster.asked))
        return len(cluster.asked)

    def table(group):
        nodes = cluster.given.get(group, [])
        return {"state": "CREATED" if nodes else "PENDING", "bundles_to_node_id": dict(enumerate(nodes))}

    monkeypatch.setattr(placement, "hold_nodes", hold)
    monkeypatch.setattr(placement, "placement_group_table", table)
    monkeypatch.setattr(placement, "remove_placement_group", cluster.held.remove)
    monkeypatch.setattr(placement, "time", SimpleNamespace(monotonic=lambda: cluster.now))
    return cluster


def test_nodes_that_come_together_are_taken_together_and_the_most_at_once(ray):
    reservation = placement.NodeReservation(NodeNeeds(2, 0, 2), ["a", "b"], (8, 4, 3, 2, 1), ["bad"])

    def found(seconds: float) -> int:
        ray.now += seconds
        return reservation.available_nodes()

    assert found(0) == 0 and ray.asked == [(1, ["bad", "a", "b"])]
    ray.given[1] = ["c"]
    # a second request may follow
    assert found(2) == 0 and ray.asked[1:] == [(1, ["bad", "a", "b", "c"])]
    assert found(9) == 0 and found(2) == 3
    ray.given[2] = ["d"]
    assert found(2) == 0 and ray.asked[2:] == [(4, ["bad", "a", "b", "c", "d"])]
    ray.given[3] = ["e", "f", "g", "h"]
    assert found(2) == 8 and len(ray.asked) == 3
    reservation.close()
    assert not ray.held


def test_an_attempt_that_has_all_nodes_asks_for_none(ray):
    assert (
        placement.NodeReservation(NodeNeeds(2, 0, 2), ["a", "b"], (2, 1), []).available_nodes() == 0 and not ray.asked
    )


def test_nodes_keep_the_order_of_their_numbers():
    names = ["node10", "10.0.0.9", "node2", "10.0.0.10", "node1"]
    assert sorted(names, key=_natural_order) == ["10.0.0.9", "10.0.0.10", "node1", "node2", "node10"]


@pytest.mark.parametrize(
    ("usable", "fewer"),
    [
        # as many nodes exist as before, so fewer are requested only once Ray has had time to free them
        (2, [False, False, True, False, True]),
        # one node is lost
        (1, [False, True, True, False, True]),
    ],
)
def test_busy_nodes_are_waited_for(usable, fewer, tmp_path, monkeypatch):
    nodes = RayNodes(RunFolder(tmp_path), "job", NodeNeeds(2, 0, 2), NodeCounts((2, 1), 600, 30, lambda nodes: None))
    monkeypatch.setattr(nodes, "_usable", lambda: usable)
    # seconds spent waiting for this number of nodes, and waiting in total
    waited = [(29, 29), (31, 31), (61, 61), (29, 90), (31, 92)]
    assert [nodes._is_short(*seconds) for seconds in waited] == fewer
    hasty = RayNodes(RunFolder(tmp_path), "job", NodeNeeds(2, 0, 2), NodeCounts((2, 1), 40, 10, lambda nodes: None))
    monkeypatch.setattr(hasty, "_usable", lambda: 2)
    assert [hasty._is_short(*seconds) for seconds in [(15, 15), (21, 21)]] == [False, True]


def test_a_node_that_never_answers_while_others_stay_taken_ends_the_waiting(tmp_path, monkeypatch):
    nodes = RayNodes(RunFolder(tmp_path), "job", NodeNeeds(2, 0, 2), NodeCounts((2,), 600, 30, lambda nodes: None))
    clock, left_out = [0.0], nodes._left_out.hosts

    def placed():
        # a, b and c exist, and c is busy. Ray provides b once it is no longer excluded
        while "b" in left_out:
            clock[0] += 70.0
            if clock[0] > 2000:
                return None
            nodes._ask_for_less()
        return "group"

    def answers(asked):
        clock[0] += 60.0
        return [SimpleNamespace(), "did not answer for 60 s"]

    monkeypatch.setattr(nodes, "_placed", placed)
    monkeypatch.setattr(nodes, "_usable", lambda: 3 - len(left_out))
    monkeypatch.setattr(nodes, "_agent", lambda group, bundle: SimpleNamespace(place=SimpleNamespace(remote=int)))
    monkeypatch.setattr(ray_nodes, "_answers", answers)
    monkeypatch.setattr(ray_nodes, "_alive", lambda: {"a", "b", "c"})
    monkeypatch.setattr(ray_nodes, "_end", lambda agents: None)
    monkeypatch.setattr(ray_nodes, "bundle_nodes", lambda group: {0: "a", 1: "b"})
    monkeypatch.setattr(ray_nodes, "node_names", lambda: {name: name for name in "abc"})
    monkeypatch.setattr(ray_nodes, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    assert nodes.choose() is None and 600 < clock[0] < 800
