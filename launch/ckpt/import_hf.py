"""`distattn ckpt import-hf`: convert a Hugging Face folder to a checkpoint."""

from __future__ import annotations

import secrets
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from distattn.checkpoints.digested_files import DigestingFile
from distattn.checkpoints.manifest import Manifest
from distattn.data.files.indexed_file import synchronise_folder
from distattn.ir.errors import DistattnError
from distattn.launch.command_line import CommandParser

USAGE = """usage: distattn ckpt import-hf FOLDER CHECKPOINT [--dtype NAME]

Writes the model of a folder of safetensors into a new checkpoint, without optimizer state, with a manifest like any other. One
process does this, and holds one tensor at a time.

  --dtype NAME   float32, float64 or bfloat16; by default as in the files
"""

_DTYPES = ("float32", "float64", "bfloat16")


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    parser = CommandParser("ckpt import-hf")
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", choices=_DTYPES)
    options = parser.parse_args(arguments)
    checkpoint = options.checkpoint.absolute()
    if checkpoint.exists():
        raise DistattnError(f"{options.checkpoint} exists; nothing is overwritten, so name a new folder.")
    count = _import(options.folder, checkpoint, options.dtype)
    sys.stdout.write(f"{options.checkpoint}: {count:,} tensors of a model, no optimizer state\n")
    return 0


def _import(folder: Path, checkpoint: Path, dtype_name: str | None) -> int:
    """Write the checkpoint under a temporary name, and rename it when it is complete. Return the number of tensors."""
    # import torch only here: the import takes 4 s
    import torch

    from distattn.models.build import meta_model, model_config, untied_meta_model
    from distattn.models.checkpoint_files import write_checkpoint
    from distattn.models.safetensors_files import PretrainedWeights

    config = model_config(folder)
    model = meta_model(config, "eager")
    weights = PretrainedWeights(folder, untied_meta_model(model))
    tied = model.all_tied_weights_keys
    weights.check(tied)
    # a tied tensor may be stored under either of its names
    stored = {name: name for name in model.state_dict() if name not in tied}
    stored |= {source: target for target, source in tied.items() if source not in weights.names}
    chosen = None if dtype_name is None else getattr(torch, dtype_name)
    tensors = {
        name: tensor.to(chosen if chosen is not None and tensor.is_floating_point() else weights.dtype(stored[name]))
        for name, tensor in model.state_dict().items()
        if name in stored
    }
    if chosen is not None:
        config.dtype = chosen
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    aside = checkpoint.with_name(f"{checkpoint.name}.tmp-{secrets.token_hex(4)}")
    try:
        aside.mkdir()
        files = write_checkpoint(aside, tensors, lambda name: weights.read(stored[name]).to(tensors[name].dtype))
        with DigestingFile(aside / "config.json") as file:
            file.write(config.to_json_string().encode())
        manifest = Manifest(
            serial=1,
            step=0,
            saved_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            world_size=1,
            torch=torch.__version__,
            facts={"imported": str(folder.absolute())},
            files=[*files, file.digests("config.json")],
        )
        manifest.write(aside)
        synchronise_folder(str(aside / "."))
        aside.rename(checkpoint)
        synchronise_folder(str(checkpoint))
    except OSError as error:
        raise DistattnError(f"{checkpoint}: could not be written: {error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return len(tensors)
