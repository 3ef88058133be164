"""A worker process of `distattn data tokenize`: `python -m distattn.data.tokenizing.tokenize_worker JOB_FILE`.

It reads shard numbers from stdin, one per line, until end of file. It writes JSON lines: {"progress": [...]} as it works,
{"done": shard} after each shard, and {"error": message, "damaged": true if a file is damaged} before it exits on an error.
"""

from __future__ import annotations

import json
import os
import sys

from distattn.data.tokenizing.tokenize import Progress, TokenizeJob, tokenize_shard
from distattn.data.tokenizing.tokenizer import load_tokenizer
from distattn.ir.errors import DamagedDataError, DistattnError


def main(job_file: str) -> None:
    """Tokenize the shards named on stdin."""
    # redirect the output of libraries to stderr, so that it is not mistaken for a message
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(**message: object) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    def report(progress: Progress) -> None:
        send(progress=progress)

    try:
        job = TokenizeJob.load(job_file)
        tokenizer = load_tokenizer(job.tokenizer, job.eos)
        if tokenizer.digest != job.tokenizer_digest:
            raise DamagedDataError(f"tokenizer {job.tokenizer}: changed since the command began.")
        for line in sys.stdin:
            tokenize_shard(job, tokenizer, int(line), report)
            send(done=int(line))
    except DistattnError as error:
        send(error=str(error), damaged=isinstance(error, DamagedDataError))


if __name__ == "__main__":
    main(sys.argv[1])
