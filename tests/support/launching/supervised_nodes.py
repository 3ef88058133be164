"""Runs one of two nodes with ranks of `faulty_ranks`: python supervised_nodes.py FOLDER NODE '[[name, port], ...]'
HOST.
"""

import json
import sys
from contextlib import closing
from pathlib import Path

from distattn.launch.ranks.attempt import Ranks, fork_server, run_attempt
from distattn.launch.ranks.local import Node
from distattn.supervision.heartbeats import HeartbeatBoard
from distattn.supervision.rank_watch import Patience

PER_NODE, STEPS = 2, 12


def main() -> None:
    """Run this node's part of each case, and write the result to a file in the case's folder."""
    number = int(sys.argv[2])
    with fork_server(["faulty_ranks"], Node(nodes=2, keeps_sigterm=True)):
        for name, port in json.loads(sys.argv[3]):
            folder, node = Path(sys.argv[1], name), Node(number, 2, f"{sys.argv[4]}:{port}", keeps_sigterm=True)
            # use a long limit so that a slow machine does not look like a hang
            patience = Patience(600, 600.0 if name in ("whole", "kill") else 15.0)
            ranks = Ranks(PER_NODE, "faulty_ranks:run", [str(folder), STEPS], patience, node)
            with closing(HeartbeatBoard.make(PER_NODE)) as board:
                code, trouble = run_attempt(ranks, 1, folder / "attempt", board)
            facts = {"code": code, "why": str(trouble or ""), "ranks": trouble.facts()["ranks"] if trouble else []}
            (folder / f"node-{number}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
