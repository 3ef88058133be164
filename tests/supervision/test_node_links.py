"""A link that is cut between nodes is named. Each node has its own network, which ends with the test."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_ports
from waiting import LIMIT_SECONDS, eventually

from distattn.checkpoints.owner import machine_digest, writer_name
from distattn.launch.attempt_end import AttemptEnd
from distattn.supervision import node_links
from distattn.supervision.node_links import CutLink, NodeAddress, NodeLinks, blamed_nodes, merged_links

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support' / 'launching'}",
    "GLOO_SOCKET_IFNAME": "link0",
}
DIGESTS = "from distattn.checkpoints.owner import *; print(machine_digest(), writer_name().partition('-')[0])"


@contextlib.contextmanager
def networks() -> Iterator[list[list[str]]]:
    """Create two networks connected by a link, 10.77.0.1 and 10.77.0.2, that end with their processes.

    Yield the command prefix for each network. Skip the test if networks cannot be created.
    """
    with contextlib.ExitStack() as opened:
        try:
            holders = [subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) for _ in range(2)]
        except OSError as error:
            pytest.skip(f"no networks of our own: {error}")
        for holder in holders:
            opened.enter_context(holder)
            opened.callback(holder.kill)
        inside = [["nsenter", "--target", str(holder.pid), "--net"] for holder in holders]
        ours = os.readlink("/proc/self/ns/net")

        def apart() -> bool:
            return all(
                holder.poll() is not None or os.readlink(f"/proc/{holder.pid}/ns/net") != ours for holder in holders
            )

        eventually(apart, "no network of its own")
        pair = ["ip", "link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", str(holders[1].pid)]
        commands = [(0, pair)]
        for node in range(2):
            commands += [(node, ["ip", "address", "add", f"10.77.0.{node + 1}/24", "dev", "link0"])]
            commands += [(node, ["ip", "link", "set", name, "up"]) for name in ("lo", "link0")]
        for node, command in commands:
            done = subprocess.run([*inside[node], *command], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no networks of our own: {done.stderr.strip()}")
        yield inside


@pytest.mark.full
@pytest.mark.waits
def test_a_link_that_is_cut_is_named_by_both_nodes_and_they_are_two_machines(tmp_path):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "fault.json").write_text(json.dumps({"rank": 2, "step": 5, "kind": "cut"}))
    cases = json.dumps([["cut", free_ports(1)[0]]])
    with networks() as inside:
        digests = [
            subprocess.run([*enter, sys.executable, "-c", DIGESTS], env=ENVIRONMENT, capture_output=True, text=True)
            for enter in inside
        ]
        # processes in both networks see each other, but each network has its own loopback
        machines, writers = zip(*(done.stdout.split() for done in digests), strict=True)
        assert len({*machines, machine_digest()}) == 3 and {*writers} == {writer_name().partition("-")[0]}
        script = [sys.executable, str(ROOT / "tests" / "support" / "launching" / "supervised_nodes.py"), str(tmp_path)]
        nodes = [
            subprocess.Popen(
                [*inside[node], *script, str(node), cases, "10.77.0.1"],
                env=ENVIRONMENT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for node in range(2)
        ]
        for node in nodes:
            _, output = node.communicate(timeout=LIMIT_SECONDS)
            assert node.returncode == 0, output
    host = socket.gethostname()
    for node in range(2):
        told = json.loads((tmp_path / "cut" / f"node-{node}.json").read_text())
        assert told["why"].startswith(
            f"node 0 ({host}, 10.77.0.1) and node 1 ({host}, 10.77.0.2) no longer reach each other"
        )
        assert told["why"].endswith(": the link between them is cut") and told["ranks"] == [], told


def link(first: int, second: int) -> CutLink:
    return CutLink(first, second, f"node {first} and node {second}", "no longer reach each other")


def test_a_node_that_all_others_miss_is_to_blame_and_of_two_both_are():
    assert blamed_nodes([link(0, 1)]) == [0, 1]
    assert blamed_nodes([link(0, 2), link(1, 2), link(2, 3)]) == [2]
    assert merged_links([[link(1, 2)], [link(0, 2), link(1, 2)], []]) == [link(0, 2), link(1, 2)]


def test_a_link_counts_as_cut_only_if_it_worked_before(tmp_path, monkeypatch):
    monkeypatch.setattr(node_links, "_LOOK_SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        # one port accepts connections, the other refuses them
        ports = [taken.getsockname()[1], free_ports(1)[0]]
        address, *others = [NodeAddress("a", "127.0.0.1", port) for port in (1, *ports)]
        for node, at in enumerate(others, 1):
            (tmp_path / f"address-{node}.json").write_text(json.dumps(at))
        links = NodeLinks(tmp_path, 0, 4, address)
        eventually(lambda: len(links._reached) == 2, "nodes are not reached")
        assert links.cut() == []
        # a node that was never reached is not reported
        monkeypatch.setattr(node_links, "unreached", lambda places, seconds: dict.fromkeys(places, "No route to host"))
        assert [(cut.first, cut.second) for cut in links.cut()] == [(0, 1), (0, 2)]
        (_, second) = links.cut()
        sentence = f"{second.names} {second.how}"
        assert (
            sentence
            == "node 0 (a, 127.0.0.1) and node 2 (a, 127.0.0.1) no longer reach each other (No route to host): "
            + ("the link between them is cut")
        )
        # the folder is unreachable as well, and the other node has restarted elsewhere
        (tmp_path / "address-1.json").unlink()
        (tmp_path / "address-2.json").write_text(json.dumps(address))
        assert [(cut.first, cut.second) for cut in links.cut()] == [(0, 1)]
        links.close()
    assert NodeAddress(*json.loads((tmp_path / "address-0.json").read_text())) == address


def test_what_ranks_raise_follows_from_a_link_that_is_cut():
    end = AttemptEnd(1, {"a": 1, "b": 1})
    cut = {"why": "node 0 and node 1 no longer reach each other", "exit_code": 1, "nodes": [0, 1], "kind": "cut"}
    hung = {"why": "rank 2 waits for a message that does not arrive", "exit_code": 1, "nodes": [1], "kind": "hung"}
    assert end.cause(["a", "b"], {0: hung, 1: cut}) == (f"a, b: {cut['why']}", ["a", "b"])
