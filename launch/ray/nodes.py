"""Nodes of a Ray cluster for a run's attempts. Each node is one bundle of a placement group, with an agent in it."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distattn.ir.errors import first_line
from distattn.ir.text_format import print_message
from distattn.launch.attempt_end import OTHERS_SECONDS, AttemptEnd, LeftOut
from distattn.launch.node_needs import NodeNeeds
from distattn.launch.ray.agent import NodeAgent, NodePlace
from distattn.launch.ray.placement import NodeReservation, bundle_nodes, hold_nodes
from distattn.training.run_folder import RunFolder

# time limit for an agent to start: its process has to import modules first, and Ray may be late to notice that a node
# is gone
_ANSWER_SECONDS = 60.0
# seconds between checks of the agents and of the stop file
_LOOK_SECONDS = 0.2
# seconds to wait for busy nodes before requesting fewer: Ray frees this run's own nodes only after their processes end
_FREED_SECONDS = 60.0
# print a message after this many seconds of waiting
_SILENT_SECONDS = 5.0


@dataclass(frozen=True)
class NodeCounts:
    """An attempt's possible node counts, largest first.

    waiting_seconds: maximum time to wait for nodes in total. shrink_seconds: time to wait before requesting fewer nodes.
    resize: called with the node count of the next attempt.
    """

    counts: tuple[int, ...]
    waiting_seconds: float
    shrink_seconds: float
    resize: Callable[[int], None]


class RayNodes:
    """Runs attempts on nodes of the connected cluster. job: a job name shared by the ranks of all attempts.

    Ray chooses a node for each bundle. Bundles have no order, so ranks follow the natural order of node names. To keep other
    users from taking the nodes, the placement group is kept between attempts until a node is left out or the node count
    changes.
    """

    def __init__(self, run: RunFolder, job: str, needs: NodeNeeds, size: NodeCounts):
        self._run, self._job, self._needs, self._size = run, job, needs, size
        self._folder, self._wanted = run.folder.absolute(), size.counts[0]
        self._group: PlacementGroup | None = None
        # agents and places in the current attempt, by node name
        self._agents: dict[str, Any] = {}
        self._places: dict[str, NodePlace] = {}
        # contains Ray's node ids; a restarted node gets a new id, so it is not left out
        self._left_out = LeftOut()

    def choose(self) -> list[str] | None:
        """Return nodes whose agents answer, or None after `waiting_seconds` without room or if the run is asked to stop.

        A node that does not answer in time is left out. If too few other nodes become free, the node left out first is asked
        again, since it may only have been slow.
        """
        began = time.monotonic()
        while (group := self._placed()) is not None:
            agents = [self._agent(group, bundle) for bundle in range(self._wanted)]
            answers = _answers([agent.place.remote() for agent in agents])
            names = node_names()
            ready = [
                (names[place.node], agent, place)
                for agent, place in zip(agents, answers, strict=True)
                if isinstance(place, NodePlace)
            ]
            if len(ready) == self._wanted:
                ready.sort(key=lambda node: _natural_order(node[0]))
                self._agents = {name: agent for name, agent, _ in ready}
                self._places = {name: place for name, _, place in ready}
                self._size.resize(self._wanted)
                return list(self._agents)
            others_left = self._leave_out(group, answers)
            _end(agents)
            if not others_left and time.monotonic() - began > self._size.waiting_seconds:
                break
        return None

    def run(self, hosts: Sequence[str], attempt: int) -> AttemptEnd:
        """Let each agent run its node's ranks. If one fails, end the others OTHERS_SECONDS later.

        When there is room for more nodes, ask the ranks to save and end, so that the next attempt can use more nodes.
        """
        self._run.regroup_file.unlink(missing_ok=True)
        first = self._places[hosts[0]]
        address = f"{first.address}:{first.port}"
        print_message(f"attempt {attempt} of {self._run.folder} on {' '.join(hosts)}, led by {address}")
        places = [(address, str(number), str(len(hosts))) for number in range(len(hosts))]
        runs = {
            self._agents[host].run.remote(self._folder, self._job, attempt, *place): host
            for host, place in zip(hosts, places, strict=True)
        }
        end, failed_at = AttemptEnd(), 0.0
        taken = [place.node for place in self._places.values()]
        reservation = NodeReservation(self._needs, taken, self._size.counts, self._left_out.hosts)
        try:
            while runs and (not failed_at or time.monotonic() - failed_at < OTHERS_SECONDS):
                for done in ray.wait(list(runs), num_returns=1, timeout=_LOOK_SECONDS)[0]:
                    code, description = _exit(done)
                    if end.add(runs.pop(done), code, description) and code != 0 and not failed_at:
                        failed_at = time.monotonic()
                if not end.codes and not end.next_nodes and (nodes := reservation.available_nodes()):
                    end.next_nodes = nodes
                    self._ask_to_regroup(nodes)
        finally:
            _end(self._agents.values())
            reservation.close()
        alive = _alive()
        end.lost = [host for host, code in end.codes.items() if code is None and self._places[host].node not in alive]
        if any(end.codes.values()) or None in end.codes.values():
            code = end.codes.get(end.blamed(hosts)[0])
            end.code = 1 if code is None else code
            if end.next_nodes:
                self.close()
                self._wanted = end.next_nodes
        return end

    def finish(self, hosts: Sequence[str]) -> int:
        """Write the report in a new agent on one of the nodes. Return the exit code, which is 1 if the agent was lost."""
        assert self._group is not None
        agent = self._agent(self._group, 0)
        try:
            placed = ray.wait([agent.place.remote()], timeout=_ANSWER_SECONDS)[0]
            code, description = None, f"had no room for {_ANSWER_SECONDS:.0f} s"
            if placed:
                code, description = _exit(agent.run.remote(self._folder, self._job, 0, "finish"))
        finally:
            _end([agent])
        if code is None:
            print_message(
                f"the report was not written: its process {description}; "
                f"python -m distattn.launch.finish_run {self._folder} writes it."
            )
        return 1 if code is None else code

    def blame(self, hosts: Sequence[str], end: AttemptEnd) -> None:
        """Exclude failed nodes that Ray still lists from the next placement group. See `LeftOut.blame`."""
        nodes = {name: place.node for name, place in self._places.items()}
        # omit `end.lost`: Ray itself replaces nodes that it knows to be gone
        node_end = AttemptEnd(codes={nodes[host]: code for host, code in end.codes.items()})
        before = len(self._left_out.hosts)
        # nodes beyond the smallest possible count are spare
        spare = self._usable() - min(self._size.counts)
        self._left_out.blame([nodes[host] for host in hosts], node_end, spare)
        if len(self._left_out.hosts) > before:
            self.close()

    def give_back(self) -> str:
        """Return "": the run need not stop, because a node left out is given back immediately and Ray can replace it."""
        return ""

    def shortage(self) -> str:
        """Return a sentence that says which nodes the run waited for, and how many of them the cluster has."""
        waited = f"{self._size.waiting_seconds:,.0f} s"
        return f"for {waited} there was no room for {self._demand()}: {self._usable()} nodes are that large"

    def close(self) -> None:
        """Give the nodes back to the cluster."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _placed(self) -> PlacementGroup | None:
        """Wait until Ray has placed all bundles. Return the group, or None after `waiting_seconds` or if asked to stop."""
        began = requested_at = time.monotonic()
        announced = False
        while not (group := self._held()).wait(_LOOK_SECONDS):
            now = time.monotonic()
            if now - began > self._size.waiting_seconds or self._run.stop_file.exists():
                self.close()
                return None
            if now - began > _SILENT_SECONDS and not announced:
                announced = True
                print_message(
                    f"waiting for room for {self._demand()}, for {self._size.waiting_seconds:,.0f} s at most."
                )
            if self._is_short(now - requested_at, now - began):
                requested_at = now
                self._ask_for_less()
        return group

    def _is_short(self, waited: float, in_all: float) -> bool:
        """Return whether to request fewer nodes now. The first wait is longer for busy nodes than for missing nodes.

        waited: seconds since the last request. in_all: seconds since the first request.
        """
        # wait at most half of the time, so that the rest is left for a smaller request
        freed = in_all > min(_FREED_SECONDS, self._size.waiting_seconds / 2)
        return waited > self._size.shrink_seconds and (freed or self._usable() < self._wanted)

    def _ask_for_less(self) -> None:
        """Request fewer nodes. If the run cannot use fewer, take back nodes that were left out."""
        if fewer := self._fewer():
            self._wanted = fewer
        else:
            # prefer waiting for busy nodes over retrying nodes that keep failing
            taken_back = self._usable() < self._wanted and self._take_back()
            if not taken_back and not self._take_back_unstarted():
                return
        self.close()

    def _take_back(self) -> bool:
        """Take back nodes that failed but still answer. Return whether there are such nodes."""
        alive, names = _alive(), node_names()
        nodes = [node for node in self._left_out.take_back() if node in alive]
        if nodes:
            print_message(f"there are no other nodes: {' '.join(names[node] for node in nodes)} may be used again.")
        return bool(nodes)

    def _take_back_unstarted(self) -> bool:
        """Take back a node that did not answer or could not start an agent. Return whether there is such a node."""
        node = self._left_out.take_back_unstarted(_alive())
        if node:
            print_message(f"there are too few other nodes: {node_names()[node]} is asked again.")
        return bool(node)

    def _held(self) -> PlacementGroup:
        """Return the placement group, which may still wait for room. Create it if needed."""
        if self._group is None:
            self._group = hold_nodes(self._needs, self._wanted, self._left_out.hosts)
        return self._group

    def _fewer(self) -> int:
        """Return the next smaller node count that the cluster can fill, or else the smallest; 0 if there is no smaller count."""
        fewer, usable = [count for count in self._size.counts if count < self._wanted], self._usable()
        return next((count for count in fewer if count <= usable), fewer[-1] if fewer else 0)

    def _ask_to_regroup(self, nodes: int) -> None:
        print_message(f"there is room for {nodes} nodes: the ranks save, and all start again.")
        try:
            self._run.regroup_file.touch()
        except OSError as error:
            print_message(f"the ranks cannot be asked to save: {error}; the next attempt has {nodes} nodes.")

    def _demand(self) -> str:
        gpus = f"{self._needs.gpus} GPUs and " if self._needs.gpus else ""
        return f"{self._wanted} nodes of {gpus}{self._needs.cpus} CPUs"

    def _usable(self) -> int:
        """Return the number of nodes, free or busy, that are large enough and not left out."""
        needs = {"CPU": self._needs.cpus, "GPU": self._needs.gpus}
        return sum(
            node["Alive"]
            and node["NodeID"] not in self._left_out.hosts
            and all(node["Resources"].get(kind, 0) >= count for kind, count in needs.items())
            for node in ray.nodes()
        )

    def _agent(self, group: PlacementGroup, bundle: int) -> Any:
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        options: dict[str, Any] = {"num_cpus": self._needs.cpus, "num_gpus": self._needs.gpus, "max_restarts": 0}
        return ray.remote(NodeAgent).options(scheduling_strategy=strategy, **options).remote()

    def _leave_out(self, group: PlacementGroup, answers: Sequence[NodePlace | str]) -> bool:
        """Leave out the nodes whose agents did not answer or could not start.

        Returns False if no other node is left, or only nodes that have already been asked again.
        """
        others_left = True
        nodes, names = bundle_nodes(group), node_names()
        for bundle, answer in enumerate(answers):
            if isinstance(answer, str) and (node := nodes.get(bundle)):
                enough = self._usable() > min(self._size.counts) or self._take_back()
                others_left = others_left and enough and node not in self._left_out.asked_again
                if enough or self._take_back_unstarted():
                    print_message(f"{names.get(node, node)} is left out: its agent {answer}.")
                    self._left_out.leave_out_unstarted(node)
                else:
                    print_message(
                        f"{names.get(node, node)} is asked again, since there is no other node: its agent {answer}."
                    )
        self.close()
        return others_left


def node_names() -> dict[str, str]:
    """Return the names of all nodes, dead or alive, by Ray's node id. A node without a given name is named by its address."""
    nodes = {node["NodeID"]: node["NodeName"] or node["NodeManagerAddress"] for node in ray.nodes()}
    counts = Counter(nodes.values())
    # a restarted node has the same name as its dead predecessor
    return {node: name if counts[name] == 1 else f"{name}/{node[:6]}" for node, name in nodes.items()}


def _alive() -> set[str]:
    """Return Ray's ids of the nodes that are alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _answers(requests: Sequence[Any]) -> list[NodePlace | str]:
    """Wait at most _ANSWER_SECONDS for all agents to answer. Return the answers."""
    ray.wait(list(requests), num_returns=len(requests), timeout=_ANSWER_SECONDS)
    return [_answer(request) for request in requests]


def _answer(request: Any) -> NodePlace | str:
    """Return the place of an agent, or a clause that says why it is unknown."""
    try:
        place: NodePlace = ray.get(request, timeout=0)
        return place
    except TimeoutError:
        return f"did not answer for {_ANSWER_SECONDS:.0f} s"
    except RayError as error:
        return f"could not start: {first_line(error).rstrip(':')}"


def _exit(request: Any) -> tuple[int | None, str]:
    """Return the exit code of `run_node` and a description of its end.

    The code is None if a signal killed `run_node`, or if its agent was lost; otherwise the description is "".
    """
    try:
        code: int = ray.get(request)
    except RayError as error:
        return None, f"was lost: {first_line(error).rstrip(':')}"
    return (code, "") if code >= 0 else (None, f"was killed by signal {-code}")


def _end(agents: Any) -> None:
    for agent in agents:
        ray.kill(agent)


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts node2 before node10, and orders addresses likewise."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
