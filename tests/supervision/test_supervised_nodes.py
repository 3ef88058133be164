"""Ranks on two nodes, imitated by two launchers on this machine: a rank that hangs is named from all nodes' heartbeats."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_once import made_once
from ports import free_ports
from waiting import LIMIT_SECONDS

pytestmark = pytest.mark.waits(3)

ROOT = Path(__file__).parents[2]
BUSY = "waits for no other rank and makes no progress: step 6, "
WANTED = {
    "lock": f"rank 2 {BUSY}reading shard 12",
    "stop": "rank 2 is stopped (SIGSTOP or a debugger): step 6, computing",
    "message": "rank 2 waits for a message that does not arrive: step 6, key/value move 3 of layer 17 from rank 3; "
    "the others: all-reduce of the loss",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return made_once(tmp_path_factory, "supervised_nodes", run_cases)


def run_cases(folder: Path) -> None:
    names = ("whole", *WANTED, "kill")
    cases = list(zip(names, free_ports(len(names)), strict=True))
    for name, _ in cases:
        (folder / name).mkdir()
        if name != "whole":
            (folder / name / "fault.json").write_text(json.dumps({"rank": 2, "step": 5, "kind": name}))
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support' / 'launching'}",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, str(ROOT / "tests" / "support" / "launching" / "supervised_nodes.py"), str(folder)]
    nodes = [
        subprocess.Popen(
            [*command, str(node), json.dumps(cases), "127.0.0.1"], env=environment, stderr=subprocess.PIPE, text=True
        )
        for node in range(2)
    ]
    for node in nodes:
        _, output = node.communicate(timeout=LIMIT_SECONDS)
        assert node.returncode == 0, output


def told(folder: Path) -> list[dict]:
    return [json.loads((folder / f"node-{node}.json").read_text()) for node in range(2)]


@pytest.mark.full
def test_ranks_of_two_nodes_end_well(runs):
    assert [node["code"] for node in told(runs / "whole")] == [0, 0]


@pytest.mark.parametrize("kind", WANTED)
def test_both_nodes_name_the_rank_of_one_that_hangs(kind, runs):
    for node in told(runs / kind):
        assert node == {"code": 1, "why": WANTED[kind], "ranks": [2]}
    # each node saves its evidence in the same folder; a stopped rank writes none
    kept = {f"{file.parent.name}/{file.name}" for file in (runs / kind / "attempt").glob("*/[hf]*.json*")}
    wanted = {f"node-{node}/heartbeats.jsonl" for node in range(2)}
    wanted |= {f"node-{rank // 2}/flight-recorder-{rank}.json" for rank in range(4) if (kind, rank) != ("stop", 2)}
    assert kept == wanted


def test_a_killed_rank_is_named_by_its_own_node(runs):
    first, second = told(runs / "kill")
    assert second == {"code": 137, "why": "rank 2 was killed by SIGKILL: step 6, computing", "ranks": [2]}
    # the other node's ranks miss this rank
    assert first["code"] == 1 and set(first["ranks"]) <= {0, 1}
