"""What a run is: what its checkpoints say of it, and what has to stay when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from distattn.ir.errors import DistattnError
from distattn.training.config import Config
from distattn.training.run_data import RunData
from distattn.training.run_folder import RunFolder

if TYPE_CHECKING:
    # the import takes seconds, and commands that start runs do not need it
    import torch

# these stay: a run with others is another run
_FIXED = ("model", "data")
# the dtype that is computed in may change, and folders may have moved: what is in them is in the checkpoint's facts
_MAY_CHANGE = ("model.path", "model.dtype", "model.weights", "data.path", "data.check_tokens")
# of a transformers configuration
_NOT_SHAPE = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache")


class TrainingRun(NamedTuple):
    """The run to train. shape: the transformers configuration of the model. facts: those of `facts_of`. device: of this rank."""

    folder: RunFolder
    config: Config
    data: RunData
    shape: Any
    facts: Mapping[str, str]
    device: torch.device


def facts_of(config: Config, data: RunData, shape: Any) -> dict[str, str]:
    """What a checkpoint's manifest says of the run it belongs to; `REQUIRED` of it must be the same when it is read again.

    shape: the transformers configuration of the model.
    """
    return {
        "model": _digest({name: value for name, value in shape.to_dict().items() if name not in _NOT_SHAPE}),
        # of a plan that was made longer it is the same
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
    """Raise DistattnError, naming the key, where a resumed run would be another one."""
    pairs = [
        (f"{name}.{key}", asdict(getattr(before, name))[key], value)
        for name in _FIXED
        for key, value in asdict(getattr(after, name)).items()
    ]
    pairs.append(("run.seed", before.run.seed, after.run.seed))
    for key, was, now in pairs:
        if was != now and key not in _MAY_CHANGE:
            raise DistattnError(
                f"{key}: the run has {was!r}, and resuming with {now!r} would make it another; start a new one."
            )


def check_steps_left(run: RunFolder, config: Config, done: int) -> None:
    """Raise DistattnError where a run has done more steps than its configuration asks for. done: those of its checkpoint."""
    if done > config.train.steps:
        raise DistattnError(
            f"train.steps: {config.train.steps:,}, but {run.folder} has a checkpoint of step {done:,}: give {done:,} or more."
        )


def _digest(values: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True, default=str).encode())
