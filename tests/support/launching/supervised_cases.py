"""Runs `faulty_ranks` under supervision, once per case: python supervised_cases.py FOLDER '[{"name": ..., "fault":
...}]'.

It runs in a separate process, since a launcher changes how its process forks. One process runs all cases, since its
imports take long.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

from distattn.launch.attempts import Attempts
from distattn.launch.ranks.attempt import Ranks
from distattn.launch.ranks.supervised import Restarts, run_supervised
from distattn.supervision.rank_watch import Patience

RANKS, STEPS = 3, 12


def main() -> None:
    """Run each case in a folder with the case's name, and write the exit code and the output to files in that folder."""
    for case in json.loads(sys.argv[2]):
        folder = Path(sys.argv[1], case["name"])
        folder.mkdir()
        if "fault" in case:
            (folder / "fault.json").write_text(json.dumps(case["fault"]))
        if not case.get("forked"):
            _run(folder, case)
            continue
        process = multiprocessing.get_context("fork").Process(target=_run, args=(folder, case))
        process.start()
        process.join()


def _run(folder: Path, case: dict) -> None:
    output = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 2)
    losses = folder / "losses.jsonl"

    def progress() -> int:
        return len(losses.read_text().splitlines()) if losses.exists() else 0

    patience = Patience(600, case["patience"])
    code = run_supervised(
        Ranks(RANKS, "faulty_ranks:run", [str(folder), STEPS], patience),
        Attempts(folder / "attempts"),
        Restarts(case.get("limit", 3), progress),
        ["faulty_ranks"],
    )
    (folder / "code").write_text(str(code))


if __name__ == "__main__":
    main()
