"""Nodes of a Ray cluster for the attempts of a run: one bundle of a placement group each, and an agent in each bundle."""

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

from distattn.launch.attempt_end import OTHERS_SECONDS, AttemptEnd, LeftOut
from distattn.launch.command_line import print_message
from distattn.launch.node_needs import NodeNeeds
from distattn.launch.ray.agent import NodeAgent, NodePlace
from distattn.launch.ray.placement import NodeReservation, bundle_nodes, hold_nodes
from distattn.training.run_folder import RunFolder

# that an agent may take to start: Ray may be late to know that a node is gone, and a new process imports
_ANSWER_SECONDS = 60.0
# between two looks at agents, and at the file that asks to stop
_LOOK_SECONDS = 0.2
# that nodes may be taken before it is waited for fewer: Ray frees those of this run once their processes have ended
_FREED_SECONDS = 60.0
# before it is said what is waited for
_SILENT_SECONDS = 5.0


@dataclass(frozen=True)
class NodeCounts:
    """How many nodes attempts may have, the most first.

    waiting_seconds: how long it is waited for them in all; shrink_seconds: before it is waited for fewer, where there are fewer.
    resize: called with the number that the next attempt has.
    """

    counts: tuple[int, ...]
    waiting_seconds: float
    shrink_seconds: float
    resize: Callable[[int], None]


class RayNodes:
    """Runs attempts on nodes of the cluster that this process is connected to. job: the name that ranks of all attempts have.

    Ray chooses the nodes, each for one bundle; ranks follow the natural order of their names, since bundles have none. The
    group stays for all attempts, so that nobody else gets a node between them, until a node has to be left out, or the next
    attempt has another number of nodes.
    """

    def __init__(self, run: RunFolder, job: str, needs: NodeNeeds, size: NodeCounts):
        self._run, self._job, self._needs, self._size = run, job, needs, size
        self._folder, self._wanted = run.folder.absolute(), size.counts[0]
        self._group: PlacementGroup | None = None
        # by the nodes' names: of the attempt that goes on
        self._agents: dict[str, Any] = {}
        self._places: dict[str, NodePlace] = {}
        # by Ray's numbers, which a node that is started again does not keep
        self._left_out = LeftOut()

    def choose(self) -> list[str] | None:
        """Nodes on each of which an agent answers. One that has room, but does not answer in time, is left out for another.

        Where there are too few others, or they stay taken, the first that was left out so is asked again: it may have been slow.
        None where there is no room for so long as `waiting_seconds`, or where the run is asked to stop.
        """
        began = time.monotonic()
        while (group := self._placed()) is not None:
            agents = [self._agent(group, bundle) for bundle in range(self._wanted)]
            answers = _answers([agent.place.remote() for agent in agents])
            names = node_names()
            found = [
                (names[place.node], agent, place)
                for agent, place in zip(agents, answers, strict=True)
                if isinstance(place, NodePlace)
            ]
            if len(found) == self._wanted:
                found.sort(key=lambda one: _natural(one[0]))
                self._agents = {name: agent for name, agent, _ in found}
                self._places = {name: place for name, _, place in found}
                self._size.resize(self._wanted)
                return list(self._agents)
            others = self._leave_out(group, answers)
            _end(agents)
            if not others and time.monotonic() - began > self._size.waiting_seconds:
                break
        return None

    def run(self, hosts: Sequence[str], attempt: int) -> AttemptEnd:
        """Have each agent run its node's ranks. Where one has failed, the others are ended soon after.

        Where there is room for more nodes, ranks are asked to save and end: the next attempt has them.
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
                    code, words = _exit(done)
                    if end.add(runs.pop(done), code, words) and code != 0 and not failed_at:
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
        """Write the report, by an agent of its own on any of the nodes."""
        assert self._group is not None
        agent = self._agent(self._group, 0)
        try:
            placed = ray.wait([agent.place.remote()], timeout=_ANSWER_SECONDS)[0]
            code, words = None, f"had no room for {_ANSWER_SECONDS:.0f} s"
            if placed:
                code, words = _exit(agent.run.remote(self._folder, self._job, 0, "finish"))
        finally:
            _end([agent])
        if code is None:
            print_message(
                f"the report was not written: its process {words}; python -m distattn.launch.finish_run {self._folder} does."
            )
        return 1 if code is None else code

    def blame(self, hosts: Sequence[str], end: AttemptEnd) -> None:
        """Leave out what `LeftOut.blame` says of nodes that Ray still has; the next group is placed without them."""
        nodes = {name: place.node for name, place in self._places.items()}
        # Ray itself replaces a node that it knows to be gone
        known = AttemptEnd(codes={nodes[host]: code for host, code in end.codes.items()})
        before = len(self._left_out.hosts)
        # a run that may have fewer nodes has them to spare
        spare = self._usable() - min(self._size.counts)
        self._left_out.blame([nodes[host] for host in hosts], known, spare)
        if len(self._left_out.hosts) > before:
            self.close()

    def give_back(self) -> str:
        """Never: a node that is left out is given back, and Ray replaces it while the run goes on."""
        return ""

    def shortage(self) -> str:
        """What was waited for, and what the cluster has."""
        waited = f"{self._size.waiting_seconds:,.0f} s"
        return f"for {waited} there was no room for {self._demand()}: {self._usable()} nodes are that large"

    def close(self) -> None:
        """Give the nodes back."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _placed(self) -> PlacementGroup | None:
        """The group, once Ray has a node for each bundle."""
        began = asked = time.monotonic()
        said = False
        while not (group := self._held()).wait(_LOOK_SECONDS):
            now = time.monotonic()
            if now - began > self._size.waiting_seconds or self._run.stop_file.exists():
                self.close()
                return None
            if now - began > _SILENT_SECONDS and not said:
                said = True
                print_message(
                    f"waiting for room for {self._demand()}, for {self._size.waiting_seconds:,.0f} s at most."
                )
            if self._is_short(now - asked, now - began):
                asked = now
                self._ask_for_less()
        return group

    def _is_short(self, waited: float, in_all: float) -> bool:
        """Whether it was waited long enough for so many nodes; longer at first where there are as many, but taken."""
        # and not so long that no time is left for fewer
        freed = in_all > min(_FREED_SECONDS, self._size.waiting_seconds / 2)
        return waited > self._size.shrink_seconds and (freed or self._usable() < self._wanted)

    def _ask_for_less(self) -> None:
        """Fewer nodes, or where a run cannot have fewer, some of those that were left out."""
        if fewer := self._fewer():
            self._wanted = fewer
        else:
            # for others that are only taken it is rather waited than for nodes that fail again and again
            again = self._usable() < self._wanted and self._take_back()
            if not again and not self._take_back_unstarted():
                return
        self.close()

    def _take_back(self) -> bool:
        """Have nodes taken again that have failed, but answered; returns whether there are any."""
        alive, names = _alive(), node_names()
        again = [node for node in self._left_out.take_back() if node in alive]
        if again:
            print_message(f"there are no others: {' '.join(names[node] for node in again)} may be taken again.")
        return bool(again)

    def _take_back_unstarted(self) -> bool:
        """Have a node asked again that did not answer, or could start nothing; returns whether there is any."""
        again = self._left_out.take_back_unstarted(_alive())
        if again:
            print_message(f"there are too few others: {node_names()[again]} is asked again.")
        return bool(again)

    def _held(self) -> PlacementGroup:
        """The group, which may still wait for room."""
        if self._group is None:
            self._group = hold_nodes(self._needs, self._wanted, self._left_out.hosts)
        return self._group

    def _fewer(self) -> int:
        """The number of nodes to ask for next: fewer than now, and not more than there are, where that can be; 0 for none."""
        fewer, usable = [count for count in self._size.counts if count < self._wanted], self._usable()
        return next((count for count in fewer if count <= usable), fewer[-1] if fewer else 0)

    def _ask_to_regroup(self, nodes: int) -> None:
        print_message(f"there is room for {nodes} nodes: the ranks save, and all start again.")
        try:
            self._run.regroup_file.touch()
        except OSError as error:
            print_message(f"the ranks cannot be asked to: {error}; the next attempt has {nodes} nodes.")

    def _demand(self) -> str:
        gpus = f"{self._needs.gpus} GPUs and " if self._needs.gpus else ""
        return f"{self._wanted} nodes of {gpus}{self._needs.cpus} CPUs"

    def _usable(self) -> int:
        """How many nodes of the cluster are large enough, used or not, and not left out."""
        needs = {"CPU": self._needs.cpus, "GPU": self._needs.gpus}
        return sum(
            node["Alive"]
            and node["NodeID"] not in self._left_out.hosts
            and all(node["Resources"].get(kind, 0) >= count for kind, count in needs.items())
            for node in ray.nodes()
        )

    def _agent(self, group: PlacementGroup, bundle: int) -> Any:
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        options: dict[str, Any] = {"num_cpus": self._needs.cpus, "num_gpus": self._needs.gpus, "max_restarts": 0}
        return ray.remote(NodeAgent).options(scheduling_strategy=place, **options).remote()

    def _leave_out(self, group: PlacementGroup, answers: Sequence[NodePlace | str]) -> bool:
        """Take the nodes no more whose agents did not answer, or could not start.

        Returns False where there are no others, or only such as were asked before.
        """
        others = True
        nodes, names = bundle_nodes(group), node_names()
        for bundle, answer in enumerate(answers):
            if isinstance(answer, str) and (node := nodes.get(bundle)):
                enough = self._usable() > min(self._size.counts) or self._take_back()
                others = others and enough and node not in self._left_out.asked_again
                if enough or self._take_back_unstarted():
                    print_message(f"{names.get(node, node)} is left out: its agent {answer}.")
                    self._left_out.leave_out_unstarted(node)
                else:
                    print_message(
                        f"{names.get(node, node)} is asked again, since there is no other: its agent {answer}."
                    )
        self.close()
        return others


def node_names() -> dict[str, str]:
    """The name of each node of the cluster, dead ones included, by Ray's number: its address, unless somebody has named it."""
    nodes = {node["NodeID"]: node["NodeName"] or node["NodeManagerAddress"] for node in ray.nodes()}
    often = Counter(nodes.values())
    # a node that came back has the name of the one before
    return {node: name if often[name] == 1 else f"{name}/{node[:6]}" for node, name in nodes.items()}


def _alive() -> set[str]:
    """Ray's numbers of the nodes that are there."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _answers(asked: Sequence[Any]) -> list[NodePlace | str]:
    """Of each agent, once all have answered or the time for it is over."""
    ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)
    return [_answer(one) for one in asked]


def _answer(asked: Any) -> NodePlace | str:
    """Where an agent is, or why that is not known."""
    try:
        place: NodePlace = ray.get(asked, timeout=0)
        return place
    except TimeoutError:
        return f"did not answer for {_ANSWER_SECONDS:.0f} s"
    except RayError as error:
        return f"could not start: {_first_line(error)}"


def _exit(done: Any) -> tuple[int | None, str]:
    """(An exit code of `run_node`, None where a signal killed it or its agent, and what to say of it)."""
    try:
        code: int = ray.get(done)
    except RayError as error:
        return None, f"was lost: {_first_line(error)}"
    return (code, "") if code >= 0 else (None, f"was killed by signal {-code}")


def _first_line(error: RayError) -> str:
    return str(error).strip().splitlines()[0].rstrip(".:")


def _end(agents: Any) -> None:
    for agent in agents:
        ray.kill(agent)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts node2 before node10, and so for addresses."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
