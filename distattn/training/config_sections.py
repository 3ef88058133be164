"""The sections of a run file: frozen dataclasses whose docstrings are the help of `distattn train --help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

from pydantic import ConfigDict
from tyro.conf import UseAppendAction

from distattn.cluster.topology import Cluster

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class RunConfig:
    folder: str = "runs/run"
    """Where results go; a number is added if the folder exists, nothing is overwritten."""
    seed: int = 1
    """Seed of the initial weights and of the order of documents."""


@dataclass(frozen=True)
class ContextPhase:
    """Steps of one context length."""

    context_length: int
    """Tokens (bytes) of a pack in these steps."""
    steps: int = 0
    """How many; 0, of the last phase only, for all that are left."""


@dataclass(frozen=True)
class DataConfig:
    path: str = "{stdlib}/*.py"
    """A folder, a file or a glob of UTF-8 text files, whose bytes are tokens; {stdlib} is the Python standard library's source
    folder. Or the TOML file of a plan made by `distattn data pack`, to which of the other keys only check_tokens applies."""
    suffix: str = ""
    """Only files that end so; empty for all."""
    exclude: tuple[str, ...] = ()
    """Names of folders and files to leave out; * and ? are wildcards."""
    tokens_per_step: int = 8192
    """Tokens (bytes) of one step, at most: documents are packed by best fit."""
    max_document_tokens: int = 2700
    """Longer files are cut into documents of this many tokens (bytes)."""
    context_length: int = 0
    """Tokens (bytes) of a pack, of which a step has data.tokens_per_step / data.context_length; 0 for one pack a step."""
    context_schedule: tuple[ContextPhase, ...] = ()
    """Context lengths that change: tables [[data.context_schedule]] with steps and context_length, one after the other, in
    place of data.context_length. A step has data.tokens_per_step throughout. Only in files."""
    check_tokens: bool = True
    """Whether tokens are compared with their digests when they are first read, where there are digests."""

    @property
    def context_by_step(self) -> tuple[tuple[int, int], ...]:
        """((first step, tokens of a pack), ...) of a run on text."""
        if not self.context_schedule:
            return ((0, self.context_length or self.tokens_per_step),)
        begins = accumulate((phase.steps for phase in self.context_schedule), initial=0)
        return tuple((begin, phase.context_length) for begin, phase in zip(begins, self.context_schedule, strict=False))


@dataclass(frozen=True)
class ModelConfig:
    """A model of transformers: that of a folder, or a Llama of a shape, in the terms of its transformers configuration."""

    path: str = ""
    """A folder with a config.json, of any causal language model, here or beside the run file; the keys of the shape below do not
    apply then."""
    weights: str = "random"
    """random, seeded by run.seed; or pretrained: those of the safetensors files in model.path."""
    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 0
    """Width of one attention head; 0 for hidden_size / num_attention_heads."""
    intermediate_size: int = 384
    """Width of the gated feed-forward layer."""
    vocab_size: int = 0
    """Token ids are below it; 0 for what the data's tokenizer has."""
    dtype: str = "float32"
    """What is computed in: float32, float64 or bfloat16. With bfloat16 weights, gradients and the optimizer are float32."""

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ParallelConfig:
    ranks: int = 4
    """Processes. Those that are left after tensor and pipeline parallelism share each step's tokens."""
    strategy: str = "ring"
    """How attention is split: a name of distattn's strategies."""
    data: str = "replicated"
    """replicated: all ranks split one pack; per_rank: each rank, or block of ranks, has its own, and attention is shared."""
    context_parallel_size: int = 0
    """Neighbouring ranks that split one pack; 0 for all of them, or for one with data = "per_rank"."""
    tensor_parallel_size: int = 1
    """Ranks that split each layer's weights; engine megatron."""
    pipeline_parallel_size: int = 1
    """Stages that have some of the layers each; engine megatron."""
    layout: str = "zigzag"
    """Which rank owns which tokens: a name of distattn's layouts."""
    min_chunk: int = 0
    """document_zigzag cuts documents into chunks of at least this many tokens; 0 for 512, or less where tokens are few."""
    kernel: str = "cpu"
    """What computes core attention on one device: cpu or reference; on GPUs auto, flash, triton, triton_tf32 or gluon."""
    backward: str = ""
    """keep, refetch-home or refetch-follow; empty for the strategy's own."""
    devices_per_node: int = 0
    """Ranks that share a node, so that strategies can spare the links between nodes; 0 for all of them."""
    comm_dtype: str = ""
    """Dtype in which partial outputs and gradients travel: model.dtype, or empty for the one they are accumulated in."""
    max_buffer_bytes: int = 0
    """Bytes of attention buffers a rank may need at once; a batch that needs more is refused. 0 for no limit."""
    latents: bool = False
    """Whether latent attention (MLA) may move latents, expanded where they arrive, instead of keys and values of all heads."""

    @property
    def data_ranks(self) -> int:
        """Ranks that have tokens of their own: tensor- and pipeline-parallel ones work on the same."""
        return self.ranks // (self.tensor_parallel_size * self.pipeline_parallel_size)

    @property
    def split_ranks(self) -> int:
        """Ranks that split one pack."""
        return self.context_parallel_size or (self.data_ranks if self.data == "replicated" else 1)

    @property
    def attention_ranks(self) -> int:
        """Ranks that share attention: those that split a pack, or, with data = "per_rank", all that have tokens."""
        return self.split_ranks if self.data == "replicated" else self.data_ranks

    @property
    def data_parallel_size(self) -> int:
        """Into how many shares the packs of a step are dealt."""
        return self.data_ranks // self.split_ranks

    @property
    def layout_options(self) -> dict[str, int]:
        """The arguments the layout takes beside lengths and ranks."""
        return {"min_chunk": self.min_chunk} if self.min_chunk else {}

    @property
    def cluster(self) -> Cluster | None:
        """How the ranks that share attention are spread over nodes, None where that is not given, or where one holds them."""
        per_node = self.devices_per_node // self.tensor_parallel_size
        if not per_node or self.attention_ranks % per_node:
            return None
        return Cluster(self.attention_ranks // per_node, per_node)


@dataclass(frozen=True)
class ClusterConfig:
    description: str = ""
    """What plans are chosen by time on, and what `distattn plan` times the run on: a name such as h200-8x8, or a TOML file."""


@dataclass(frozen=True)
class SlurmConfig:
    """How `distattn launch slurm` submits; empty leaves a line out."""

    partition: str = ""
    account: str = ""
    time: str = ""
    """Limit of the job, as sbatch takes it: 12:00:00, or 2-00:00:00."""
    options: UseAppendAction[tuple[str, ...]] = ()
    """More lines for sbatch, such as --exclusive or --qos=long. On the command line --slurm.options=--exclusive adds one."""
    setup: UseAppendAction[tuple[str, ...]] = ()
    """Shell lines before the job begins, such as `module load cuda`. On the command line --slurm.setup="..." adds one."""
    signal_seconds: int = 120
    """So long before its time limit a job saves, ends with exit code 75 and is queued again; Slurm may say so a minute early."""
    max_requeues: int = 100
    """How often a job is queued again after its time limit, a preemption or a lost node; 0 for never."""
    spare_nodes: int = 0
    """Nodes of the job that wait for another to fail; `--spare` sets it."""
    container_image: str = ""
    """Ranks run in a container of this image; distattn must be in it, too. Empty for none."""
    container_mounts: UseAppendAction[tuple[str, ...]] = ()
    """More folders for the container, as /host/folder:/folder; the run folder is there by itself."""
    container_runtime: str = "pyxis"
    """pyxis (srun --container-image) or apptainer (apptainer exec)."""


@dataclass(frozen=True)
class RayConfig:
    """Where `distattn launch ray` finds nodes."""

    address: str = ""
    """HOST:PORT of a cluster, or local for a new one here; empty for RAY_ADDRESS or the one that this machine belongs to, and
    without any a new one here."""
    waiting_seconds: float = 600.0
    """So long at most it is waited for nodes with room, also where one was lost and another is to be added."""
    min_nodes: int = 0
    """The fewest nodes the run may go on with, each number with fewer or more data-parallel replicas; 0 for no other number."""
    shrink_seconds: float = 30.0
    """It is waited so long for as many nodes as before; then for fewer (ray.min_nodes), or those are taken that failed before.
    While the cluster has as many, and somebody uses them, it is a minute at least, or half of ray.waiting_seconds."""


@dataclass(frozen=True)
class EngineConfig:
    """What holds the model over the ranks."""

    name: str = "fsdp2"
    """fsdp2 (PyTorch's own), deepspeed or megatron."""
    shard_size: int = 0
    """fsdp2: neighbouring ranks that parameters are sharded over, while groups of them hold copies; 0 for all ranks."""
    zero_stage: int = 2
    """deepspeed: 0 to 3."""
    compile: bool = False
    """fsdp2: compile each layer by torch.compile."""


@dataclass(frozen=True)
class TrainConfig:
    """AdamW, its schedule, and what is logged."""

    steps: int = 60
    learning_rate: float = 3e-3
    """The highest one of the schedule."""
    schedule: str = "constant"
    """After the warm-up: constant, cosine, linear, or wsd (stable, then a linear decay)."""
    warmup_steps: int = 0
    """The learning rate rises linearly over so many steps."""
    min_learning_rate: float = 0.0
    """The learning rate at the end of cosine, linear and wsd."""
    decay_share: float = 0.1
    """wsd: the part of the steps, at their end, in which the learning rate decays."""
    weight_decay: float = 0.01
    """Of weight matrices; norms, biases and other vectors are left out."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's denominator, which keeps logits small."""
    histogram_every: int = 0
    """Weights and gradients are drawn as histograms in TensorBoard every so many steps; 0 for never."""
    wandb: str = ""
    """A project of Weights & Biases to log to, beside the run folder."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and how long it is kept."""

    every_steps: int = 0
    """Save every so many steps, and at the end; 0 for at the end only, -1 for never."""
    keep_last: int = 3
    """The newest so many stay."""
    keep_every_hours: float = 0.0
    """One of each so many hours stays for good; 0 for none."""


@dataclass(frozen=True)
class MemoryConfig:
    """What is computed again or put aside, so that longer sequences fit."""

    loss_tile_tokens: int = 4096
    """Logits and loss are there for so many tokens at a time."""
    mlp_tile_tokens: int = 0
    """Feed-forward layers for so many tokens at a time; 0 for all at once."""
    activation_checkpointing: str = "none"
    """none; full, which keeps each layer's input only; save_attention, which keeps attention's outputs as well."""
    offload: bool = False
    """Whether the inputs of checkpointed layers wait in the host's memory."""
    state_on_host: bool = False
    """Whether weights, gradients and AdamW's averages are in the host's memory, and AdamW's step is taken there."""


@dataclass(frozen=True)
class WatchConfig:
    """What happens when numbers go wrong: NaN, infinity, or a loss or gradient norm far above the last ones."""

    action: str = "skip"
    """skip the step's update, stop the run, or rollback to the newest checkpoint, and skip the step if it is bad again."""
    spike_window: int = 128
    """So many last steps say what is usual; 0 watches for NaN and infinity only."""
    spike_threshold: float = 20.0
    """A spike is so many median absolute deviations above their median."""
    replay_every: int = 0
    """Every so many steps the first micro-batch is computed twice and compared bit by bit; 0 for never."""
    digest_every: int = 1
    """Weights and optimizer state are digested after every `digest_every` updates and before each save. The digests are compared
    before the next update: this finds bits that flip in memory. 0 for never."""


@dataclass(frozen=True)
class SupervisionConfig:
    """What happens where a rank is killed, or hangs: it is named, and all ranks go on from the newest checkpoint."""

    max_restarts: int = 3
    """So many times in a row without a further checkpoint, on Slurm inside a job; 0 ends the run at the first failure."""
    patience_seconds: float = 10.0
    """A rank hangs when no rank has done anything for so long, and for four times the longest pause of an earlier step."""
    starting_seconds: float = 300.0
    """The same until two steps are done: connecting, loading a checkpoint and compiling take their time."""


@dataclass(frozen=True)
class HealthConfig:
    """How fast ranks are, and what errors their GPUs count, in health.jsonl and TensorBoard."""

    every_steps: int = 50
    """Report every so many steps; 0 for never."""
    prometheus_file: str = ""
    """A file that each report replaces, in Prometheus' text format, such as a .prom of the node exporter's textfile collector."""
    prometheus_port: int = 0
    """Serve the same at http://ADDRESS:PORT/metrics to who knows the token in RUN/prometheus_token; 0 for no port."""
    prometheus_address: str = "127.0.0.1"
    """The address of rank 0's machine on which health.prometheus_port listens, and no other."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out documents."""

    every_steps: int = 0
    """Evaluate every so many steps, and at the end; 0 for never."""
    path: str = ""
    """The TOML file of a plan made by `distattn data pack`; empty for the steps of the run's own plan after those it trains."""
    steps: int = 8
    """So many steps of packs are evaluated."""


@dataclass(frozen=True)
class PreflightConfig:
    """What the ranks compare and measure before the first step."""

    action: str = "stop"
    """What follows where something is wrong: stop, or warn and train all the same; off leaves the preflight out. With only the
    run ends after it in any case, and its folder is RUN-preflight."""


@dataclass(frozen=True)
class ReferenceCheckConfig:
    steps: int = 5
    """First steps repeated in plain transformers, one process, one document at a time; 0 leaves the check out."""
    tolerance: float = 0.0
    """Largest relative difference of loss and gradient norm; 0 for what model.dtype allows (1e-8, 1e-4 or, bfloat16, 5e-2)."""


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


for _section in (
    RunConfig,
    ContextPhase,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ClusterConfig,
    SlurmConfig,
    RayConfig,
    EngineConfig,
    TrainConfig,
    CheckpointConfig,
    MemoryConfig,
    WatchConfig,
    SupervisionConfig,
    HealthConfig,
    EvaluationConfig,
    PreflightConfig,
    ReferenceCheckConfig,
):
    setattr(_section, "__pydantic_config__", _STRICT)  # noqa: B010
