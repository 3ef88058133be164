"""`distattn ckpt`: list, verify and show a run's checkpoints, and convert them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from distattn.checkpoints.checkpoint_folder import Checkpoint, find_checkpoints, sizes_are_right, verify_checkpoint
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.ir.text_format import readable_bytes
from distattn.launch.command_line import CommandParser, ResultConsole, run_subcommand
from distattn.launch.data.progress import ProgressReporter
from distattn.training.reporting.json_lines import json_text

USAGE = """usage: distattn ckpt {list,verify,show} RUN_OR_FOLDER [--json]
       distattn ckpt {export-hf,import-hf} FROM TO

  list RUN_OR_FOLDER
      the checkpoints of a run, in the order in which they were saved, each with the loss of its last step and a verdict;
      their files are not read. The verdicts:
        untested   no step was computed from it yet
        good       the first step that was computed from it was applied
        refused    that step was refused, or the checkpoint was saved after refused steps; a run uses it only if there is
                   no untested or good one
        set aside  distattn resume --step chose an older one; a run treats it like a refused one
  verify RUN_OR_FOLDER
      read checkpoints from end to end and compare every block with its digest; exit code 3 if one is damaged
  show RUN_OR_FOLDER
      the facts of the newest checkpoint, and its files
  export-hf CHECKPOINT FOLDER
      write its model as a folder of safetensors that transformers loads; distattn ckpt export-hf --help
  import-hf FOLDER CHECKPOINT
      the reverse; distattn ckpt import-hf --help

RUN_OR_FOLDER is the folder of a run, a folder of checkpoints, or one checkpoint (.../step-00000100).

  --json   the result as JSON, one line for each checkpoint
"""

# commands implemented in modules of distattn.launch.ckpt
_OF_MODELS = {"export-hf": "export_hf", "import-hf": "import_hf"}
_WIDTH = 160


def main(arguments: Sequence[str]) -> int:
    """Run the subcommand. Return the exit code."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", ())
    if command in _OF_MODELS:
        # import these modules only here: they need torch, whose import takes seconds
        return run_subcommand(f"distattn.launch.ckpt.{_OF_MODELS[command]}", rest)
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    if command not in _COMMANDS:
        names = [*_COMMANDS, *_OF_MODELS]
        commands = f"{', '.join(names[:-1])} and {names[-1]}"
        raise DistattnError(f"ckpt: there is no command {command!r}; there are {commands}. See distattn ckpt --help.")
    return _COMMANDS[command](rest)


def _list(arguments: Sequence[str]) -> int:
    checkpoints, as_json = _parsed("list", arguments)
    if as_json:
        for checkpoint in checkpoints:
            _write_json(_facts(checkpoint))
        return 0
    table = Table(box=None, pad_edge=False)
    for name in ("step", "loss", "size", "ranks"):
        table.add_column(name, justify="right")
    for name in ("saved at (UTC)", "verdict", "folder", ""):
        table.add_column(name, no_wrap=True)
    verdicts = [checkpoint.verdict for checkpoint in checkpoints]
    notes = [", ".join(filter(None, (verdict.text, verdict.kept and f"kept: {verdict.kept}"))) for verdict in verdicts]
    for checkpoint, note in zip(checkpoints, notes, strict=True):
        if checkpoint.manifest is None:
            table.add_row(f"{checkpoint.step:,}", "", "", "", "", "[red]damaged[/]", escape(str(checkpoint.folder)))
            continue
        verdict = f"[yellow]{checkpoint.verdict.kind}[/]" if checkpoint.verdict.is_doubtful else checkpoint.verdict.kind
        whole = verdict if sizes_are_right(checkpoint) else "[red]damaged[/]"
        numbers = (
            f"{checkpoint.step:,}",
            checkpoint.manifest.facts.get("loss", ""),
            readable_bytes(checkpoint.manifest.bytes),
            f"{checkpoint.manifest.world_size:,}",
        )
        when = checkpoint.manifest.saved_at[:19].replace("T", " ")
        table.add_row(*numbers, when, whole, escape(str(checkpoint.folder)), escape(note))
    # show whole paths, since a wrapped or truncated path cannot be copied
    widest = max(len(str(checkpoint.folder)) + len(note) for checkpoint, note in zip(checkpoints, notes, strict=True))
    ResultConsole(highlight=False, width=_WIDTH + widest).print(table)
    return 0


def _verify(arguments: Sequence[str]) -> int:
    checkpoints, as_json = _parsed("verify", arguments)
    console = ResultConsole(highlight=False)
    total = sum(checkpoint.manifest.bytes for checkpoint in checkpoints if checkpoint.manifest is not None)
    results = []
    with ProgressReporter("ckpt verify", total) as reporter:
        for checkpoint in checkpoints:
            results.append((checkpoint, verify_checkpoint(checkpoint.folder, reporter.advance)))
    for checkpoint, problems in results:
        if as_json:
            rows = [{"file": problem.file, "offset": problem.offset, "what": problem.text} for problem in problems]
            _write_json({"folder": str(checkpoint.folder), "problems": rows})
            continue
        bytes_are = "[red]damaged[/]" if problems else "[green]good[/]"
        # the weights may be bad even if every byte is as written
        doubt = f" ({checkpoint.verdict.kind}: {checkpoint.verdict.text})" if checkpoint.verdict.is_doubtful else ""
        console.print(f"{bytes_are} {escape(str(checkpoint.folder))}{escape(doubt)}", soft_wrap=True)
        for problem in problems:
            console.print(f"  {problem}", markup=False, soft_wrap=True)
    return DamagedDataError.exit_code if any(problems for _, problems in results) else 0


def _show(arguments: Sequence[str]) -> int:
    checkpoints, as_json = _parsed("show", arguments)
    newest = max(
        checkpoints, key=lambda checkpoint: checkpoint.manifest.serial if checkpoint.manifest is not None else 0
    )
    manifest = newest.manifest
    if manifest is None:
        raise DamagedDataError(newest.problem)
    if as_json:
        files = [{"name": file.name, "bytes": file.bytes} for file in manifest.files]
        _write_json(_facts(newest) | {"torch": manifest.torch, "facts": dict(manifest.facts), "files": files})
        return 0
    console = ResultConsole(highlight=False)
    lines = [
        f"{newest.folder}: step {manifest.step:,}, saved at {manifest.saved_at}",
        f"by {manifest.world_size} ranks with torch {manifest.torch}",
        f"{readable_bytes(manifest.bytes)} in {len(manifest.files)} files",
        f"verdict: {newest.verdict.kind}" + (f", {newest.verdict.text}" if newest.verdict.text else ""),
    ]
    lines += [f"  {name}: {value}" for name, value in sorted(manifest.facts.items())]
    lines += [f"  {file.name}  {readable_bytes(file.bytes)}" for file in manifest.files]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    return 0


# command -> function that takes the remaining arguments and returns the exit code
_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"list": _list, "verify": _verify, "show": _show}


def _parsed(command: str, arguments: Sequence[str]) -> tuple[list[Checkpoint], bool]:
    parser = CommandParser(f"ckpt {command}")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    return find_checkpoints(options.folder), options.json


def _facts(checkpoint: Checkpoint) -> dict[str, object]:
    facts: dict[str, object] = {
        "step": checkpoint.step,
        "folder": str(checkpoint.folder),
        "problem": checkpoint.problem or None,
    }
    if checkpoint.manifest is not None:
        manifest = checkpoint.manifest
        facts |= {"saved_at": manifest.saved_at, "ranks": manifest.world_size, "bytes": manifest.bytes}
        loss = manifest.facts.get("loss")
        facts |= {"loss": None if loss is None else float(loss), "verdict": checkpoint.verdict._asdict()}
    return facts


def _write_json(content: dict[str, object]) -> None:
    sys.stdout.write(json_text(content) + "\n")
