"""The run-file keys that each command reads. A key on the command line that the command does not read is refused.

Run files may set all keys, so that one file serves all commands.
"""

from __future__ import annotations

from collections.abc import Sequence

from distattn.ir.errors import DistattnError
from distattn.training.config.run_file import all_keys


def _keys(*names: str) -> frozenset[str]:
    """Return all keys whose own name or section is in `names`."""
    return frozenset(key for key in all_keys() if key in names or key.partition(".")[0] in names)


# includes train.steps, because the number of packs decides which documents the first packs contain, and model.vocab_size, because
# a plan of packs may lack the tokenizer's vocabulary
_DOCUMENTS = _keys("data", "run.seed", "train.steps", "evaluation", "reference_check.steps", "model.vocab_size")
_SIZES = _keys("model.num_layers", "model.intermediate_size", "model.vocab_size")
_MODEL = _keys("model") - {"model.weights"}
# a step's memory depends on these keys, but its plan does not
_NOT_PLANNED = _keys("parallel.latents", "parallel.overlap")
_MEMORY = _keys("memory", "engine.name", "engine.shard_size") | _MODEL | _NOT_PLANNED
_ATTENTION = (_MODEL - _SIZES) | _keys("cluster", "parallel") - {"parallel.kernel"} - _NOT_PLANNED
_TRAINING = frozenset(all_keys()) - _keys("slurm", "ray")

# command -> keys that it reads. The error about a useless key names the first command that reads the key.
READ_BY = {
    "plan": _ATTENTION | _DOCUMENTS,
    "plan --docs": _ATTENTION,
    "plan --memory": _ATTENTION | _DOCUMENTS | _MEMORY,
    # the documents come from --docs, so data keys are read only to find the vocabulary
    "plan --memory --docs": _ATTENTION | _MEMORY | _keys("data.path", "data.max_document_tokens"),
    "train": _TRAINING,
    "launch local": _TRAINING,
    "launch folder": _TRAINING,
    "launch slurm": _TRAINING | _keys("slurm"),
    "launch ray": _TRAINING | _keys("ray"),
    # resume cannot move a run's folder
    "resume": _TRAINING - {"run.folder"},
    "preflight": _DOCUMENTS
    | _MEMORY
    | _keys("parallel", "cluster", "engine.zero_stage", "run.folder", "checkpoint.every_steps", "checkpoint.keep_last")
    | _keys("supervision.patience_seconds", "supervision.starting_seconds"),
}


def refuse_keys_that_do_nothing(command: str, overrides: Sequence[str]) -> None:
    """Raise DistattnError for a key in `overrides` that `command` (a key of READ_BY) does not read. Other words are ignored."""
    config_keys = all_keys()
    for word in overrides:
        key = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if not word.startswith("--") or key not in config_keys or key in READ_BY[command]:
            continue
        if "--docs" in command and key in READ_BY[command.replace(" --docs", "")]:
            raise DistattnError(f"command line: {key}: has no effect with --docs; leave one of them out.")
        section = key.partition(".")[0]
        # if the section belongs to one launcher, put that launcher first
        owners = [f"launch {section}", *READ_BY]
        owner = next(name for name in owners if key in READ_BY.get(name, ()))
        raise DistattnError(f"command line: {key}: has no effect here; it belongs to distattn {owner}.")
