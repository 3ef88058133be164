"""Reads a run's TOML file into frozen dataclasses, with overrides `--section.key value`, and reports all mistakes at once."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import tomli_w
import tyro

from distattn.ir.errors import DistattnError
from distattn.ir.toml_lines import Key
from distattn.ir.toml_records import TomlFile, parse_record, raise_problems, unknown_key, wrong_type
from distattn.training.config.checks import problems_of
from distattn.training.config.idle_keys import SHAPE_KEYS, with_defaults, without_idle_keys
from distattn.training.config.sections import Config as Config
from distattn.training.config.sections import DataConfig as DataConfig
from distattn.training.config.sections import ModelConfig as ModelConfig
from distattn.training.config.sections import ParallelConfig as ParallelConfig
from distattn.training.config.sections import ReferenceCheckConfig as ReferenceCheckConfig
from distattn.training.config.sections import RunConfig as RunConfig
from distattn.training.config.sections import TrainConfig as TrainConfig
from distattn.training.config.shipped_configs import configuration_file, shipped_names
from distattn.training.reporting.json_lines import write_whole

# on the command line, every key takes a value, even a boolean key
_VALUES = (tyro.conf.FlagConversionOff,)
# pydantic's error type for a wrong value on the command line, by the key's type
_KINDS: dict[Any, str] = {int: "int_type", float: "float_type"}
# added to the help text, since only the run file can set these tables
_TABLES = """only in the run file:
  [[data.context_schedule]] context lengths by step: tables with context_length and steps, one
                            after the other; the last may leave steps out
"""
# shape keys, and their alternative names in config.json
_FOLDER_NAMES: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer"),
    "hidden_size": ("n_embd",),
    "num_attention_heads": ("n_head",),
    "num_key_value_heads": (),
    "head_dim": (),
    "intermediate_size": ("n_inner",),
    "vocab_size": (),
}


def load(path: str | Path, overrides: Sequence[str] = (), report: Callable[[str], None] = lambda line: None) -> Config:
    """Read a configuration file, or a shipped configuration by name, and apply command-line overrides.

    report: called with a sentence if the overrides leave keys of the file without effect; these keys are reset to their
    defaults. Raises DistattnError naming every bad key and its line.
    """
    path = configuration_file(path)
    if not path.exists():
        near = difflib.get_close_matches(path.stem, shipped_names(), 1, 0.6)
        hint = (
            f"did you mean {near[0]}, which distattn ships?"
            if near
            else "distattn configs lists those that distattn ships."
        )
        raise DistattnError(f"{path}: there is no such configuration file; {hint}")
    file = TomlFile.read(path, "name a configuration file")
    _find_model_folder(path, file.content)
    config = _validated(file.content, file.place)
    if overrides:
        _check_overrides(config, overrides)
        changed = tyro.cli(Config, default=config, args=list(overrides), config=_VALUES)
        named = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in overrides if word[:2] == "--"}
        replaced: list[str] = []
        if changed.model.path != config.model.path and changed.model.path:
            replaced = [key for key in SHAPE_KEYS if key not in named]
            changed = with_defaults(changed, replaced)
        changed, left_out = without_idle_keys(changed, named)
        # report only shape keys that the file sets itself, not those read from a model folder
        left_out += [
            key for key in replaced if key.split(".")[1] in file.content.get("model", {}) and not config.model.path
        ]
        if left_out:
            report(f"{path}: left out, since the command line makes them useless: {', '.join(left_out)}.")
        config = _validated(asdict(changed), lambda _: "command line", named)
    return config


def _find_model_folder(file: Path, content: dict[str, Any]) -> None:
    """Resolve model.path relative to the run file's folder if it exists there but not in the working directory."""
    model = content.get("model")
    model_path = model.get("path") if isinstance(model, dict) else None
    if (
        model is not None
        and isinstance(model_path, str)
        and model_path
        and not Path(model_path).exists()
        and (file.parent / model_path).exists()
    ):
        model["path"] = str((file.parent / model_path).absolute())


def help_text() -> str:
    """Return the help text of every key with its default, as tyro prints it, and of the tables in run files."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(Config, args=["--help"], prog="distattn train CONFIG", config=_VALUES)
    return out.getvalue() + _TABLES


def save(config: Config, path: Path, comment: str = "") -> None:
    """Write the resolved configuration atomically, for `load` to read back. Raises OSError.

    comment: complete TOML comment lines, written at the top.
    """
    sections = {
        section: {name: value for name, value in keys.items() if value is not None}
        for section, keys in asdict(config).items()
    }
    write_whole(path, comment + tomli_w.dumps(sections))


def _validated(content: dict[str, Any], place: Callable[[Key], str], named: Collection[str] = ()) -> Config:
    """Return the configuration that a nested dict describes.

    place: returns where a key was set, such as file and line. named: keys set on the command line. Raises DistattnError
    with all mistakes, one per line, each preceded by its place.
    """
    config = parse_record(Config, content, place)
    config = replace(config, model=_with_folder_s_shape(config.model, named))
    raise_problems(problems_of(config, named), place)
    return config


def _with_folder_s_shape(model: ModelConfig, named: Collection[str] = ()) -> ModelConfig:
    """Return the model section, with its shape replaced by that in config.json if model.path names a folder.

    named: keys set on the command line. Raises DistattnError if config.json lacks a key or contradicts a key that is set.
    """
    if not model.path:
        return model
    file = Path(model.path, "config.json")
    try:
        model_config = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise DistattnError(f"model.path: there is no {file}; name a folder of a transformers model.") from None
    except (OSError, ValueError) as error:
        raise DistattnError(f"model.path: {file} cannot be read: {error}.") from None
    shape: dict[str, int] = {}
    for name, others in _FOLDER_NAMES.items():
        value_of_key = next(
            (
                model_config[config_name]
                for config_name in (name, *others)
                if isinstance(model_config, dict) and model_config.get(config_name)
            ),
            None,
        )
        if isinstance(value_of_key, int):
            shape[name] = value_of_key
    if missing := [name for name in ("num_layers", "hidden_size", "num_attention_heads") if name not in shape]:
        raise DistattnError(
            f"model.path: {file} does not have {missing[0]}, which configurations of language models have."
        )
    defaults = {"num_key_value_heads": shape["num_attention_heads"], "intermediate_size": 4 * shape["hidden_size"]}
    filled: dict[str, Any] = defaults | {"head_dim": 0} | shape
    default_model = ModelConfig()
    for name, value in filled.items():
        model_value = getattr(model, name)
        if model_value != value and (model_value != getattr(default_model, name) or f"model.{name}" in named):
            raise DistattnError(
                f"model.{name}: {model_value} has no effect together with model.path: {file} has {value}; leave it out."
            )
    return replace(model, **filled)


def _check_overrides(config: Config, overrides: Sequence[str]) -> None:
    """Raise DistattnError for overrides that tyro would reject: unknown keys, stray words and values of the wrong type."""
    starts = [i for i, word in enumerate(overrides) if word.startswith("--")]
    if not starts or starts[0] != 0:
        raise DistattnError(f"command line: {overrides[0]!r} is not a key; write --section.key value.")
    config_keys = all_keys()
    for begin, end in pairwise([*starts, len(overrides)]):
        key = overrides[begin].removeprefix("--").split("=", 1)[0].replace("-", "_")
        if key == "help":
            continue
        if key == "data.context_schedule":
            raise DistattnError(
                f"command line: {key}: its tables [[{key}]] can only be set in the run file; change them there."
            )
        if key not in config_keys:
            raise DistattnError(f"command line: {unknown_key(Config, key, arrays=False)}")
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            try:
                tyro.cli(Config, default=config, args=list(overrides[begin:end]), config=_VALUES)
            except SystemExit:
                section, name = key.split(".")
                hint = get_type_hints(type(getattr(config, section)))[name]
                value_type = get_args(hint)[0] if isinstance(hint, UnionType) else hint
                inline = overrides[begin].partition("=")[2]
                value = " ".join([*([inline] if inline else []), *overrides[begin + 1 : end]])
                if not value:
                    raise DistattnError(f"command line: --{key} needs a value.") from None
                if value_type in _KINDS:
                    problem = wrong_type(Config, key, value, _KINDS[value_type])
                    raise DistattnError(f"command line: {problem}") from None
                kind = "True or False" if value_type is bool else "one value; put quotes around one that has spaces"
                raise DistattnError(
                    f"command line: {key}: {json.dumps(value, ensure_ascii=False)} is not {kind}."
                ) from None


def all_keys() -> list[str]:
    """List all keys of run files, such as "train.steps"."""
    sections = get_type_hints(Config)
    return [f"{section}.{field.name}" for section in sections for field in fields(sections[section])]
