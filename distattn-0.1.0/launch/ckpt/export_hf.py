"""`distattn ckpt export-hf`: a checkpoint's model as Hugging Face has it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from distattn.checkpoints.checkpoint_folder import by_preference, find_checkpoints, first_problem
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.launch.command_line import CommandParser

USAGE = """usage: distattn ckpt export-hf CHECKPOINT FOLDER [--dtype NAME] [--tokenizer FOLDER] [--max-shard-bytes N]

Writes the model of a checkpoint into a new folder of safetensors, which plain transformers loads by its name. CHECKPOINT is a
checkpoint, or a run, of which the newest is taken; it is verified first. One process does it, and holds the tensors of one file
at a time.

  --dtype NAME          float32, float64, float16 or bfloat16; by default as in the checkpoint
  --tokenizer FOLDER    copy the tokenizer's files from here
  --max-shard-bytes N   of one file's tensors (default 5,000,000,000)
"""

_DTYPES = ("float32", "float64", "float16", "bfloat16")
# as transformers and tokenizers name them
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    parser = CommandParser("ckpt export-hf")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=_DTYPES)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--max-shard-bytes", type=int, default=5_000_000_000)
    given = parser.parse_args(arguments)
    files = [] if given.tokenizer is None else _tokenizer_files(given.tokenizer)
    state = _verified(given.checkpoint)
    # 4 s to import
    import torch

    from distattn.models.build import model_config
    from distattn.models.checkpoint_files import checkpoint_tensors, config_folder
    from distattn.models.export import export_safetensors

    config = model_config(config_folder(state))
    done = export_safetensors(
        checkpoint_tensors(state),
        config,
        given.folder,
        tokenizer_files=files,
        max_shard_bytes=given.max_shard_bytes,
        dtype=None if given.dtype is None else getattr(torch, given.dtype),
    )
    plural = "s" if len(done.files) > 1 else ""
    dtype = str(done.dtype).removeprefix("torch.")
    sys.stdout.write(f"{given.folder}: {done.total_bytes:,} bytes, mostly {dtype}, in {len(done.files)} file{plural}\n")
    return 0


def _verified(given: Path) -> Path:
    """The folder of a checkpoint all of whose files are what was written: one of them is a pickle."""
    found = find_checkpoints(given)
    newest = next(iter(by_preference(found)), found[-1])
    if newest.manifest is None:
        raise DamagedDataError(newest.problem)
    if newest.verdict.is_doubtful:
        sys.stderr.write(f"distattn: {newest.folder}: {newest.verdict.kind}: {newest.verdict.text}.\n")
    problem = first_problem(newest.folder, newest.manifest)
    if problem is not None:
        raise DamagedDataError(str(problem))
    return newest.folder


def _tokenizer_files(folder: Path) -> list[Path]:
    found = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        raise DistattnError(f"ckpt export-hf: --tokenizer: {folder} has no tokenizer's files, such as tokenizer.json.")
    return found
