"""`distattn ckpt export-hf`: export a checkpoint's model to a Hugging Face folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from distattn.checkpoints.checkpoint_folder import by_preference, find_checkpoints, first_problem
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.ir.text_format import print_message
from distattn.launch.command_line import CommandParser

USAGE = """usage: distattn ckpt export-hf CHECKPOINT FOLDER [--dtype NAME] [--tokenizer FOLDER] [--max-shard-bytes N]

Writes the model of a checkpoint into a new folder of safetensors, which plain transformers can load. CHECKPOINT is a checkpoint,
or a run, whose newest checkpoint is exported; it is verified first. One process does this, and holds the tensors of one file at a
time.

  --dtype NAME          float32, float64, float16 or bfloat16; by default as in the checkpoint
  --tokenizer FOLDER    copy the tokenizer's files from here
  --max-shard-bytes N   limit of one file's tensors (default 5,000,000,000)
"""

_DTYPES = ("float32", "float64", "float16", "bfloat16")
# the names of tokenizer files that transformers writes
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
    """Run the command. Return the exit code."""
    parser = CommandParser("ckpt export-hf")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=_DTYPES)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--max-shard-bytes", type=int, default=5_000_000_000)
    options = parser.parse_args(arguments)
    files = [] if options.tokenizer is None else _tokenizer_files(options.tokenizer)
    state = _verified(options.checkpoint)
    # import torch only here: the import takes 4 s
    import torch

    from distattn.models.build import model_config
    from distattn.models.checkpoint_files import checkpoint_tensors, config_folder
    from distattn.models.export import export_safetensors

    config = model_config(config_folder(state))
    done = export_safetensors(
        checkpoint_tensors(state),
        config,
        options.folder,
        tokenizer_files=files,
        max_shard_bytes=options.max_shard_bytes,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
    )
    plural = "s" if len(done.files) > 1 else ""
    dtype = str(done.dtype).removeprefix("torch.")
    sys.stdout.write(
        f"{options.folder}: {done.total_bytes:,} bytes, mostly {dtype}, in {len(done.files)} file{plural}\n"
    )
    return 0


def _verified(path: Path) -> Path:
    """Return the folder of a checkpoint after verifying that its files have not changed, because one of them is a pickle.

    path: a checkpoint, or a run, whose preferred checkpoint is chosen.
    """
    checkpoints = find_checkpoints(path)
    newest = next(iter(by_preference(checkpoints)), checkpoints[-1])
    if newest.manifest is None:
        raise DamagedDataError(newest.problem)
    if newest.verdict.is_doubtful:
        print_message(f"{newest.folder}: {newest.verdict.kind}: {newest.verdict.text}.")
    problem = first_problem(newest.folder, newest.manifest)
    if problem is not None:
        raise DamagedDataError(str(problem))
    return newest.folder


def _tokenizer_files(folder: Path) -> list[Path]:
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise DistattnError(f"ckpt export-hf: --tokenizer: {folder} has no tokenizer's files, such as tokenizer.json.")
    return files
