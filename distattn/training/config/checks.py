"""Checks of a run file: a problem for each key whose value is out of range or does not fit another key."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields

from distattn.ir.limits import SettingProblem, annotations_of, nested_problems
from distattn.training.config.idle_keys import idle_problems
from distattn.training.config.sections import ENGINES, Config, DataConfig, Engines

# the number of ranks must be a multiple of each degree
_DEGREES = (
    "parallel.ranks",
    "parallel.context_parallel_size",
    "parallel.tensor_parallel_size",
    "parallel.pipeline_parallel_size",
)
# printed by the launcher for runs on this machine, and by the ranks on other machines
NO_GPU_FOR_MEGATRON = "engine.name: megatron needs GPUs, and this machine has none; use engine fsdp2 or deepspeed."


# key -> the keys that it is compared with; if any of these is itself invalid, only the invalid key is reported
_COMPARED_WITH = {
    "data.context_length": ("data.tokens_per_step", "parallel.data", *_DEGREES),
    "data.max_document_tokens": ("data.context_length", "data.tokens_per_step"),
    "data.tokens_per_step": ("data.context_length",),
    "engine.shard_size": ("parallel.ranks",),
    "memory.offload": ("memory.activation_checkpointing",),
    "model.intermediate_size": ("parallel.tensor_parallel_size",),
    "model.num_key_value_heads": ("model.num_attention_heads", "parallel.tensor_parallel_size"),
    "model.num_layers": _DEGREES,
    "model.vocab_size": ("parallel.tensor_parallel_size",),
    "parallel.context_parallel_size": _DEGREES,
    "parallel.devices_per_node": ("parallel.ranks",),
    "parallel.min_chunk": ("parallel.layout",),
    "parallel.overlap": ("data.context_length", "data.tokens_per_step", "parallel.data", *_DEGREES),
    "parallel.tensor_parallel_size": ("parallel.ranks", "parallel.pipeline_parallel_size", "engine.name"),
    "ray.min_nodes": ("checkpoint.every_steps", "parallel.data", *_DEGREES),
    "slurm.container_mounts": ("slurm.container_image",),
    "train.decay_share": ("train.schedule",),
    "train.min_learning_rate": ("train.learning_rate", "train.schedule"),
    "train.warmup_steps": ("train.steps", "train.schedule", "train.decay_share"),
    "watch.action": ("checkpoint.every_steps",),
}


def problems_of(config: Config, named: Collection[str] = ()) -> list[SettingProblem]:
    """Return all problems except those that merely follow from another problem. named: keys set on the command line."""
    checks = (
        # check each key by itself first
        nested_problems(config),
        _engine_problems(config),
        _train_problems(config),
        _schedule_problems(config),
        _shape_problems(config),
        _megatron_problems(config),
        _elastic_problems(config),
        _overlap_problems(config),
        idle_problems(config, named),
    )
    problems: list[SettingProblem] = []
    wrong: set[str] = set()
    for check in checks:
        of_check = list(check)
        problems += [problem for problem in of_check if not wrong & {problem.key, *_COMPARED_WITH.get(problem.key, ())}]
        wrong |= {problem.key for problem in of_check}
    return problems


def _train_problems(config: Config) -> Iterator[SettingProblem]:
    """Yield problems with the learning-rate schedule and the watch."""
    train = config.train
    if config.watch.action == "rollback" and config.checkpoint.every_steps < 1:
        yield SettingProblem("watch.action", "rollback goes back to the newest checkpoint; set checkpoint.every_steps.")
    if train.warmup_steps > train.steps:
        yield SettingProblem(
            "train.warmup_steps", f"{train.warmup_steps} of {train.steps} steps; use at most that many."
        )
    elif train.schedule == "wsd" and train.warmup_steps > train.steps - max(round(train.decay_share * train.steps), 1):
        yield SettingProblem(
            "train.warmup_steps", f"{train.warmup_steps} of {train.steps} steps reach into wsd's decay; use fewer."
        )
    if train.min_learning_rate > train.learning_rate:
        yield SettingProblem(
            "train.min_learning_rate", f"{train.min_learning_rate} is above train.learning_rate, {train.learning_rate}."
        )


def _shape_problems(config: Config) -> Iterator[SettingProblem]:
    """Yield problems with sizes that do not fit together."""
    model, data, parallel = config.model, config.data, config.parallel
    size, model_parallel = (
        parallel.context_parallel_size,
        parallel.tensor_parallel_size * parallel.pipeline_parallel_size,
    )
    if min(model_parallel, parallel.ranks) < 1:
        return
    if parallel.ranks % model_parallel:
        yield SettingProblem(
            "parallel.tensor_parallel_size",
            f"times pipeline_parallel_size it is {model_parallel}, which does not divide {parallel.ranks} ranks.",
        )
    elif size < 0 or parallel.data_ranks % (size or 1):
        yield SettingProblem("parallel.context_parallel_size", f"{size} does not divide {parallel.data_ranks} ranks.")
    elif not data.path.endswith(".toml"):
        yield from _pack_problems(data, parallel.data_parallel_size)
        if parallel.overlap:
            yield from _pair_problems(data, parallel.data_parallel_size)
    if not data.path.endswith(".toml") and 0 < model.vocab_size < 256:
        yield SettingProblem(
            "model.vocab_size",
            f"{model.vocab_size} is too small for tokens that are bytes; set it to at least 256, or to 0.",
        )
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    if min(model.hidden_size, heads, kv_heads) >= 1:
        if not model.path and ((not model.head_dim and model.hidden_size % heads) or model.head_size % 2):
            yield SettingProblem(
                "model.num_attention_heads",
                f"hidden_size {model.hidden_size} cannot be split into {heads} heads of an even size.",
            )
        if heads % kv_heads:
            yield SettingProblem(
                "model.num_key_value_heads",
                f"{heads} query heads cannot be divided evenly among {kv_heads} key/value heads.",
            )
    if parallel.devices_per_node > 0 and parallel.ranks % parallel.devices_per_node:
        yield SettingProblem(
            "parallel.devices_per_node", f"{parallel.devices_per_node} does not divide {parallel.ranks} ranks."
        )


def _pack_problems(data: DataConfig, shares: int) -> Iterator[SettingProblem]:
    """Yield problems with packs of text that do not fit the documents, the step or the data-parallel shares."""
    step = data.tokens_per_step
    contexts = {"data.context_length": data.context_by_step[0][1]}
    if data.context_schedule:
        contexts = {
            f"data.context_schedule.{number}.context_length": tokens
            for number, (_, tokens) in enumerate(data.context_by_step)
        }
    # negative values are reported by another check
    if min(contexts.values()) < 1 or shares < 1:
        return
    for key, tokens in contexts.items():
        packs = step // tokens
        if step % tokens:
            yield SettingProblem(
                "data.tokens_per_step", f"{step} is not a multiple of {key} {tokens}; {max(packs, 1) * tokens} is."
            )
        elif packs % shares:
            smaller = f"{step // shares}, or " if step % shares == 0 else ""
            yield SettingProblem(
                key,
                f"a step has {packs} pack{'s' * (packs > 1)} of {tokens} tokens, which {shares} shares of the ranks "
                f"cannot share equally; use {smaller}data.tokens_per_step = {-(-packs // shares) * shares * tokens}.",
            )
    longest = max(contexts.values())
    if data.max_document_tokens > longest:
        key = "context_schedule" if data.context_schedule else "context_length"
        yield SettingProblem(
            "data.max_document_tokens",
            f"{data.max_document_tokens} tokens do not fit into a pack of {longest}; set it to at most "
            f"data.{key if data.context_schedule or data.context_length else 'tokens_per_step'}.",
        )


def _overlap_problems(config: Config) -> Iterator[SettingProblem]:
    """Yield the reasons why micro-batches cannot take turns (parallel.overlap)."""
    if not config.parallel.overlap:
        return
    if config.engine.compile:
        yield SettingProblem("parallel.overlap", "compiled layers do not take turns; use engine.compile = false.")
    if config.parallel.latents:
        yield SettingProblem(
            "parallel.overlap", "layers that send latents do not take turns; use parallel.latents = false."
        )


def _pair_problems(data: DataConfig, shares: int) -> Iterator[SettingProblem]:
    """Yield a problem if a data-parallel share of a step does not have an even number of packs."""
    for _, tokens in data.context_by_step:
        # values below 1 are reported by another check
        if min(tokens, shares) > 0 and (data.tokens_per_step // tokens) % (2 * shares):
            wanted = 2 * shares * tokens
            yield SettingProblem(
                "parallel.overlap",
                f"pairs of micro-batches take turns, and {data.tokens_per_step} tokens of a step are "
                f"{data.tokens_per_step // tokens / shares:g} packs of {tokens} for each share of the ranks; use a multiple of "
                f"{wanted} as data.tokens_per_step.",
            )
            return


def _schedule_problems(config: Config) -> Iterator[SettingProblem]:
    """Yield problems with the context-length schedule."""
    data, steps = config.data, config.train.steps
    if not data.context_schedule or data.path.endswith(".toml"):
        return
    if data.context_length:
        yield SettingProblem(
            "data.context_length", "data.context_schedule has the context length by step; leave one of them out."
        )
    *first, last = data.context_schedule
    for number, phase in enumerate(first):
        if not phase.steps:
            yield SettingProblem(
                f"data.context_schedule.{number}.steps",
                "only the last phase may have 0; set this phase's number of steps.",
            )
    if last.steps and (planned := sum(phase.steps for phase in data.context_schedule)) < steps:
        yield SettingProblem(
            f"data.context_schedule.{len(first)}.steps",
            f"all phases have {planned} steps, and train.steps is {steps}; leave the "
            "last phase's steps out for all remaining ones.",
        )


def _engine_problems(config: Config) -> Iterator[SettingProblem]:
    """Yield problems with settings that the engine does not support."""
    engine, parallel, memory = config.engine, config.parallel, config.memory
    if engine.name in ENGINES:
        yield from _unsupported_keys(config, engine.name)
    yield from _precision_problems(config)
    if engine.shard_size < 0 or parallel.ranks % (engine.shard_size or 1):
        yield SettingProblem("engine.shard_size", f"{engine.shard_size} does not divide {parallel.ranks} ranks.")
    if memory.offload and memory.activation_checkpointing == "none":
        yield SettingProblem(
            "memory.offload", "needs memory.activation_checkpointing, since it moves the inputs of checkpointed layers."
        )
    if engine.compile and memory.activation_checkpointing == "save_attention":
        yield SettingProblem(
            "engine.compile", "a compiled layer cannot choose what it saves; use activation_checkpointing full or none."
        )
    if config.model.weights == "pretrained" and not config.model.path:
        yield SettingProblem("model.weights", "pretrained weights come from a folder; name it in model.path.")


def _unsupported_keys(config: Config, engine: str) -> Iterator[SettingProblem]:
    """Yield a problem for each key that is set but not supported by the engine."""
    for section in fields(config):
        values = getattr(config, section.name)
        annotations = annotations_of(values.__class__)
        for field in fields(values):
            for limit in annotations.get(field.name, ()):
                unsupported = isinstance(limit, Engines) and engine not in limit.names
                if unsupported and getattr(values, field.name) != field.default:
                    supported = " and ".join(limit.names)
                    reason = f"engine {engine} does not support it here; use it with {supported}."
                    yield SettingProblem(f"{section.name}.{field.name}", reason)


def _precision_problems(config: Config) -> Iterator[SettingProblem]:
    """Yield problems with dtypes that the engine cannot train in."""
    name, stage, dtype = config.engine.name, config.engine.zero_stage, config.model.dtype
    if dtype == "float64" and name in ("deepspeed", "megatron"):
        yield SettingProblem("model.dtype", f"engine {name} does not train in float64; fsdp2 does.")
    if dtype == "bfloat16" and name == "deepspeed" and stage == 0:
        yield SettingProblem(
            "engine.zero_stage",
            "with model.dtype = bfloat16 DeepSpeed sums gradients in float32 from stage 1 on; use 1 to 3.",
        )


def _megatron_problems(config: Config) -> Iterator[SettingProblem]:
    """Yield problems with sizes that do not divide evenly among tensor- or pipeline-parallel ranks."""
    model, parallel = config.model, config.parallel
    if config.engine.name != "megatron":
        return
    for key, size in {
        "num_key_value_heads": model.num_key_value_heads,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
    }.items():
        if size % max(parallel.tensor_parallel_size, 1):
            yield SettingProblem(
                f"model.{key}",
                f"{size} cannot be divided evenly among {parallel.tensor_parallel_size} tensor-parallel ranks.",
            )
    if model.num_layers % max(parallel.pipeline_parallel_size, 1):
        yield SettingProblem(
            "model.num_layers",
            f"{model.num_layers} cannot be divided evenly among {parallel.pipeline_parallel_size} pipeline stages.",
        )


def _elastic_problems(config: Config) -> Iterator[SettingProblem]:
    """Yield the reasons why a run cannot continue with a different number of data-parallel replicas."""
    if config.ray.min_nodes < 1:
        return
    if config.parallel.data == "replicated" and not config.parallel.context_parallel_size:
        yield SettingProblem(
            "ray.min_nodes",
            "all ranks split one pack, so none can be left out; set parallel.context_parallel_size to the "
            "ranks of a replica.",
        )
    if config.checkpoint.every_steps < 0:
        yield SettingProblem(
            "ray.min_nodes", "the run continues from checkpoints; set checkpoint.every_steps to 0 or more."
        )
