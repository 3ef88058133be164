"""Runs `faulty_ranks` under supervision, once for each case: python supervised_cases.py FOLDER '[{"name": ..., "fault": ...}]'.

In a process of its own, since a launcher changes how its process forks; one for all cases, since it imports for long.
"""

import json
import os
import sys
from pathlib import Path

from distattn.launch.attempts import Attempts
from distattn.launch.supervised_ranks import Restarts, run_supervised
from distattn.supervision.rank_watch import Patience

RANKS, STEPS = 3, 12


def main() -> None:
    """Each case in a folder of its name, with the exit code and what was said in files of it."""
    for case in json.loads(sys.argv[2]):
        folder = Path(sys.argv[1], case["name"])
        folder.mkdir()
        if "fault" in case:
            (folder / "fault.json").write_text(json.dumps(case["fault"]))
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 2)
        losses = folder / "losses.jsonl"

        def progress(file: Path = losses) -> int:
            return len(file.read_text().splitlines()) if file.exists() else 0

        code = run_supervised(
            RANKS,
            "faulty_ranks:run",
            [str(folder), STEPS],
            attempts=Attempts(folder / "attempts"),
            restarts=Restarts(case.get("limit", 3), progress),
            patience=Patience(60, case.get("patience", 2.0)),
            preload=["faulty_ranks"],
        )
        (folder / "code").write_text(str(code))


if __name__ == "__main__":
    main()
