"""Run-file keys that have no effect because of other keys."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import fields, replace
from pathlib import Path

from distattn.ir.limits import SettingProblem
from distattn.training.config.sections import Config, DataConfig, ModelConfig

# the model's shape keys; the config.json in a model folder overrides them
SHAPE_KEYS = tuple(
    f"model.{field.name}" for field in fields(ModelConfig) if field.name not in ("path", "weights", "dtype")
)
# keys that have no effect if data.path names an existing plan of packs
_TEXT_KEYS = tuple(f"data.{field.name}" for field in fields(DataConfig) if field.name not in ("path", "check_tokens"))


def idle_keys(config: Config) -> dict[str, str]:
    """Return the keys that would have no effect in a configuration at any value, each with the reason and a remedy."""
    data, parallel, train, watch = config.data, config.parallel, config.train, config.watch
    health, evaluation, slurm = config.health, config.evaluation, config.slurm
    idle: dict[str, str] = {}

    def add(is_idle: bool, reason: str, *keys: str) -> None:
        if is_idle:
            idle.update(dict.fromkeys(keys, reason))

    planned = data.path.endswith(".toml")
    # the result must not depend on the number of ranks, which changes in elastic runs
    size = parallel.context_parallel_size
    packs_are_split = size > 1 or (not size and parallel.data == "replicated")
    add(
        planned,
        f"does nothing here: packs are planned already; leave it out, or change it in {data.path}.",
        *_TEXT_KEYS,
    )
    schedule = "data.context_schedule"
    add(planned, f"packs are planned already; the context lengths of steps are rule.context in {data.path}.", schedule)
    add(
        not packs_are_split,
        "each rank has its own packs, so no layout applies; leave it out, or raise parallel.context_parallel_size.",
        "parallel.layout",
        "parallel.min_chunk",
    )
    add(
        packs_are_split and parallel.layout != "document_zigzag",
        f'belongs to parallel.layout = "document_zigzag", not to {parallel.layout}.',
        "parallel.min_chunk",
    )
    add(
        parallel.latents and not _has_latents(config.model),
        "the model has no latent attention (MLA); leave it out, or name the folder of such a model in model.path.",
        "parallel.latents",
    )
    add(
        train.schedule == "constant",
        "the constant schedule has no lower rate; leave it out, or use cosine, linear or wsd.",
        "train.min_learning_rate",
    )
    add(
        train.schedule != "wsd",
        f'belongs to train.schedule = "wsd", not to {train.schedule}; leave it out.',
        "train.decay_share",
    )
    add(
        config.checkpoint.every_steps < 0,
        "nothing is saved; set checkpoint.every_steps to 0 or more, or leave it out.",
        "checkpoint.keep_last",
        "checkpoint.keep_every_hours",
    )
    add(
        not watch.spike_window,
        "there is no watch for spikes; set watch.spike_window, or leave it out.",
        "watch.spike_threshold",
    )
    add(
        not health.prometheus_port,
        "belongs to health.prometheus_port; set it, or leave this out.",
        "health.prometheus_address",
    )
    add(
        not health.every_steps,
        "there are no reports to publish; set health.every_steps.",
        "health.prometheus_file",
        "health.prometheus_port",
    )
    add(
        not evaluation.every_steps,
        "nothing is evaluated; set evaluation.every_steps, or leave it out.",
        "evaluation.path",
        "evaluation.steps",
    )
    add(
        not config.reference_check.steps,
        "there is no reference check; set reference_check.steps, or leave it out.",
        "reference_check.tolerance",
    )
    add(
        not slurm.container_image,
        "there is no container; name its image in slurm.container_image, or leave it out.",
        "slurm.container_mounts",
        "slurm.container_runtime",
    )
    return idle


def idle_problems(config: Config, named: Collection[str]) -> Iterator[SettingProblem]:
    """Yield a problem for each key that is set but has no effect. named: keys set on the command line.

    A key at its default value is accepted: the files that runs save contain all keys, and the command line may use the
    default to undo a file's value. Exceptions are data keys and parallel.layout, which are reported at any value if the
    command line names them.
    """
    for key, reason in idle_keys(config).items():
        if not _has_default(config, key) or (key in named and key.startswith(("data.", "parallel.layout"))):
            yield SettingProblem(key, reason)


def without_idle_keys(config: Config, named: Collection[str]) -> tuple[Config, list[str]]:
    """Reset idle keys not set on the command line to their defaults. Returns the new configuration and the reset keys."""
    left_out = [key for key in idle_keys(config) if key not in named and not _has_default(config, key)]
    return with_defaults(config, left_out), left_out


def with_defaults(config: Config, keys: Collection[str]) -> Config:
    """Return the configuration with the given keys reset to their defaults."""
    defaults = Config()
    for key in keys:
        section, name = key.split(".")
        value = getattr(getattr(defaults, section), name)
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def _has_latents(model: ModelConfig) -> bool:
    """Return True if the model's config.json gives a latent width or is unreadable (which another check reports)."""
    try:
        model_config = json.loads(Path(model.path, "config.json").read_text("utf-8")) if model.path else {}
    except (OSError, ValueError):
        return True
    return isinstance(model_config, dict) and bool(model_config.get("kv_lora_rank"))


def _has_default(config: Config, key: str) -> bool:
    """Return whether a key has its default value."""
    section, name = key.split(".")
    return bool(getattr(getattr(config, section), name) == getattr(getattr(Config(), section), name))
