"""Load weights from a folder of safetensors, as Hugging Face publishes them. Each rank reads its shards.

    load_pretrained(model, "folder/of/a/model")    # model: on the meta device, sharded or not

Names and layouts in published files may differ from the model's: transformers 5 keeps all experts of a layer in one tensor, but
files have one tensor per expert. transformers' own conversion mapping renames tensors and computes one tensor from several.
"""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.models.build import check_unfilled, materialise_buffers, untied_meta_model
from distattn.models.shards import local_slices, local_tensor, shape_of

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# dtype names in safetensors
_FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# buffers that old files store but models compute
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)attention\.(masked_)?bias$")


def load_pretrained(model: PreTrainedModel, folder: str | Path, device: str | torch.device = "cpu") -> int:
    """Load this rank's shards of a folder's weights into a model on the meta device. Return the number of bytes read.

    Values are converted to the model's dtypes. Besides its shards, a rank holds one tensor's part at a time. Raises
    DistattnError naming the tensor and the file if a tensor is missing, unknown to the model, of the wrong shape or quantised,
    and DamagedDataError if a file cannot be read. Errors that can be detected without reading values are raised before anything
    is allocated.
    """
    blueprint = untied_meta_model(model)
    # check the model before comparing its shapes with those in the files
    check_unfilled(model, blueprint)
    weights = PretrainedWeights(folder, blueprint)
    weights.check(model.all_tied_weights_keys)
    materialise_buffers(model, device)
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if name in weights.names and name not in model.all_tied_weights_keys:
            _fill(weights, name, name, tensor)
    for target, source in model.all_tied_weights_keys.items():
        if source not in weights.names:
            _fill(weights, target, source, tensors[source])
        elif target in weights.names:
            _check_tied(weights, target, source, tensors[source])
    return weights.bytes_read


class _Stored(NamedTuple):
    """A tensor in a file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]


class _Sources(NamedTuple):
    """The sources of a model's tensor: a single stored tensor, or a converter's input tensors, keyed by pattern."""

    stored: dict[str, list[_Stored]]
    converter: WeightConverter | None

    @property
    def first(self) -> _Stored:
        return next(iter(self.stored.values()))[0]


class PretrainedWeights:
    """The tensors in a folder of safetensors, under a model's names and in its layouts.

    blueprint: the model on the meta device, with a separate tensor for every name (`untied_meta_model`). bytes_read: the bytes
    of values read so far.
    """

    def __init__(self, folder: str | Path, blueprint: PreTrainedModel):
        self.folder, self._blueprint = Path(folder), blueprint
        self._targets: dict[str, Tensor] = blueprint.state_dict()
        self.bytes_read = 0
        self._handles: dict[str, Any] = {}
        _refuse_quantised(self.folder)
        stored = [tensor for file in _files_of(self.folder) for tensor in self._stored_in(file)]
        self._sources = self._find_sources(stored)

    @property
    def names(self) -> set[str]:
        """The names of the model's tensors that the files contain."""
        return set(self._sources)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor is stored."""
        return _DTYPES[self._sources[name].first.dtype]

    def check(self, tied: dict[str, str]) -> None:
        """Raise DistattnError naming a tensor of the model that the files lack. tied: maps each tied name to its source."""
        sources = {target: source for target, source in tied.items()} | {
            source: target for target, source in tied.items()
        }
        for name in self._targets:
            if name not in self._sources and sources.get(name) not in self._sources:
                raise DistattnError(
                    f"{self.folder}: its safetensors have no tensor for {name} of {type(self._blueprint).__name__}."
                )

    def read(self, name: str, slices: Sequence[slice] | None = None) -> Tensor:
        """Read a tensor of the model, or the part of it given by `slices`, in its stored dtype."""
        shape = tuple(self._targets[name].shape)
        slices = tuple(slices) if slices is not None else tuple(slice(0, size) for size in shape)
        sources = self._sources[name]
        if sources.converter is None:
            return self._read_stored(sources.first, slices)
        return self._convert(name, sources, slices)

    def _convert(self, name: str, sources: _Sources, slices: tuple[slice, ...]) -> Tensor:
        """Read the stored tensors, and let transformers' converter compute the model's tensor from them."""
        assert sources.converter is not None
        stored, rows = sources.stored, slice(0, self._targets[name].shape[0])
        if _stacks_rows(sources.converter):
            # row e depends only on the e-th tensor of each pattern, so leave the others unread
            rows = slices[0]
            stored = {pattern: tensors[rows] for pattern, tensors in stored.items()}
        # copy the converter, since it would keep the tensors of this call
        converter = copy.deepcopy(sources.converter)
        for pattern, tensors in stored.items():
            for item in tensors:
                whole: Any = self._read_stored(item, tuple(slice(0, size) for size in item.shape))
                converter.add_tensor(name, item.name, pattern, whole)
        converted = converter.convert(name, model=self._blueprint, config=self._blueprint.config)
        tensor = converted[name][0] if isinstance(converted[name], list) else converted[name]
        if tuple(tensor.shape[1:]) != tuple(self._targets[name].shape[1:]) or tensor.shape[0] != rows.stop - rows.start:
            raise DistattnError(self._shape_sentence(name, sources.first, tuple(tensor.shape)))
        inside = slice(slices[0].start - rows.start, slices[0].stop - rows.start)
        return tensor[(inside, *slices[1:])]

    def _read_stored(self, stored: _Stored, slices: tuple[slice, ...]) -> Tensor:
        """Read a part of a stored tensor, or all of it if it is a scalar."""
        try:
            handle = self._open(stored.file)
            tensor: Tensor = handle.get_slice(stored.name)[slices] if slices else handle.get_tensor(stored.name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(stored.file, error) from None
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            # safe_open maps the file into memory, so only the requested slices are read
            self._handles[file] = safe_open(str(self.folder / file), framework="pt", device="cpu")
        return self._handles[file]

    def _stored_in(self, file: str) -> list[_Stored]:
        try:
            handle = self._open(file)
            parts = [(name, handle.get_slice(name)) for name in handle.keys()]  # noqa: SIM118
            return [_Stored(name, file, part.get_dtype(), tuple(part.get_shape())) for name, part in parts]
        except FileNotFoundError:
            raise DistattnError(f"{self.folder / file}: the index names it, but there is no such file.") from None
        except (SafetensorError, OSError) as error:
            raise self._damaged(file, error) from None

    def _damaged(self, file: str, error: Exception) -> DamagedDataError:
        return DamagedDataError(f"{self.folder / file}: cannot be read as safetensors: {error}.")

    def _find_sources(self, stored: Sequence[_Stored]) -> dict[str, _Sources]:
        """Find the sources of each tensor of the model. Raises DistattnError if the model lacks a stored tensor."""
        model = self._blueprint
        transforms = get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        ignored = [*_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())]
        sources: dict[str, dict[str, list[_Stored]]] = defaultdict(lambda: defaultdict(list))
        by_target: dict[str, WeightConverter | None] = {}
        for item in sorted(stored, key=lambda item: dot_natural_key(item.name)):
            prefix = model.base_model_prefix
            target, pattern = rename_source_key(item.name, renamings, converters, prefix, self._targets)
            if target not in self._targets:
                if any(re.search(each, item.name) for each in ignored):
                    continue
                raise DistattnError(
                    f"{self.folder / item.file}: {item.name} is not a tensor of {type(model).__name__}; is config.json "
                    "of the same model?"
                )
            converter = (
                next((each for each in converters if pattern in each.source_patterns), None) if pattern else None
            )
            self._check_stored(target, item, converter)
            if converter is None and target in sources:
                other = next(iter(sources[target].values()))[0]
                raise DistattnError(
                    f"{self.folder / item.file}: {item.name} and {other.name} ({other.file}) are both {target} of the model."
                )
            sources[target][pattern or item.name].append(item)
            by_target[target] = converter
        for target, patterns in sources.items():
            self._check_counts(target, patterns, by_target[target])
        return {target: _Sources(dict(patterns), by_target[target]) for target, patterns in sources.items()}

    def _check_stored(self, target: str, stored: _Stored, converter: WeightConverter | None) -> None:
        wanted, where = self._targets[target], f"{self.folder / stored.file}: {stored.name}"
        if wanted.is_floating_point() and stored.dtype not in _FLOATS:
            raise DistattnError(
                f"{where} is {stored.dtype}; only {', '.join(_FLOATS)} are read. Save the model in bfloat16 first."
            )
        if converter is None and stored.shape != tuple(wanted.shape):
            raise DistattnError(self._shape_sentence(target, stored, stored.shape))
        if converter is not None and len(converter.target_patterns) > 1:
            raise DistattnError(
                f"{where} holds several tensors of {type(self._blueprint).__name__} in one, which cannot be read in parts; save "
                "it once with transformers' save_pretrained(save_original_format=False)."
            )

    def _check_counts(self, target: str, patterns: dict[str, list[_Stored]], converter: WeightConverter | None) -> None:
        """Raise DistattnError if some of a tensor's sources are missing."""
        if converter is None:
            return
        sample = next(iter(patterns.values()))[0]
        wanted = self._targets[target].shape[0] if _stacks_rows(converter) else len(next(iter(patterns.values())))
        for pattern in converter.source_patterns:
            count = len(patterns.get(pattern, ()))
            if count != wanted:
                raise DistattnError(
                    f"{self.folder / sample.file}: {target} is made of {wanted} tensors {pattern!r}, but the files have {count}."
                )

    def _shape_sentence(self, target: str, stored: _Stored, shape: tuple[int, ...]) -> str:
        wanted = tuple(self._targets[target].shape)
        return (
            f"{self.folder / stored.file}: {stored.name} gives {target} a shape {shape}, but it is {wanted} in "
            f"{type(self._blueprint).__name__}; is config.json of the same model?"
        )


def _fill(weights: PretrainedWeights, stored: str, name: str, tensor: Tensor) -> None:
    """Read this rank's part of a stored tensor into `tensor`."""
    slices = local_slices(name, tensor)
    if 0 not in shape_of(slices):
        with torch.no_grad():
            local_tensor(tensor).copy_(weights.read(stored, slices))


def _check_tied(weights: PretrainedWeights, target: str, source: str, tensor: Tensor) -> None:
    """Raise DistattnError if the configuration ties two tensors that have different values in the files."""
    slices = local_slices(source, tensor)
    held = local_tensor(tensor)
    if 0 not in shape_of(slices) and not torch.equal(held, weights.read(target, slices).to(held)):
        raise DistattnError(
            f"{weights.folder}: {target} and {source} differ, but config.json ties them; set tie_word_embeddings to false."
        )


def _stacks_rows(converter: WeightConverter) -> bool:
    """Return whether row e of a converter's result depends only on the e-th input tensor of each pattern."""
    first, *others = converter.operations
    stacks = isinstance(first, MergeModulelist) and first.dim == 0
    return stacks and all(isinstance(operation, Concatenate) and operation.dim > 0 for operation in others)


def _files_of(folder: Path) -> list[str]:
    """Return the names of a model's files: the single file, or those listed in the index."""
    index = folder / INDEX
    if not index.exists():
        if (folder / ONE_FILE).exists():
            return [ONE_FILE]
        raise DistattnError(
            f"{folder}: there is neither {ONE_FILE} nor {INDEX}; only weights in safetensors are read, never pickles."
        )
    try:
        named = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedDataError(f"{index}: is not an index of safetensors files: {error!r}.") from None
    strange = [name for name in named if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise DamagedDataError(f"{index}: {strange[0]!r} is not the name of a file next to it.")
    return named


def _refuse_quantised(folder: Path) -> None:
    try:
        content = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return
    quantization = content.get("quantization_config") if isinstance(content, dict) else None
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise DistattnError(
            f"{folder}: its weights are quantised ({method}); load and save it once with transformers in bfloat16, without "
            "quantization_config."
        )
