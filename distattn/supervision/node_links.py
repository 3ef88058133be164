"""Find which nodes of an attempt reach each other, to distinguish a cut link from ranks that hang.

Each node writes its address to a file in the attempt's folder, which all nodes share. A node counts as reached if it accepts or
refuses a TCP connection, so no socket has to listen there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# maximum seconds to wait for an answer; seconds between tries to reach the remaining nodes; number of tries (ten minutes)
ANSWER_SECONDS, _LOOK_SECONDS, _LOOKS = 3.0, 2.0, 300
# a node that refuses a connection counts as reached
_REACHED = (0, errno.ECONNREFUSED)


class NodeAddress(NamedTuple):
    """The address of a node. host: its name. address: its IP address. port: for trial connections, which may be refused."""

    host: str
    address: str
    port: int


class CutLink(NamedTuple):
    """Two nodes that can no longer reach each other. names, how: the subject and the predicate of a sentence about them."""

    first: int
    second: int
    names: str
    how: str


class NodeLinks:
    """The links from one node to the others. Only a link that once worked counts as cut; a firewall may block other links."""

    def __init__(self, folder: Path, node: int, nodes: int, own_address: NodeAddress):
        self._folder, self._node, self._nodes, self._own_address = folder, node, nodes, own_address
        self._reached: dict[int, NodeAddress] = {}
        self._closed = threading.Event()
        with contextlib.suppress(OSError):
            self._file(node).write_text(json.dumps(own_address), "utf-8")
        threading.Thread(target=self._reach, daemon=True, name="distattn-node-links").start()

    def cut(self) -> list[CutLink]:
        """Return the links that once worked and are cut now. Takes at most ANSWER_SECONDS."""
        # skip nodes that a scheduler restarted at another address; if the folder is unreachable, keep the known address
        reached = {node: at for node, at in self._reached.items() if self._address(node) in (None, at)}
        failed = unreached(reached, ANSWER_SECONDS)
        return [self._cut(node, reached[node], why) for node, why in sorted(failed.items())]

    def close(self) -> None:
        """Stop trying to reach the remaining nodes."""
        self._closed.set()

    def _reach(self) -> None:
        for _ in range(_LOOKS):
            others = {node: self._address(node) for node in range(self._nodes) if node != self._node}
            new = {node: at for node, at in others.items() if at is not None and node not in self._reached}
            failed = unreached(new, ANSWER_SECONDS)
            self._reached |= {node: at for node, at in new.items() if node not in failed}
            if len(self._reached) == self._nodes - 1 or self._closed.wait(_LOOK_SECONDS):
                return

    def _address(self, node: int) -> NodeAddress | None:
        # the file may be missing or incomplete
        with contextlib.suppress(OSError, ValueError, TypeError):
            return NodeAddress(*json.loads(self._file(node).read_text("utf-8")))
        return None

    def _file(self, node: int) -> Path:
        return self._folder / f"address-{node}.json"

    def _cut(self, node: int, at: NodeAddress, why: str) -> CutLink:
        ends = sorted([(self._node, self._own_address), (node, at)])
        names = " and ".join(f"node {number} ({place.host}, {place.address})" for number, place in ends)
        return CutLink(
            ends[0][0], ends[1][0], names, f"no longer reach each other ({why}): the link between them is cut"
        )


def blamed_nodes(cut: Iterable[CutLink]) -> list[int]:
    """Return the nodes with the most cut links: one node if several links to it are cut, both ends if only one link is cut."""
    counts = Counter(node for link in cut for node in (link.first, link.second))
    return sorted(node for node, count in counts.items() if count == max(counts.values()))


def merged_links(links_by_node: Iterable[Sequence[CutLink]]) -> list[CutLink]:
    """Merge the cut links found by several nodes. Return each pair of nodes once."""
    links: dict[tuple[int, int], CutLink] = {}
    for link in (link for node_links in links_by_node for link in node_links):
        links.setdefault((link.first, link.second), link)
    return [links[pair] for pair in sorted(links)]


def unreached(places: Mapping[int, NodeAddress], seconds: float) -> dict[int, str]:
    """Try to reach all nodes concurrently, for at most `seconds`. Return the reason for each node that was not reached."""
    failed: dict[int, str] = {}
    waiting: dict[int, tuple[int, socket.socket]] = {}
    with contextlib.ExitStack() as opened:
        poll = select.poll()
        for node, at in places.items():
            family = socket.AF_INET6 if ":" in at.address else socket.AF_INET
            connection = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
            connection.setblocking(False)
            code = connection.connect_ex((at.address, at.port))
            if code == errno.EINPROGRESS:
                poll.register(connection, select.POLLOUT)
                waiting[connection.fileno()] = node, connection
            elif code not in _REACHED:
                failed[node] = os.strerror(code)
        ends = time.monotonic() + seconds
        while waiting and (left := ends - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(1000 * left):
                poll.unregister(descriptor)
                node, connection = waiting.pop(descriptor)
                if (code := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)) not in _REACHED:
                    failed[node] = os.strerror(code)
    return failed | {node: f"no answer for {seconds:.0f} s" for node, _ in waiting.values()}
