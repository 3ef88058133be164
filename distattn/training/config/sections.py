"""The sections of a run file: frozen dataclasses whose docstrings are the help of `distattn train --help`.

The limits of a key are annotations of its field; `config.checks` has the checks that involve several keys.
"""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict
from tyro.conf import UseAppendAction

from distattn.cluster.topology import Cluster
from distattn.ir.limits import Check, Number, OneOf
from distattn.kernels.registry import AUTO, KERNELS
from distattn.memory.checkpointing_modes import CHECKPOINTING
from distattn.parallel.attention_config import AttentionKeys

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
DTYPES = ("float32", "float64", "bfloat16")
ENGINES = ("fsdp2", "deepspeed", "megatron")
SCHEDULES = ("constant", "cosine", "linear", "wsd")
# the formats in sbatch's manual: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on
_SLURM_TIME = r"\d+(:\d{2}){0,2}|\d+-\d+(:\d{2}){0,2}|UNLIMITED|INFINITE|infinite|unlimited"
# limited because a plan of packs has a record for each step, and a run on text plans all its steps when it starts
_MOST_STEPS = 1_000_000


def _folder_problem(folder: str) -> str | None:
    return f"{folder!r} names no folder." if not Path(folder).name or "\0" in folder else None


def _seed_problem(seed: int) -> str | None:
    return None if 0 <= seed < 1 << 63 else f"must be 0 to 2^63 - 1, not {seed}."


def _spike_window_problem(steps: int) -> str | None:
    return f"must be 0, or at least 8 steps, not {steps}." if 0 < steps < 8 else None


def _spike_threshold_problem(deviations: float) -> str | None:
    return None if deviations else "must be above 0, not 0; watch.spike_window = 0 watches for NaN and infinity only."


def _address_problem(address: str) -> str | None:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return f"{address!r} is not an IP address; write one of rank 0's machine, such as 127.0.0.1."
    return None


def _slurm_name_problem(name: str) -> str | None:
    return (
        f"{name!r} is not a Slurm name: one word, without spaces." if not re.fullmatch(r"([^\s#-]\S*)?", name) else None
    )


def _slurm_time_problem(limit: str) -> str | None:
    if not limit or re.fullmatch(_SLURM_TIME, limit):
        return None
    return f"{limit!r} is not a time limit; write minutes, 12:00:00 or 2-00:00:00."


def _slurm_options_problem(options: tuple[str, ...]) -> str | None:
    for option in options:
        if not re.fullmatch(r"--?[A-Za-z].*", option):
            return f"{option!r} is not an option of sbatch; options begin with a dash, such as --qos=long."
    return None


def _mounts_problem(mounts: tuple[str, ...]) -> str | None:
    for mount in mounts:
        if not re.fullmatch(r"/[^:,]*(:/[^:,]*){0,2}|/[^:,]*:/[^:,]*:r[ow]", mount):
            return f"{mount!r} is not a mount; write /host/folder:/folder, or one of these with :ro."
    return None


@dataclass(frozen=True)
class Engines:
    """The engines that support non-default values of a key."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class RunConfig:
    folder: Annotated[str, Check(_folder_problem)] = "runs/run"
    """Folder of the results; a number is added if it exists, so nothing is overwritten."""
    seed: Annotated[int, Check(_seed_problem)] = 1
    """Seed of the initial weights and of the order of documents."""


@dataclass(frozen=True)
class ContextPhase:
    """A phase of training with one context length."""

    context_length: Annotated[int, Number(ge=1)]
    """Tokens (bytes) of a pack in these steps."""
    steps: Annotated[int, Number(ge=0)] = 0
    """Number of steps; 0, in the last phase only, for all remaining ones."""


@dataclass(frozen=True)
class DataConfig:
    path: str = "{stdlib}/*.py"
    """A folder, a file or a glob of UTF-8 text files, whose bytes are tokens; {stdlib} is the Python standard library's source
    folder. Or the TOML file of a plan made by `distattn data pack`, to which of the other keys only check_tokens applies."""
    suffix: str = ""
    """Use only files whose names end in this; empty for all."""
    exclude: tuple[str, ...] = ()
    """Names of folders and files to leave out; * and ? are wildcards."""
    tokens_per_step: Annotated[int, Number(ge=2)] = 8192
    """Maximum tokens (bytes) of one step: documents are packed by best fit."""
    max_document_tokens: Annotated[int, Number(ge=16)] = 2700
    """Longer files are cut into documents of this many tokens (bytes)."""
    context_length: Annotated[int, Number(ge=0)] = 0
    """Tokens (bytes) of a pack, of which a step has data.tokens_per_step / data.context_length; 0 for one pack a step."""
    context_schedule: tuple[ContextPhase, ...] = ()
    """Context lengths that change: tables [[data.context_schedule]] with steps and context_length, one after the other,
    instead of data.context_length. A step always has data.tokens_per_step. Only in files."""
    check_tokens: bool = True
    """Compare tokens with their digests when they are first read, where there are digests."""

    @property
    def context_by_step(self) -> tuple[tuple[int, int], ...]:
        """((first step, tokens per pack), ...) of a run on text."""
        if not self.context_schedule:
            return ((0, self.context_length or self.tokens_per_step),)
        begins = accumulate((phase.steps for phase in self.context_schedule), initial=0)
        return tuple((begin, phase.context_length) for begin, phase in zip(begins, self.context_schedule, strict=False))


@dataclass(frozen=True)
class ModelConfig:
    """A transformers model: the one in a folder, or a Llama with the given shape, whose keys are named as in its
    transformers configuration.
    """

    path: str = ""
    """A folder with a config.json of any causal language model, relative to here or to the run file; the shape keys
    below do not apply then."""
    weights: Annotated[str, OneOf(("random", "pretrained"))] = "random"
    """random, seeded by run.seed; or pretrained, from the safetensors files in model.path."""
    num_layers: Annotated[int, Number(ge=1)] = 4
    hidden_size: Annotated[int, Number(ge=1)] = 128
    num_attention_heads: Annotated[int, Number(ge=1)] = 8
    num_key_value_heads: Annotated[int, Number(ge=1)] = 4
    head_dim: Annotated[int, Number(ge=0)] = 0
    """Width of one attention head; 0 for hidden_size / num_attention_heads."""
    intermediate_size: Annotated[int, Number(ge=1)] = 384
    """Width of the gated feed-forward layer."""
    vocab_size: Annotated[int, Number(ge=0)] = 0
    """Token ids are below it; 0 for the vocabulary of the data's tokenizer."""
    dtype: Annotated[str, OneOf(DTYPES)] = "float32"
    """Dtype of the computation: float32, float64 or bfloat16. With bfloat16, weights, gradients and the optimizer are
    float32."""

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ParallelConfig(AttentionKeys):
    ranks: Annotated[int, Number(ge=1)] = 4
    """Number of processes. After tensor and pipeline parallelism, the remaining ranks share each step's tokens."""
    context_parallel_size: int = 0
    """Neighbouring ranks that split one pack; 0 for all of them, or for one with data = "per_rank"."""
    tensor_parallel_size: Annotated[int, Number(ge=1), Engines(("megatron",))] = 1
    """Ranks that split each layer's weights; engine megatron."""
    pipeline_parallel_size: Annotated[int, Number(ge=1), Engines(("megatron",))] = 1
    """Stages, each with a part of the layers; engine megatron."""
    min_chunk: Annotated[int, Number(ge=0)] = 0
    """document_zigzag cuts documents into chunks of at least this many tokens; 0 for 512, or fewer where tokens are
    few."""
    kernel: Annotated[str, OneOf(KERNELS, (AUTO,))] = "cpu"
    """Core attention on one device: cpu or reference; on GPUs auto, flash, triton, triton_tf32 or gluon."""
    comm_dtype: Annotated[str | None, OneOf(DTYPES)] = None
    """Dtype of partial outputs and gradients in messages: the model's, or by default the accumulation dtype."""
    devices_per_node: Annotated[int, Number(ge=0)] = 0
    """Ranks that share a node, so that strategies can use links between nodes less; 0 for all of them."""
    latents: Annotated[bool, Engines(("fsdp2", "deepspeed"))] = False
    """Let latent attention (MLA) send latents, expanded on arrival, instead of keys and values of all heads."""
    overlap: Annotated[bool, Engines(("fsdp2",))] = False
    """Let pairs of micro-batches take turns, so that attention's messages of one travel while the other computes; engine
    fsdp2, and an even number of micro-batches a step."""

    def __post_init__(self) -> None:
        # run files may use "" and 0 for None, since TOML has no null
        for name in ("backward", "comm_dtype", "max_buffer_bytes"):
            if not getattr(self, name):
                object.__setattr__(self, name, None)

    @property
    def data_ranks(self) -> int:
        """Number of ranks with different tokens: tensor- and pipeline-parallel ranks work on the same tokens."""
        return self.ranks // (self.tensor_parallel_size * self.pipeline_parallel_size)

    @property
    def split_ranks(self) -> int:
        """Number of ranks that split one pack."""
        return self.context_parallel_size or (self.data_ranks if self.data == "replicated" else 1)

    @property
    def attention_ranks(self) -> int:
        """Number of ranks that share attention: those that split a pack or, with data = "per_rank", all data ranks."""
        return self.split_ranks if self.data == "replicated" else self.data_ranks

    @property
    def data_parallel_size(self) -> int:
        """Number of shares into which a step's packs are divided."""
        return self.data_ranks // self.split_ranks

    @property
    def layout_options(self) -> dict[str, int]:
        """The layout's arguments other than lengths and ranks."""
        return {"min_chunk": self.min_chunk} if self.min_chunk else {}

    @property
    def cluster(self) -> Cluster | None:
        """The nodes of the ranks that share attention; None if no node size is set, or if the ranks do not fill whole nodes."""
        per_node = self.devices_per_node // self.tensor_parallel_size
        if not per_node or self.attention_ranks % per_node:
            return None
        return Cluster(self.attention_ranks // per_node, per_node)


@dataclass(frozen=True)
class ClusterConfig:
    description: str = ""
    """The cluster on which plans are chosen by time and `distattn plan` times the run: a name such as h200-8x8, or a
    TOML file."""


@dataclass(frozen=True)
class SlurmConfig:
    """Settings of `distattn launch slurm`; an empty one leaves its line out."""

    partition: Annotated[str, Check(_slurm_name_problem)] = ""
    account: Annotated[str, Check(_slurm_name_problem)] = ""
    time: Annotated[str, Check(_slurm_time_problem)] = ""
    """Time limit of the job, in sbatch's format: 12:00:00, or 2-00:00:00."""
    options: Annotated[UseAppendAction[tuple[str, ...]], Check(_slurm_options_problem)] = ()
    """More lines for sbatch, such as --exclusive or --qos=long. On the command line --slurm.options=--exclusive adds one."""
    setup: UseAppendAction[tuple[str, ...]] = ()
    """Shell lines before the job begins, such as `module load cuda`. On the command line --slurm.setup="..." adds one."""
    signal_seconds: Annotated[int, Number(ge=1, le=65_535)] = 120
    """Seconds before its time limit at which a job saves, ends with exit code 75 and is requeued; Slurm may signal a
    minute early."""
    max_requeues: Annotated[int, Number(ge=0)] = 100
    """Maximum number of times a job is requeued after its time limit, a preemption or a lost node; 0 for never."""
    spare_nodes: Annotated[int, Number(ge=0)] = 0
    """Extra nodes of the job that replace failed ones; `--spare` sets it."""
    container_image: str = ""
    """Image of the container in which ranks run; distattn must be in it, too. Empty for no container."""
    container_mounts: Annotated[UseAppendAction[tuple[str, ...]], Check(_mounts_problem)] = ()
    """More folders for the container, as /host/folder:/folder; the run folder is mounted automatically."""
    container_runtime: Annotated[str, OneOf(("pyxis", "apptainer"))] = "pyxis"
    """pyxis (srun --container-image) or apptainer (apptainer exec)."""


@dataclass(frozen=True)
class RayConfig:
    """The cluster on which `distattn launch ray` finds nodes."""

    address: str = ""
    """HOST:PORT of a cluster, or local for a new one here; empty for RAY_ADDRESS, or the cluster of this machine, or
    else a new one here."""
    waiting_seconds: Annotated[float, Number(ge=0)] = 600.0
    """Maximum seconds to wait for enough free nodes, at the start and after a node is lost."""
    min_nodes: Annotated[int, Number(ge=0)] = 0
    """Minimum number of nodes with which the run may go on, each number with more or fewer data-parallel replicas; 0 to
    keep the number."""
    shrink_seconds: Annotated[float, Number(ge=0)] = 30.0
    """Seconds to wait for as many nodes as before; then the run uses fewer (ray.min_nodes), or nodes that failed
    before. While other users hold enough nodes, the wait is at least a minute, or half of ray.waiting_seconds."""


@dataclass(frozen=True)
class EngineConfig:
    """The engine that holds the model on the ranks."""

    name: Annotated[str, OneOf(ENGINES)] = "fsdp2"
    """fsdp2 (PyTorch's own), deepspeed or megatron."""
    shard_size: Annotated[int, Number(ge=0), Engines(("fsdp2",))] = 0
    """fsdp2: neighbouring ranks over which parameters are sharded, each such group with a copy of them; 0 for all
    ranks."""
    zero_stage: Annotated[int, Number(ge=0, le=3), Engines(("deepspeed",))] = 2
    """deepspeed: 0 to 3."""
    compile: Annotated[bool, Engines(("fsdp2",))] = False
    """fsdp2: compile each layer with torch.compile."""


@dataclass(frozen=True)
class TrainConfig:
    """AdamW, its schedule, and what is logged."""

    steps: Annotated[int, Number(ge=1, le=_MOST_STEPS)] = 60
    learning_rate: Annotated[float, Number(ge=0)] = 3e-3
    """The peak of the schedule."""
    schedule: Annotated[str, OneOf(SCHEDULES)] = "constant"
    """After the warm-up: constant, cosine, linear, or wsd (stable, then a linear decay)."""
    warmup_steps: Annotated[int, Number(ge=0)] = 0
    """Number of steps over which the learning rate rises linearly."""
    min_learning_rate: Annotated[float, Number(ge=0)] = 0.0
    """The learning rate at the end of cosine, linear and wsd."""
    decay_share: Annotated[float, Number(gt=0, le=1)] = 0.1
    """wsd: the share of the steps, at their end, in which the learning rate decays."""
    weight_decay: Annotated[float, Number(ge=0)] = 0.01
    """For weight matrices only, not for norms, biases and other vectors."""
    beta1: Annotated[float, Number(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Number(ge=0, lt=1)] = 0.95
    epsilon: Annotated[float, Number(gt=0, le=math.inf)] = 1e-8
    max_grad_norm: Annotated[float, Number(gt=0, le=math.inf)] = 1.0
    """Maximum norm of the gradients, which are scaled down to it."""
    z_loss: Annotated[float, Number(ge=0), Engines(("fsdp2", "deepspeed"))] = 0.0
    """Weight of the squared logarithm of the softmax's denominator, a loss that keeps logits small."""
    histogram_every: Annotated[int, Number(ge=0)] = 0
    """Steps between histograms of weights and gradients in TensorBoard; 0 for never."""
    wandb: str = ""
    """A project of Weights & Biases to log to, in addition to the run folder."""


@dataclass(frozen=True)
class CheckpointConfig:
    """The checkpoints that are saved, and how long they are kept."""

    every_steps: Annotated[int, Number(ge=-1)] = 0
    """Steps between saves, with one more at the end; 0 for the end only, -1 for never."""
    keep_last: Annotated[int, Number(ge=1)] = 3
    """Number of newest checkpoints that are kept."""
    keep_every_hours: Annotated[float, Number(ge=0)] = 0.0
    """Hours of which one checkpoint each is kept for good; 0 for none."""


@dataclass(frozen=True)
class MemoryConfig:
    """Recomputation and offload, so that longer sequences fit."""

    loss_tile_tokens: Annotated[int, Number(ge=1), Engines(("fsdp2", "deepspeed"))] = 4096
    """Number of tokens for which logits and loss exist at a time."""
    mlp_tile_tokens: Annotated[int, Number(ge=0), Engines(("fsdp2",))] = 0
    """Number of tokens that feed-forward layers compute at a time; 0 for all at once."""
    activation_checkpointing: Annotated[str, OneOf(CHECKPOINTING), Engines(("fsdp2", "deepspeed"))] = "none"
    """none; full, which keeps only each layer's input; save_attention, which also keeps attention's outputs."""
    offload: Annotated[bool, Engines(("fsdp2",))] = False
    """Keep the inputs of checkpointed layers in host memory until backward."""
    state_on_host: Annotated[bool, Engines(("fsdp2",))] = False
    """Keep weights, gradients and AdamW's averages in host memory, and run AdamW's step there."""


@dataclass(frozen=True)
class WatchKeys:
    """Reaction to wrong values: NaN, infinity, or a loss or gradient norm far above recent values."""

    action: Annotated[str, OneOf(("skip", "stop", "rollback"))] = "skip"
    """skip the step's update, stop the run, or rollback to the newest checkpoint, and skip the step if it is bad again."""
    spike_window: Annotated[int, Number(ge=0), Check(_spike_window_problem)] = 128
    """Number of last steps whose losses and gradient norms define the usual range; 0 watches for NaN and infinity
    only."""
    spike_threshold: Annotated[float, Number(ge=0), Check(_spike_threshold_problem)] = 20.0
    """Number of median absolute deviations above the median from which a value is a spike."""


@dataclass(frozen=True)
class WatchConfig(WatchKeys):
    """Reaction to wrong values, and checks that detect them."""

    replay_every: Annotated[int, Number(ge=0)] = 0
    """Steps between checks that compute the first micro-batch twice and compare all bits; 0 for never."""
    digest_every: Annotated[int, Number(ge=0)] = 1
    """Weights and optimizer state are hashed after every `digest_every` updates and before each save, and compared
    before the next update: this detects bits that flip in memory. 0 for never."""


@dataclass(frozen=True)
class SupervisionConfig:
    """Reaction to a killed or hanging rank: the rank is named, and all ranks restart from the newest checkpoint."""

    max_restarts: Annotated[int, Number(ge=0)] = 3
    """Maximum number of restarts in a row without a new checkpoint, on Slurm within one job; 0 ends the run at the
    first failure."""
    patience_seconds: Annotated[float, Number(ge=1)] = 10.0
    """Seconds without progress on any rank after which a rank hangs; at least four times the longest pause of an
    earlier step."""
    starting_seconds: Annotated[float, Number(ge=1)] = 300.0
    """The same limit until two steps are done, since connecting, loading a checkpoint and compiling take longer."""


@dataclass(frozen=True)
class HealthConfig:
    """Reports of the ranks' speeds and of GPU errors, in health.jsonl and TensorBoard."""

    every_steps: Annotated[int, Number(ge=0)] = 50
    """Steps between reports; 0 for never."""
    prometheus_file: str = ""
    """A file that each report replaces, in Prometheus' text format, such as a .prom of the node exporter's textfile collector."""
    prometheus_port: Annotated[int, Number(ge=0, le=65_535)] = 0
    """Serve the reports at http://ADDRESS:PORT/metrics, for requests with the token in RUN/prometheus_token; 0 for no
    port."""
    prometheus_address: Annotated[str, Check(_address_problem)] = "127.0.0.1"
    """The only address of rank 0's machine on which health.prometheus_port listens."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out documents."""

    every_steps: Annotated[int, Number(ge=0)] = 0
    """Steps between evaluations, with one more at the end; 0 for never."""
    path: str = ""
    """The TOML file of a plan made by `distattn data pack`; empty for the steps of the run's own plan after the trained
    ones."""
    steps: Annotated[int, Number(ge=1)] = 8
    """Number of steps whose packs are evaluated."""


@dataclass(frozen=True)
class PreflightConfig:
    """Comparisons and measurements of the ranks before the first step."""

    action: Annotated[str, OneOf(("stop", "warn", "off", "only"))] = "stop"
    """Reaction to a problem: stop, or warn and train anyway; off skips the preflight. With only, the run always ends
    after the preflight, and its folder is RUN-preflight."""


@dataclass(frozen=True)
class ReferenceCheckConfig:
    steps: Annotated[int, Number(ge=0)] = 5
    """Number of first steps repeated in plain transformers, in one process, one document at a time; 0 skips the
    check."""
    tolerance: Annotated[float, Number(ge=0)] = 0.0
    """Maximum relative difference of loss and gradient norm; 0 for the default of model.dtype (1e-8, 1e-4 or, for
    bfloat16, 5e-2)."""


@dataclass(frozen=True)
class Config:
    __pydantic_config__ = _STRICT

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    reference_check: ReferenceCheckConfig = field(default_factory=ReferenceCheckConfig)


for _section in (ContextPhase, *(_field.default_factory for _field in fields(Config))):
    setattr(_section, "__pydantic_config__", _STRICT)  # noqa: B010
