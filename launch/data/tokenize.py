"""`distattn data tokenize`: turn text into one indexed file of tokens on all cores. The same command resumes after a kill."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from distattn.data.tokenizing.tokenize import Progress, plan_job
from distattn.ir.errors import DistattnError
from distattn.ir.text_format import readable_bytes
from distattn.launch.command_line import CommandParser
from distattn.launch.data.progress import ProgressReporter
from distattn.launch.data.tokenize_processes import tokenize

USAGE = """usage: distattn data tokenize PATH... --out PREFIX --tokenizer NAME [options]

Writes PREFIX.bin and PREFIX.idx (Megatron's indexed format), digests of their blocks (PREFIX.xxh3), and a manifest of their
sources (PREFIX.json). Documents keep the order of the files, and of the lines in them, whatever the number of processes. After a
command was stopped or killed, the same command continues where it was.

  PATH...            files, folders and globs: .jsonl, .json and .ndjson (one object a line; also .gz and .zst), .parquet, and
                     text (.txt, .text, .md, .rst), where each file is one document
  --out PREFIX       where to write the files; PREFIX.parts/ has the finished parts until all are finished
  --tokenizer NAME   bytes, a tokenizer.json of Hugging Face's, or a folder that has one
  --field NAME       the field or column that has the text (default text)
  --eos TOKEN        the token, or its id, that ends every document; none by default
  --suffix .py       only files with this suffix; a suffix that is not listed above means text
  --exclude A,B      leave out files and folders of these names or patterns
  --processes N      number of processes (default: the number of cores)
  --json             the result as JSON
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    parser = CommandParser("data tokenize")
    parser.add_argument("paths", nargs="+")
    for name in ("out", "tokenizer"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--field", default="text")
    parser.add_argument("--eos")
    parser.add_argument("--suffix", default="")
    parser.add_argument("--exclude", default="")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        raise DistattnError(f"data tokenize: --processes: at least 1, not {options.processes}.")
    job = plan_job(
        options.out,
        options.paths,
        options.tokenizer,
        eos=options.eos,
        field=options.field,
        suffix=options.suffix,
        exclude=[pattern for pattern in options.exclude.split(",") if pattern],
    )
    here, before = Progress(), None
    with ProgressReporter("tokenize", sum(source.bytes for source in job.sources)) as reporter:

        def report(done: Progress) -> None:
            nonlocal here, before
            if before is None:
                before = done
                reporter.begin_at(done.stored_bytes)
                return
            here = here.plus(done)
            seconds = reporter.seconds
            rates = f"{here.documents / seconds:,.0f} documents/s  {here.tokens / seconds:,.0f} tokens/s"
            reporter.advance(done.stored_bytes, rates)

        manifest = tokenize(job, options.processes, report)
    if options.json:
        facts = {name: value for name, value in asdict(manifest).items() if name != "sources"}
        sys.stdout.write(json.dumps({"prefix": options.out, "files": len(manifest.sources)} | facts) + "\n")
        return 0
    sys.stdout.write(
        f"{options.out}: {manifest.documents:,} documents of {len(manifest.sources):,} files, "
        f"{readable_bytes(manifest.text_bytes)} of text, {manifest.tokens:,} tokens\n"
    )
    if before is None:
        sys.stdout.write("there was nothing to do: this command had finished before\n")
    else:
        kept = f", {before.tokens:,} tokens of them by an earlier command" if before.tokens else ""
        sys.stdout.write(f"in {reporter.seconds:,.1f} s, {here.tokens / reporter.seconds:,.0f} tokens/s{kept}\n")
    return 0
