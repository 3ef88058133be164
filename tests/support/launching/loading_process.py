"""A training process for tests of kills. It reads a plan's steps and logs what each rank reads in each step.

python loading_process.py FOLDER SIZE AHEAD BATCHES. FOLDER contains plan.packs, web-0 and books-0; FOLDER/step holds
the step to start from. After BATCHES batches the process kills itself (SIGKILL), so that the moment does not depend on
the machine's speed.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np

from distattn.data.files.corpus import Corpus
from distattn.data.loader import PackLoader


def main(folder: Path, size: int, ahead: int, batches: int) -> None:
    """Log the tokens read for every rank and step, then the number of finished steps."""
    corpora = [Corpus.open(name, [str(folder / f"{name}-0")]) for name in ("books", "web")]
    done = int((folder / "step").read_text()) if (folder / "step").exists() else 0
    # a step is done when all its ranks are done. This process plays the ranks in turn
    loaders = [
        PackLoader(str(folder / "plan.packs"), corpora, rank=rank, size=size, start_step=done, ahead=ahead)
        for rank in range(size)
    ]
    with open(folder / "journal", "a") as journal:
        for step, shares in enumerate(zip(*loaders, strict=True), done):
            for batch in (batch for share in shares for batch in share):
                tokens = np.arange(batch.tokens)
                batch.start_reading(tokens)
                ids, labels = batch.read(tokens)
                journal.write(f"{step} {batch.digest} {ids.sum()} {labels.sum()}\n")
                journal.flush()
                batches -= 1
                if not batches:
                    os.kill(os.getpid(), signal.SIGKILL)
            (folder / "step.tmp").write_text(str(step + 1))
            os.replace(folder / "step.tmp", folder / "step")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
