"""The facts that identify a run: those its checkpoints record, and those that must stay when it is resumed."""

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

# a run with other values here is another run
_FIXED = ("model", "data")
# the dtype of computation may change, and folders may have moved: the checkpoint's facts identify their contents
_MAY_CHANGE = ("model.path", "model.dtype", "model.weights", "data.path", "data.check_tokens")
# keys of a transformers configuration that do not describe the model's shape
_NOT_SHAPE = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache")


class TrainingRun(NamedTuple):
    """The run to train. shape: the model's transformers configuration. facts: those of `resume_facts`. device: this rank's."""

    folder: RunFolder
    config: Config
    data: RunData
    shape: Any
    facts: Mapping[str, str]
    device: torch.device


def resume_facts(config: Config, data: RunData, shape: Any) -> dict[str, str]:
    """Return the facts that a checkpoint's manifest records of its run; those in `REQUIRED` must match when it is
    loaded.

    shape: the transformers configuration of the model.
    """
    return {
        "model": _digest({name: value for name, value in shape.to_dict().items() if name not in _NOT_SHAPE}),
        # extending a plan does not change its order digest
        "plan": data.plan.order_digest,
        "corpora": " ".join(corpus.digest for corpus in data.corpora),
        "seed": str(config.run.seed),
        "config": _digest(asdict(config)),
        "engine": config.engine.name,
        "ranks": str(config.parallel.ranks),
    }


# ranks, degrees, strategy, kernel and engine may change
REQUIRED = ("model", "plan", "corpora", "seed")


def check_same_run(before: Config, after: Config) -> None:
    """Raise DistattnError, naming the key, where the resumed run would be another run."""
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
    """Raise DistattnError where a run has done more steps than its configuration asks for. done: the steps of its
    checkpoint.
    """
    if done > config.train.steps:
        raise DistattnError(
            f"train.steps: {config.train.steps:,}, but {run.folder} has a checkpoint of step {done:,}: give {done:,} or more."
        )


def _digest(values: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True, default=str).encode())
