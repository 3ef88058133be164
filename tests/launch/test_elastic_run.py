"""The numbers of nodes with which a run may continue, and what its folder records about each attempt."""

from pathlib import Path

import pytest

from distattn.ir.errors import DistattnError
from distattn.launch.attempt_end import AttemptEnd
from distattn.launch.attempts import Attempts
from distattn.launch.command_line import no_progress
from distattn.launch.elastic_run import ElasticRun, node_counts
from distattn.launch.node_attempts import NodeAttempts
from distattn.launch.start_run import start_run
from distattn.training.config import run_file as configuration

ROOT = Path(__file__).parents[2]
MEGATRON = ("--engine.name=megatron", "--parallel.tensor_parallel_size=2", "--parallel.pipeline_parallel_size=2")


def elastic(*overrides: str):
    settings = (
        "--parallel.ranks=8",
        "--parallel.devices_per_node=2",
        "--data.context_length=1024",
        "--ray.min_nodes=1",
    )
    return configuration.load(
        ROOT / "configs/tiny.toml",
        [*settings, "--data.max_document_tokens=900", "--parallel.context_parallel_size=2", *overrides],
    )


@pytest.mark.parametrize(
    ("overrides", "counts"),
    [
        # a step has 8 packs, which cannot be divided equally among 3 replicas
        ((), (4, 2, 1)),
        (("--ray.min_nodes=2",), (4, 2)),
        # here a replica spans two nodes
        (("--parallel.context_parallel_size=4",), (4, 2)),
        (("--parallel.strategy=cad", "--parallel.data=per_rank", "--parallel.context_parallel_size=1"), (4, 2, 1)),
        # tensor- and pipeline-parallel ranks also belong to the same replica
        (
            (*MEGATRON, "--parallel.context_parallel_size=1"),
            (4, 2),
        ),
        (("--engine.shard_size=4",), (4, 2)),
        (("--ray.min_nodes=0",), (4,)),
    ],
)
def test_a_run_may_have_nodes_of_whole_replicas_that_packs_can_be_dealt_to(overrides, counts):
    assert node_counts(elastic(*overrides)) == counts


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("--parallel.context_parallel_size=0",),
            "ray.min_nodes: all ranks split one pack, so none can be left out; set",
        ),
        (
            ("--checkpoint.every_steps=-1",),
            "ray.min_nodes: the run continues from checkpoints; set checkpoint.every_steps",
        ),
        (("--ray.min_nodes=4",), "ray.min_nodes: 4, but the run has 4 nodes; use a smaller number, or 0"),
        (("--ray.min_nodes=3",), "no number of nodes from 3 to 3 has whole replicas of 2 ranks"),
        (("--parallel.context_parallel_size=8",), "no number of nodes from 1 to 3 has whole replicas of 8 ranks"),
        (("--ray.min_nodes=-1",), "ray.min_nodes: must be at least 0, not -1"),
        (("--ray.shrink_seconds=-1",), "ray.shrink_seconds: must be at least 0, not -1"),
    ],
)
def test_impossible_settings_are_refused_by_name(overrides, sentence):
    with pytest.raises(DistattnError, match=sentence):
        node_counts(elastic(*overrides))


def test_a_run_that_has_fewer_nodes_now_may_have_as_many_as_before():
    assert node_counts(elastic("--parallel.ranks=2", "--ray.min_nodes=1"), most=4) == (4, 2, 1)


class Nodes:
    """A stand-in that provides two nodes, then one node, then two again, when another process asks the run to stop."""

    def __init__(self, run, elastic):
        self.run_folder, self.elastic, self.sizes, self.ranks = run, elastic, [2, 1, 2], []

    def choose(self):
        nodes = self.sizes.pop(0)
        self.elastic.resize(nodes)
        return [f"node{number}" for number in range(nodes)]

    def run(self, hosts, attempt):
        self.ranks.append(configuration.load(self.run_folder.config_file).parallel.ranks)
        if len(hosts) == 1:
            return AttemptEnd(75, dict.fromkeys(hosts, 75), next_nodes=2)
        if self.sizes:
            return AttemptEnd(1, {"node1": None}, {"node1": "was lost"}, ["node1"])
        # a request to stop takes precedence over room for more nodes
        self.run_folder.ask_to_stop("a person")
        return AttemptEnd(75, dict.fromkeys(hosts, 75), next_nodes=4)

    def blame(self, hosts, end):
        assert hosts == ["node1"]


def test_the_run_folder_says_what_each_attempt_had_and_a_request_to_stop_comes_first(tmp_path):
    run = start_run(
        elastic("--parallel.ranks=4", f"--run.folder={tmp_path / 'run'}", "--data.path={stdlib}/json"), no_progress
    )
    size = ElasticRun(run, configuration.load(run.config_file), 0, {"cluster": "here"})
    nodes = Nodes(run, size)
    assert NodeAttempts(run, nodes, 3, size.facts).run() == (75, False)
    assert nodes.ranks == [4, 2, 4]
    told = [(row["cluster"], row["nodes"], row["replicas"], row["why"]) for row in Attempts(run.attempts).rows()]
    assert told == [
        ("here", 2, 2, "node1 was lost"),
        ("here", 1, 1, "saved, to continue with 2 nodes"),
        ("here", 2, 2, "stopped at the request of a person"),
    ]
    assert configuration.load(run.folder / "config.until-0.toml").parallel.ranks == 4
