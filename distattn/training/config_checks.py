"""Checks of a run file: one sentence for each key with an invalid value."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from distattn.ir.layout import LAYOUTS
from distattn.ir.plan import POLICIES
from distattn.kernels.registry import AUTO, KERNELS
from distattn.memory.checkpointing_modes import CHECKPOINTING
from distattn.parallel.make_plan import STRATEGIES
from distattn.training.config_idle_keys import idle_problems
from distattn.training.config_sections import Config, DataConfig, EngineConfig, HealthConfig, MemoryConfig, SlurmConfig

# the number of ranks is a multiple of each
_DEGREES = (
    "parallel.ranks",
    "parallel.context_parallel_size",
    "parallel.tensor_parallel_size",
    "parallel.pipeline_parallel_size",
)
# as in sbatch's manual: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on
_SLURM_TIME = r"\d+(:\d{2}){0,2}|\d+-\d+(:\d{2}){0,2}|UNLIMITED|INFINITE|infinite|unlimited"
_MOST, _MOST_STEPS = 1 << 40, 1_000_000
DTYPES = ("float32", "float64", "bfloat16")
DATA = ("replicated", "per_rank")
ENGINES = ("fsdp2", "deepspeed", "megatron")
CONTAINER_RUNTIMES = ("pyxis", "apptainer")
# values by their names in other programs
_MEANT = {
    "zero": "deepspeed",
    "zero2": "deepspeed",
    "zero3": "deepspeed",
    "fsdp": "fsdp2",
    "ddp": "fsdp2",
    "megatron-core": "megatron",
    "fp16": "bfloat16",
    "float16": "bfloat16",
    "half": "bfloat16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "fp64": "float64",
    "double": "float64",
    "cp": "ring",
    "all-gather": "allgather",
    "flash_attention_2": "flash",
    "sdpa": "auto",
    "selective": "save_attention",
}
SCHEDULES = ("constant", "cosine", "linear", "wsd")
# the launcher prints it for runs on this machine, the ranks print it on other machines
NO_GPU_FOR_MEGATRON = "engine.name: megatron needs GPUs, and this machine has none; use engine fsdp2 or deepspeed."


# keys that are compared with others: if one of those is wrong itself, only it is reported
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
    "parallel.tensor_parallel_size": ("parallel.ranks", "parallel.pipeline_parallel_size", "engine.name"),
    "ray.min_nodes": ("checkpoint.every_steps", "parallel.data", *_DEGREES),
    "slurm.container_mounts": ("slurm.container_image",),
    "train.decay_share": ("train.schedule",),
    "train.min_learning_rate": ("train.learning_rate", "train.schedule"),
    "train.warmup_steps": ("train.steps", "train.schedule", "train.decay_share"),
    "watch.action": ("checkpoint.every_steps",),
}


def problems_of(config: Config, named: Collection[str] = ()) -> list[str]:
    """Return a sentence for each mistake, without those that only follow from another mistake.

    named: the keys set on the command line.
    """
    checks = (
        # checks of single keys come first
        _name_problems(config),
        _number_problems(config),
        _engine_problems(config),
        _train_problems(config),
        _schedule_problems(config),
        _shape_problems(config),
        _megatron_problems(config),
        _slurm_problems(config.slurm),
        _health_problems(config.health),
        _elastic_problems(config),
        idle_problems(config, named),
    )
    problems: list[str] = []
    wrong: set[str] = set()
    for check in checks:
        by_key = [(problem.partition(":")[0], problem) for problem in check]
        problems += [problem for key, problem in by_key if not wrong & {key, *_COMPARED_WITH.get(key, ())}]
        wrong |= {key for key, _ in by_key}
    return problems


def _number_problems(config: Config) -> Iterator[str]:
    """Yield a problem for each number out of range, and for a folder without a name."""
    model, data, parallel, train = config.model, config.data, config.parallel, config.train
    minima = {
        "data.tokens_per_step": (data.tokens_per_step, 2),
        "data.max_document_tokens": (data.max_document_tokens, 16),
        "data.context_length": (data.context_length, 0),
        **{
            f"model.{name}": (value, 0 if name in ("vocab_size", "head_dim") else 1)
            for name, value in asdict(model).items()
            if isinstance(value, int)
        },
        "parallel.ranks": (parallel.ranks, 1),
        "parallel.min_chunk": (parallel.min_chunk, 0),
        "parallel.devices_per_node": (parallel.devices_per_node, 0),
        "parallel.max_buffer_bytes": (parallel.max_buffer_bytes, 0),
        "parallel.tensor_parallel_size": (parallel.tensor_parallel_size, 1),
        "parallel.pipeline_parallel_size": (parallel.pipeline_parallel_size, 1),
        "engine.shard_size": (config.engine.shard_size, 0),
        "engine.zero_stage": (config.engine.zero_stage, 0),
        "train.steps": (train.steps, 1),
        "train.learning_rate": (train.learning_rate, 0),
        "train.warmup_steps": (train.warmup_steps, 0),
        "train.min_learning_rate": (train.min_learning_rate, 0),
        "train.weight_decay": (train.weight_decay, 0),
        "train.beta1": (train.beta1, 0),
        "train.beta2": (train.beta2, 0),
        "train.z_loss": (train.z_loss, 0),
        "train.histogram_every": (train.histogram_every, 0),
        "checkpoint.every_steps": (config.checkpoint.every_steps, -1),
        "checkpoint.keep_last": (config.checkpoint.keep_last, 1),
        "checkpoint.keep_every_hours": (config.checkpoint.keep_every_hours, 0),
        "memory.loss_tile_tokens": (config.memory.loss_tile_tokens, 1),
        "memory.mlp_tile_tokens": (config.memory.mlp_tile_tokens, 0),
        "slurm.signal_seconds": (config.slurm.signal_seconds, 1),
        "slurm.max_requeues": (config.slurm.max_requeues, 0),
        "slurm.spare_nodes": (config.slurm.spare_nodes, 0),
        "ray.waiting_seconds": (config.ray.waiting_seconds, 0),
        "ray.min_nodes": (config.ray.min_nodes, 0),
        "ray.shrink_seconds": (config.ray.shrink_seconds, 0),
        "watch.spike_window": (config.watch.spike_window, 0),
        "watch.spike_threshold": (config.watch.spike_threshold, 0),
        "watch.replay_every": (config.watch.replay_every, 0),
        "watch.digest_every": (config.watch.digest_every, 0),
        "supervision.max_restarts": (config.supervision.max_restarts, 0),
        "supervision.patience_seconds": (config.supervision.patience_seconds, 1),
        "supervision.starting_seconds": (config.supervision.starting_seconds, 1),
        "health.every_steps": (config.health.every_steps, 0),
        "health.prometheus_port": (config.health.prometheus_port, 0),
        "evaluation.every_steps": (config.evaluation.every_steps, 0),
        "evaluation.steps": (config.evaluation.steps, 1),
        "reference_check.steps": (config.reference_check.steps, 0),
        "reference_check.tolerance": (config.reference_check.tolerance, 0),
    }
    # a plan of packs has a record for each step, and a run on text plans all of them when it begins
    maxima = {
        "train.steps": _MOST_STEPS,
        "train.beta1": 1,
        "train.beta2": 1,
        "engine.zero_stage": 3,
        "health.prometheus_port": 65_535,
        "slurm.signal_seconds": 65_535,
    }
    for key, (value, low) in minima.items():
        if value < low:
            yield f"{key}: at least {low}, not {value}."
        elif value > maxima.get(key, _MOST):
            yield f"{key}: at most {maxima.get(key, _MOST):,}, not {value}."
    for name in ("max_grad_norm", "epsilon"):
        if getattr(train, name) <= 0:
            yield f"train.{name}: above 0, not {getattr(train, name)}."
    for name in ("beta1", "beta2"):
        if getattr(train, name) == 1:
            yield f"train.{name}: below 1, not 1."
    if 0 < config.watch.spike_window < 8:
        yield f"watch.spike_window: 0, or at least 8 steps, not {config.watch.spike_window}."
    if not config.watch.spike_threshold:
        yield "watch.spike_threshold: above 0, not 0; watch.spike_window = 0 watches for NaN and infinity only."
    if not 0 < train.decay_share <= 1:
        yield f"train.decay_share: above 0 and at most 1, not {train.decay_share}."
    if not 0 <= config.run.seed < 1 << 63:
        yield f"run.seed: 0 to 2^63 - 1, not {config.run.seed}."
    if not Path(config.run.folder).name or "\0" in config.run.folder:
        yield f"run.folder: {config.run.folder!r} names no folder."


def _train_problems(config: Config) -> Iterator[str]:
    """Yield problems of the schedule and the watch with other settings."""
    train = config.train
    if config.watch.action == "rollback" and config.checkpoint.every_steps < 1:
        yield "watch.action: rollback goes back to the newest checkpoint; set checkpoint.every_steps."
    if train.warmup_steps > train.steps:
        yield f"train.warmup_steps: {train.warmup_steps} of {train.steps} steps; use at most that many."
    elif train.schedule == "wsd" and train.warmup_steps > train.steps - max(round(train.decay_share * train.steps), 1):
        yield f"train.warmup_steps: {train.warmup_steps} of {train.steps} steps reach into wsd's decay; use fewer."
    if train.min_learning_rate > train.learning_rate:
        yield f"train.min_learning_rate: {train.min_learning_rate} is above train.learning_rate, {train.learning_rate}."


def _shape_problems(config: Config) -> Iterator[str]:
    """Yield problems of sizes that do not fit together."""
    model, data, parallel = config.model, config.data, config.parallel
    size, model_parallel = (
        parallel.context_parallel_size,
        parallel.tensor_parallel_size * parallel.pipeline_parallel_size,
    )
    if min(model_parallel, parallel.ranks) < 1:
        return
    if parallel.ranks % model_parallel:
        yield f"parallel.tensor_parallel_size: with pipelines {model_parallel} ranks, which do not divide {parallel.ranks}."
    elif size < 0 or parallel.data_ranks % (size or 1):
        yield f"parallel.context_parallel_size: {size} does not divide {parallel.data_ranks} ranks."
    elif not data.path.endswith(".toml"):
        yield from _pack_problems(data, parallel.data_parallel_size)
    if not data.path.endswith(".toml") and 0 < model.vocab_size < 256:
        yield f"model.vocab_size: {model.vocab_size}, but tokens of text are bytes: at least 256, or 0."
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    if min(model.hidden_size, heads, kv_heads) >= 1:
        if not model.path and ((not model.head_dim and model.hidden_size % heads) or model.head_size % 2):
            yield f"model.num_attention_heads: hidden_size {model.hidden_size} does not give {heads} heads of an even size."
        if heads % kv_heads:
            yield f"model.num_key_value_heads: {heads} query heads do not divide among {kv_heads} key/value heads."
    if parallel.devices_per_node > 0 and parallel.ranks % parallel.devices_per_node:
        yield f"parallel.devices_per_node: {parallel.devices_per_node} does not divide {parallel.ranks} ranks."


def _pack_problems(data: DataConfig, shares: int) -> Iterator[str]:
    """Yield problems where packs of text do not fit the documents, the step or the data-parallel shares."""
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
            yield f"data.tokens_per_step: {step} is not a multiple of {key} {tokens}; {max(packs, 1) * tokens} is."
        elif packs % shares:
            smaller = f"{step // shares}, or " if step % shares == 0 else ""
            yield (
                f"{key}: a step has {packs} pack{'s' * (packs > 1)} of {tokens} tokens, which {shares} shares of the ranks "
                f"cannot share equally; use {smaller}data.tokens_per_step = {-(-packs // shares) * shares * tokens}."
            )
    longest = max(contexts.values())
    if data.max_document_tokens > longest:
        key = "context_schedule" if data.context_schedule else "context_length"
        yield (
            f"data.max_document_tokens: {data.max_document_tokens} tokens do not fit into a pack of {longest}; at most "
            f"data.{key if data.context_schedule or data.context_length else 'tokens_per_step'}."
        )


def _schedule_problems(config: Config) -> Iterator[str]:
    """Yield problems of phases of context lengths."""
    data, steps = config.data, config.train.steps
    if not data.context_schedule or data.path.endswith(".toml"):
        return
    if data.context_length:
        yield "data.context_length: data.context_schedule has the context length by step; leave one of them out."
    *first, last = data.context_schedule
    for number, phase in enumerate(data.context_schedule):
        if phase.context_length < 1:
            yield f"data.context_schedule.{number}.context_length: at least 1, not {phase.context_length}."
        if phase.steps < 0:
            yield f"data.context_schedule.{number}.steps: at least 0, not {phase.steps}."
    for number, phase in enumerate(first):
        if not phase.steps:
            yield f"data.context_schedule.{number}.steps: only the last phase may have 0; set this phase's number of steps."
    if last.steps and (planned := sum(phase.steps for phase in data.context_schedule)) < steps:
        yield (
            f"data.context_schedule.{len(first)}.steps: all phases have {planned} steps, and train.steps is {steps}; leave the "
            "last phase's steps out for all remaining ones."
        )


def _engine_problems(config: Config) -> Iterator[str]:
    """Yield problems of settings that the engine does not support."""
    engine, parallel, memory = config.engine, config.parallel, config.memory
    of_engines = {
        "parallel.tensor_parallel_size": (parallel.tensor_parallel_size, 1, ("megatron",)),
        "parallel.pipeline_parallel_size": (parallel.pipeline_parallel_size, 1, ("megatron",)),
        "parallel.latents": (parallel.latents, False, ("fsdp2", "deepspeed")),
        "engine.shard_size": (engine.shard_size, 0, ("fsdp2",)),
        "engine.zero_stage": (engine.zero_stage, EngineConfig().zero_stage, ("deepspeed",)),
        "engine.compile": (engine.compile, False, ("fsdp2",)),
        "train.z_loss": (config.train.z_loss, 0.0, ("fsdp2", "deepspeed")),
        "memory.loss_tile_tokens": (memory.loss_tile_tokens, MemoryConfig().loss_tile_tokens, ("fsdp2", "deepspeed")),
        "memory.mlp_tile_tokens": (memory.mlp_tile_tokens, 0, ("fsdp2",)),
        "memory.activation_checkpointing": (memory.activation_checkpointing, "none", ("fsdp2", "deepspeed")),
        "memory.offload": (memory.offload, False, ("fsdp2",)),
        "memory.state_on_host": (memory.state_on_host, False, ("fsdp2",)),
    }
    for key, (value, default, engines) in of_engines.items():
        if value != default and engine.name in ENGINES and engine.name not in engines:
            yield f"{key}: engine {engine.name} does not support it here; use it with {' and '.join(engines)}."
    yield from _precision_problems(config)
    if engine.shard_size < 0 or parallel.ranks % (engine.shard_size or 1):
        yield f"engine.shard_size: {engine.shard_size} does not divide {parallel.ranks} ranks."
    if memory.offload and memory.activation_checkpointing == "none":
        yield "memory.offload: needs memory.activation_checkpointing, since it moves the inputs of checkpointed layers."
    if engine.compile and memory.activation_checkpointing == "save_attention":
        yield "engine.compile: a compiled layer cannot choose what it saves; use activation_checkpointing full or none."
    if config.model.weights == "pretrained" and not config.model.path:
        yield "model.weights: pretrained weights come from a folder; name it in model.path."


def _precision_problems(config: Config) -> Iterator[str]:
    """Yield problems of precisions that an engine does not train in."""
    name, stage, dtype = config.engine.name, config.engine.zero_stage, config.model.dtype
    if dtype == "float64" and name in ("deepspeed", "megatron"):
        yield f"model.dtype: engine {name} does not train in float64; fsdp2 does."
    if dtype == "bfloat16" and name == "deepspeed" and stage == 0:
        yield "engine.zero_stage: with model.dtype = bfloat16 DeepSpeed sums gradients in float32 from stage 1 on; use 1 to 3."


def _megatron_problems(config: Config) -> Iterator[str]:
    """Yield problems of sizes that tensor- or pipeline-parallel ranks cannot divide."""
    model, parallel = config.model, config.parallel
    if config.engine.name != "megatron":
        return
    for key, size in {
        "num_key_value_heads": model.num_key_value_heads,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
    }.items():
        if size % max(parallel.tensor_parallel_size, 1):
            yield f"model.{key}: {size} do not divide among {parallel.tensor_parallel_size} tensor-parallel ranks."
    if model.num_layers % max(parallel.pipeline_parallel_size, 1):
        yield f"model.num_layers: {model.num_layers} do not divide among {parallel.pipeline_parallel_size} pipeline stages."


def _slurm_problems(slurm: SlurmConfig) -> Iterator[str]:
    """Yield problems of settings that sbatch would refuse or misread."""
    for name in ("partition", "account"):
        value = getattr(slurm, name)
        if value and not re.fullmatch(r"[^\s#-]\S*", value):
            yield f"slurm.{name}: {value!r} is not a Slurm name: one word, without spaces."
    if slurm.time and not re.fullmatch(_SLURM_TIME, slurm.time):
        yield f"slurm.time: {slurm.time!r} is not a time limit; write minutes, 12:00:00 or 2-00:00:00."
    if slurm.container_runtime not in CONTAINER_RUNTIMES:
        yield f"slurm.container_runtime: {slurm.container_runtime!r}; choose one of {', '.join(CONTAINER_RUNTIMES)}."
    for mount in slurm.container_mounts:
        if not re.fullmatch(r"/[^:,]*(:/[^:,]*){0,2}|/[^:,]*:/[^:,]*:r[ow]", mount):
            yield f"slurm.container_mounts: {mount!r} is not a mount; write /host/folder:/folder, or one of these with :ro."
    for option in slurm.options:
        if not re.fullmatch(r"--?[A-Za-z].*", option):
            yield f"slurm.options: {option!r} is not an option of sbatch; options begin with a dash, such as --qos=long."


def _health_problems(health: HealthConfig) -> Iterator[str]:
    """Yield a problem of an invalid address."""
    try:
        ipaddress.ip_address(health.prometheus_address)
    except ValueError:
        yield (
            f"health.prometheus_address: {health.prometheus_address!r} is not an IP address; write one of rank 0's machine, "
            "such as 127.0.0.1."
        )


def _elastic_problems(config: Config) -> Iterator[str]:
    """Yield the reasons why a run cannot go on with another number of data-parallel replicas."""
    if config.ray.min_nodes < 1:
        return
    if config.parallel.data == "replicated" and not config.parallel.context_parallel_size:
        yield (
            "ray.min_nodes: all ranks split one pack, so none can be left out; set parallel.context_parallel_size to the "
            "ranks of a replica."
        )
    if config.checkpoint.every_steps < 0:
        yield "ray.min_nodes: the run continues from checkpoints; set checkpoint.every_steps to 0 or more."


def _name_problems(config: Config) -> Iterator[str]:
    """Yield a problem for each unknown name."""
    model, parallel = config.model, config.parallel
    names: dict[str, tuple[str, Sequence[str]]] = {
        "model.dtype": (model.dtype, DTYPES),
        "model.weights": (model.weights, ("random", "pretrained")),
        "engine.name": (config.engine.name, ENGINES),
        "train.schedule": (config.train.schedule, SCHEDULES),
        "watch.action": (config.watch.action, ("skip", "stop", "rollback")),
        "preflight.action": (config.preflight.action, ("stop", "warn", "off", "only")),
        "memory.activation_checkpointing": (config.memory.activation_checkpointing, CHECKPOINTING),
        "parallel.comm_dtype": (parallel.comm_dtype or DTYPES[0], DTYPES),
        "parallel.strategy": (parallel.strategy, list(STRATEGIES)),
        "parallel.data": (parallel.data, DATA),
        "parallel.layout": (parallel.layout, list(LAYOUTS)),
        "parallel.kernel": (parallel.kernel, [AUTO, *KERNELS]),
        "parallel.backward": (parallel.backward or POLICIES[0], POLICIES),
    }
    for key, (value, choices) in names.items():
        if value not in choices:
            meant = [_MEANT[value.lower()]] if _MEANT.get(value.lower()) in choices else []
            near = meant or difflib.get_close_matches(value, choices, 1, 0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            yield f"{key}: there is no {value!r}; there are {', '.join(choices)}.{hint}"
