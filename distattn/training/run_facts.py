"""The facts that identify a run: those recorded in its checkpoints, and those that must not change when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from distattn.ir.errors import DistattnError
from distattn.training.config.run_file import Config
from distattn.training.run_data import RunData
from distattn.training.run_folder import RunFolder

if TYPE_CHECKING:
    # the import takes seconds, and commands that start runs do not need it
    import torch

# sections that must not change, since different values would make it a different run
_FIXED = ("model", "data")
# exceptions: the compute dtype may change, and folders may move, since the checkpoint's facts identify their contents
_MAY_CHANGE = ("model.path", "model.dtype", "model.weights", "data.path", "data.check_tokens")
# keys of a transformers configuration that do not describe the model's shape
_NOT_SHAPE = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache")


class TrainingRun(NamedTuple):
    """The run to train. shape: the model's transformers configuration. facts: see `resume_facts`. device: this rank's device."""

    folder: RunFolder
    config: Config
    data: RunData
    shape: Any
    facts: Mapping[str, str]
    device: torch.device


def resume_facts(config: Config, data: RunData, shape: Any) -> dict[str, str]:
    """Return the facts about a run for its checkpoints' manifests. Those in `REQUIRED` must match when a checkpoint is loaded.

    shape: the model's transformers configuration.
    """
    return {
        "model": _digest({name: value for name, value in shape.to_dict().items() if name not in _NOT_SHAPE}),
        # the order digest stays the same if the plan is extended
        "plan": data.plan.order_digest,
        "corpora": " ".join(corpus.digest for corpus in data.corpora),
        "seed": str(config.run.seed),
        "config": _digest(asdict(config)),
        "engine": config.engine.name,
        "ranks": str(config.parallel.ranks),
    }


# facts that must match when a checkpoint is loaded; ranks, parallel degrees, strategy, kernel and engine may change
REQUIRED = ("model", "plan", "corpora", "seed")


def check_same_run(before: Config, after: Config) -> None:
    """Raise DistattnError, naming the key, if the new configuration describes a different run."""
    pairs = [
        (f"{name}.{key}", asdict(getattr(before, name))[key], value)
        for name in _FIXED
        for key, value in asdict(getattr(after, name)).items()
    ]
    pairs.append(("run.seed", before.run.seed, after.run.seed))
    for key, old_value, new_value in pairs:
        if old_value != new_value and key not in _MAY_CHANGE:
            raise DistattnError(
                f"{key}: the run has {old_value!r}, and resuming with {new_value!r} would make it another run; start a new one."
            )


def check_steps_left(run: RunFolder, config: Config, done: int) -> None:
    """Raise DistattnError if a run's checkpoint, after `done` steps, is beyond the configured number of steps."""
    if done > config.train.steps:
        raise DistattnError(
            f"train.steps: {config.train.steps:,}, but {run.folder} has a checkpoint of step {done:,}: give {done:,} or more."
        )


def _digest(values: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True, default=str).encode())
