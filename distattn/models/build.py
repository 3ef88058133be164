"""Build transformers models, from a configuration to this rank's shards of the initial weights.

    model = meta_model(model_config("folder/of/a/model"), dtype=torch.bfloat16)
    pytorch.shard_parameters(model, mesh)
    materialise(model, seed=1)          # or load_pretrained(model, "folder/of/a/model")

The model is built on the meta device, where tensors have shapes but no storage. `materialise` gives each rank its shards and
fills them one module at a time, so that no rank ever holds the whole model.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from distattn.adapters import huggingface
from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.models.shards import copy_part, local_tensor

_OTHER_INPUTS = ("vision_config", "audio_config")


def model_config(folder: str | Path) -> PretrainedConfig:
    """Read a causal language model's configuration from a folder's config.json. Nothing is downloaded.

    Raises DistattnError if there is no such file, if transformers has no causal language model of its `model_type`, or if its
    attention cannot be split. Raises DamagedDataError if the file is not JSON.
    """
    file = Path(folder) / "config.json"
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError:
        raise DistattnError(f"{folder}: there is no config.json; name the folder of a Hugging Face model.") from None
    except ValueError as error:
        raise DamagedDataError(f"{file}: cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise DistattnError(f"{file}: it has no model_type, so it is not the configuration of a Hugging Face model.")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # transformers' classes raise many kinds of errors for wrong values
        kind = content["model_type"]
        raise DistattnError(f"{file}: transformers cannot read it (model_type {kind!r}): {_one_line(error)}") from error
    check_model(config)
    return config


def llama_config(
    *,
    num_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int | None = None,
    intermediate_size: int,
    vocab_size: int,
    max_position_embeddings: int,
) -> PretrainedConfig:
    """Build the configuration of a Llama from its shape, given by the keys of a run file's [model] table."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim or hidden_size // num_attention_heads,
        max_position_embeddings=max_position_embeddings,
        # transformers' default of 0.02 suits widths in the thousands; narrow models learn half as fast with it
        initializer_range=hidden_size**-0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def check_model(config: PretrainedConfig) -> None:
    """Raise DistattnError, with the reason, unless the configuration is that of a causal language model that can be split."""
    kind = config.model_type
    other = [name for name in _OTHER_INPUTS if getattr(config, name, None) is not None]
    if other:
        raise DistattnError(
            f"{kind} takes more than text ({other[0]}); use the configuration of its language model only."
        )
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise DistattnError(f"transformers has no causal language model of type {kind!r}.")
    huggingface.check_config(config)


def meta_model(
    config: PretrainedConfig, attention: str = huggingface.NAME, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Build a causal language model on the meta device, so that its tensors have no storage.

    attention: the name of a transformers attention implementation. dtype: the parameters' dtype; rotary frequencies stay in
    float32. Raises DistattnError, with the reason, if the model's attention cannot be split.
    """
    check_model(config)
    if attention == huggingface.NAME:
        huggingface.register()
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation=attention, dtype=dtype
        )
    if attention == huggingface.NAME:
        huggingface.scale_rope_by_pack(model)
    return model


def untied_meta_model(model: PreTrainedModel) -> PreTrainedModel:
    """Build a copy of the model on the meta device, neither sharded nor wrapped, with a separate tensor for every name."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    # parameters do not depend on the attention implementation
    return meta_model(config, "eager", model.dtype)


def materialise(model: PreTrainedModel, seed: int, device: str | torch.device = "cpu") -> None:
    """Give a model on the meta device its initial weights. Each rank gets its shards of them.

    transformers' own `_init_weights` initialises each module in full from random numbers seeded by (seed, module name), and a
    rank keeps its part. So the weights do not depend on the number of ranks or on the sharding. Besides its shards, a rank
    holds one module's weights at a time. The largest, an embedding of 128,256 x 8,192, takes 2.1 GB in bfloat16. device: where
    the shards are allocated and the random numbers drawn; CPUs and GPUs draw different numbers. torch's random state does not
    change. Raises DistattnError naming any tensor that would stay uninitialised.
    """
    blueprint = untied_meta_model(model)
    check_unfilled(model, blueprint)
    targets = unique_tensors(model)
    initialisations = _initialisations(blueprint, targets)
    allocate(model, device)
    _initialise(unique_tensors(model), blueprint, initialisations, seed, torch.device(device))


def materialise_buffers(model: PreTrainedModel, device: str | torch.device = "cpu") -> None:
    """Allocate all tensors of a model on the meta device, and fill the buffers that checkpoints and safetensors leave out.

    Those buffers are rotary frequencies, scaled as in the configuration. Load everything else afterwards. Raises DistattnError as
    `materialise` does.
    """
    blueprint = untied_meta_model(model)
    check_unfilled(model, blueprint)
    in_files = set(blueprint.state_dict())
    names = unique_tensors(model).keys() - in_files
    initialisations = _initialisations(blueprint, names)
    allocate(model, device)
    targets = {name: tensor for name, tensor in unique_tensors(model).items() if name in names}
    _initialise(targets, blueprint, initialisations, 0, torch.device(device))


def allocate(model: PreTrainedModel, device: str | torch.device) -> None:
    """Allocate storage for all tensors of a model on the meta device. Tied tensors stay tied."""
    model.to_empty(device=device)
    for target, source in model.all_tied_weights_keys.items():
        # to_empty replaces plain parameters one by one, which unties them
        if model.get_parameter(target) is not model.get_parameter(source):
            module, _, leaf = target.rpartition(".")
            setattr(model.get_submodule(module), leaf, model.get_parameter(source))


def check_unfilled(model: PreTrainedModel, blueprint: PreTrainedModel) -> None:
    """Raise DistattnError naming a tensor that differs from the model's configuration or is not on the meta device.

    blueprint: the model's `untied_meta_model`.
    """
    for target, source in model.all_tied_weights_keys.items():
        if model.get_parameter(target) is not model.get_parameter(source):
            raise DistattnError(
                f"{target} and {source} are tied, but were sharded apart; shard both modules in one fully_shard call."
            )
    tensors, wanted = unique_tensors(model), unique_tensors(blueprint)
    strange = sorted(tensors.keys() ^ (wanted.keys() - set(model.all_tied_weights_keys)))
    if strange:
        raise DistattnError(
            f"{strange[0]} is only in one of the model and its configuration; load weights before adding modules or "
            "wrapping them (LoRA, torch.compile)."
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise DistattnError(
                f"{name} is {tuple(tensor.shape)}, but {tuple(wanted[name].shape)} by the model's configuration."
            )
        if not local_tensor(tensor).is_meta:
            raise DistattnError(
                f"{name} has values already; weights are loaded into models on the meta device (meta_model)."
            )


def unique_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, keyed by name. Tied tensors appear only once."""
    return dict([*model.named_parameters(), *model.named_buffers()])


class _Initialisation(NamedTuple):
    """Modules to initialise together, in order, since they write common tensors, and all tensors that they write."""

    modules: list[tuple[str, PreTrainedModel, torch.nn.Module]]
    tensors: set[str]


def _initialisations(blueprint: PreTrainedModel, wanted: Collection[str]) -> list[_Initialisation]:
    """Find the tensors that must be initialised together, by initialising the model on the meta device.

    Most modules write only their own tensors. Some also write their children's: in GPT-2, a parent module scales projections.
    blueprint: the model on the meta device. Raises DistattnError if one of the wanted tensors is written by no module.
    """
    initialisations: list[_Initialisation] = []
    with torch.no_grad():
        for name, owner, module in _modules_from_below("", blueprint, blueprint):
            tensors = {f"{name}.{leaf}" if name else leaf: tensor for leaf, tensor in unique_tensors(module).items()}
            # in-place operations on a tensor, or on a view of it, increase its version
            before = {key: tensor._version for key, tensor in tensors.items()}
            try:
                owner._init_weights(module)
            except (RuntimeError, NotImplementedError) as error:
                raise DistattnError(f"{name} cannot be initialised on the meta device: {_one_line(error)}") from None
            written = {key for key, tensor in tensors.items() if tensor._version != before[key]}
            if not written:
                continue
            overlapping = [item for item in initialisations if item.tensors & written]
            initialisations = [item for item in initialisations if not item.tensors & written]
            modules = [module for item in overlapping for module in item.modules]
            tensors_of_all = written.union(*(item.tensors for item in overlapping))
            initialisations.append(_Initialisation([*modules, (name, owner, module)], tensors_of_all))
    initialisations = [item for item in initialisations if item.tensors & set(wanted)]
    missing = sorted(set(wanted).difference(*(item.tensors for item in initialisations)))
    if missing:
        raise DistattnError(
            f"{type(blueprint).__name__} does not initialise {missing[0]} (its _init_weights leaves it out)."
        )
    return initialisations


def _modules_from_below(
    name: str, module: torch.nn.Module, owner: PreTrainedModel
) -> Iterator[tuple[str, PreTrainedModel, torch.nn.Module]]:
    """Yield every module after its children, with the innermost model that contains it, whose `_init_weights` applies."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    for leaf, child in module.named_children():
        yield from _modules_from_below(f"{name}.{leaf}" if name else leaf, child, owner)
    yield name, owner, module


def _initialise(
    targets: dict[str, Tensor],
    blueprint: PreTrainedModel,
    initialisations: list[_Initialisation],
    seed: int,
    device: torch.device,
) -> None:
    """Fill this rank's parts of the targets, one initialisation after another."""
    accelerator = device.type != "cpu"
    with (
        torch.no_grad(),
        torch.random.fork_rng([device] if accelerator else [], device_type=device.type if accelerator else "cuda"),
    ):
        for item in initialisations:
            held = {name: targets[name] for name in sorted(item.tensors & targets.keys())}
            if all(local_tensor(tensor).numel() == 0 for tensor in held.values()):
                continue
            with _real_tensors(blueprint, item.tensors, targets, device):
                for name, owner, module in item.modules:
                    _seed_generators(_seed_of(seed, name), device)
                    owner._init_weights(module)
                for name, tensor in held.items():
                    copy_part(name, tensor, _get(blueprint, name))


@contextmanager
def _real_tensors(
    blueprint: PreTrainedModel, names: Collection[str], targets: dict[str, Tensor], device: torch.device
) -> Iterator[None]:
    """Allocate a meta-device model's tensors `names` while the context is open. Parameters get the dtypes of `targets`."""
    meta = {name: _get(blueprint, name) for name in names}
    for name in names:
        if isinstance(meta[name], torch.nn.Parameter):
            dtype = targets[name].dtype if name in targets else meta[name].dtype
            empty = torch.empty(meta[name].shape, dtype=dtype, device=device)
            _set(blueprint, name, torch.nn.Parameter(empty, requires_grad=False))
        else:
            _set(blueprint, name, torch.empty_like(meta[name], device=device))
    try:
        yield
    finally:
        for name in names:
            _set(blueprint, name, meta[name])


def _get(model: torch.nn.Module, name: str) -> Tensor:
    module, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), leaf)
    return tensor


def _set(model: torch.nn.Module, name: str, tensor: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, tensor)


def _seed_of(seed: int, name: str) -> int:
    """Compute a 63-bit seed for torch from a run's seed and a module's name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _seed_generators(seed: int, device: torch.device) -> None:
    """Set the seeds of the random number generators from which initialisation on `device` draws, and of no others."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _one_line(error: Exception) -> str:
    """Return an error's message without line breaks, as the end of a sentence."""
    return " ".join(str(error).split())[:300].rstrip(".") + "."
