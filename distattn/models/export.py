"""Export weights to a Hugging Face folder: safetensors, in one file or in many with an index, next to the configuration.

    export_model(model, "folder/to/make")              # all ranks call this; the model may be sharded
    export_safetensors(named_tensors, config, "folder/to/make")

Names and layouts are the published ones: transformers' own conversion mapping splits tensors that transformers keeps as one but
publishes as many (experts). The folder appears at once with all its files, or not at all.
"""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from distattn.ir.errors import DistattnError
from distattn.models.build import meta_model
from distattn.models.safetensors_files import INDEX, ONE_FILE
from distattn.parallel.runtime.communication.communicator import all_gather_objects

# the file size that Hugging Face recommends
MAX_SHARD_BYTES = 5_000_000_000


class ExportedFiles(NamedTuple):
    """The result of an export: the safetensors file names, the total bytes of all tensors, and the most common dtype."""

    files: tuple[str, ...]
    total_bytes: int
    dtype: torch.dtype


def export_model(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer_files: Sequence[str | Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> ExportedFiles | None:
    """Export a model whose parameters are plain tensors or DTensors. All ranks call this, and rank 0 returns the written files.

    Tensors are gathered one at a time. Rank 0 holds at most one file's tensors, other ranks one tensor. All ranks raise an error
    if rank 0 cannot write. For everything else, see `export_safetensors`.
    """
    tied = model.all_tied_weights_keys
    tensors = ((name, _whole(tensor)) for name, tensor in model.state_dict().items() if name not in tied)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return export_safetensors(
            tensors, model.config, folder, tokenizer_files=tokenizer_files, max_shard_bytes=max_shard_bytes, dtype=dtype
        )
    written, failure = None, None
    if dist.get_rank() == 0:
        try:
            written = export_safetensors(
                tensors,
                model.config,
                folder,
                tokenizer_files=tokenizer_files,
                max_shard_bytes=max_shard_bytes,
                dtype=dtype,
            )
        except Exception as error:
            failure = error
    # other ranks take part in rank 0's gathers; after an error, rank 0 gathers the remaining tensors here
    for _ in tensors:
        pass
    assert dist.group.WORLD is not None
    outcome = all_gather_objects(dist.group.WORLD, None if failure is None else f"{failure}")[0]
    if failure is not None:
        raise failure
    if outcome is not None:
        raise DistattnError(f"rank 0 could not export the model: {outcome}")
    return written


def export_safetensors(
    named_tensors: Iterable[tuple[str, Tensor]],
    config: PretrainedConfig,
    folder: str | Path,
    *,
    tokenizer_files: Sequence[str | Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> ExportedFiles:
    """Write full tensors, named like the parameters of transformers' model, to a folder that plain transformers can load.

    named_tensors: every tensor of the model, tied tensors only once, in any order. They are read one by one, so that only one
    file's tensors are held at a time. tokenizer_files: files to copy into the folder. max_shard_bytes: the size limit of a file
    with more than one tensor. dtype: the dtype of floating-point tensors in the files; unchanged by default. Raises
    DistattnError if the folder exists, or if a tensor is missing, unknown, repeated or of the wrong shape (the error names the
    tensor).
    """
    folder = Path(folder).absolute()
    if folder.exists() or folder.is_symlink():
        raise DistattnError(f"{folder} exists; nothing is overwritten, so name a new folder.")
    if max_shard_bytes < 1:
        raise DistattnError(f"max_shard_bytes: must be at least 1, not {max_shard_bytes}.")
    missing = [file for file in tokenizer_files if not Path(file).is_file()]
    if missing:
        raise DistattnError(f"{missing[0]}: there is no such tokenizer file.")
    blueprint = meta_model(config, "eager")
    _refuse_fused(blueprint)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # use a unique name, so that the remains of a killed export do not disturb another export
    aside = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}")
    aside.mkdir()
    try:
        checked = _checked(named_tensors, blueprint)
        written = _write_files(_published(checked, blueprint, dtype), aside, max_shard_bytes)
        _write_config(config, blueprint, aside, written.dtype)
        for file in tokenizer_files:
            shutil.copyfile(file, aside / Path(file).name)
        for path in [*aside.iterdir(), aside]:
            _fsync(path)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise DistattnError(f"{folder}: could not be written: {error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _fsync(folder.parent)
    return written


def _whole(tensor: Tensor) -> Tensor:
    """Return a full tensor, gathering it if it is sharded. All ranks call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _refuse_fused(blueprint: PreTrainedModel) -> None:
    """Raise DistattnError for models that publish several tensors as one, since all of them would have to be held at once."""
    for transform in get_model_conversion_mapping(blueprint, add_legacy=False):
        if len(transform.target_patterns) > 1:
            raise DistattnError(
                f"{type(blueprint).__name__} publishes {', '.join(transform.target_patterns)} in one tensor; exporting it is not "
                "supported."
            )


def _checked(named_tensors: Iterable[tuple[str, Tensor]], blueprint: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors unchanged. Raises DistattnError for tensors unknown to the model and, at the end, for missing tensors."""
    tied = blueprint.all_tied_weights_keys
    left = {name: tuple(tensor.shape) for name, tensor in blueprint.state_dict().items() if name not in tied}
    kind = type(blueprint).__name__
    for name, tensor in named_tensors:
        if name not in left:
            raise DistattnError(f"{name} is not a tensor of {kind}, or is repeated; it is not exported.")
        if tuple(tensor.shape) != left[name]:
            raise DistattnError(f"{name} is {tuple(tensor.shape)}, but {left[name]} in {kind}.")
        del left[name]
        yield name, tensor
    if left:
        raise DistattnError(f"{min(left)} of {kind} is missing ({len(left)} in all); nothing was exported.")


def _published(
    tensors: Iterable[tuple[str, Tensor]], blueprint: PreTrainedModel, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors on the host, with the names, layouts and dtype that the files have."""
    for name, tensor in tensors:
        on_host = tensor.detach().cpu()
        if dtype is not None and on_host.is_floating_point():
            on_host = on_host.to(dtype)
        for published, part in revert_weight_conversion(blueprint, {name: on_host}).items():
            # parts of one tensor share memory, but safetensors files must not contain tensors that share memory
            yield published, part.contiguous() if part.numel() == on_host.numel() else part.clone()


def _write_files(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int) -> ExportedFiles:
    """Write tensors to one file, or to several with an index if their size exceeds `max_shard_bytes`."""
    names: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = held_bytes = 0
    # the number of elements of each dtype
    counts: Counter[torch.dtype] = Counter()

    def flush() -> None:
        # use temporary names, since the final names contain the number of files, which is known only at the end
        save_file(held, _part(folder, len(names)), metadata={"format": "pt"})
        names.append(list(held))
        held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > max_shard_bytes:
            flush()
            held_bytes = 0
        held[name] = tensor
        held_bytes, total = held_bytes + size, total + size
        counts[tensor.dtype] += tensor.numel()
    flush()
    dtype = counts.most_common(1)[0][0]
    if len(names) == 1:
        _part(folder, 0).rename(folder / ONE_FILE)
        return ExportedFiles((ONE_FILE,), total, dtype)
    files = tuple(f"model-{number + 1:05d}-of-{len(names):05d}.safetensors" for number in range(len(names)))
    for number, file in enumerate(files):
        _part(folder, number).rename(folder / file)
    weight_map = {name: file for file, held_names in zip(files, names, strict=True) for name in held_names}
    index = {
        "metadata": {"total_parameters": counts.total(), "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return ExportedFiles(files, total, dtype)


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}"


def _write_config(config: PretrainedConfig, blueprint: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    written = copy.deepcopy(config)
    written.architectures = [type(blueprint).__name__]
    # the dtype in which transformers will load the tensors
    written.dtype = dtype
    written.save_pretrained(folder)


def _fsync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
