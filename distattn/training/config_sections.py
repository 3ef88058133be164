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
    """Folder of the results; a number is added if it exists, so nothing is overwritten."""
    seed: int = 1
    """Seed of the initial weights and of the order of documents."""


@dataclass(frozen=True)
class ContextPhase:
    """Steps of one context length."""

    context_length: int
    """Tokens (bytes) of a pack in these steps."""
    steps: int = 0
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
    tokens_per_step: int = 8192
    """Maximum tokens (bytes) of one step: documents are packed by best fit."""
    max_document_tokens: int = 2700
    """Longer files are cut into documents of this many tokens (bytes)."""
    context_length: int = 0
    """Tokens (bytes) of a pack, of which a step has data.tokens_per_step / data.context_length; 0 for one pack a step."""
    context_schedule: tuple[ContextPhase, ...] = ()
    """Context lengths that change: tables [[data.context_schedule]] with steps and context_length, one after the other,
    instead of data.context_length. A step always has data.tokens_per_step. Only in files."""
    check_tokens: bool = True
    """Compare tokens with their digests when they are first read, where there are digests."""

    @property
    def context_by_step(self) -> tuple[tuple[int, int], ...]:
        """((first step, tokens of a pack), ...) of a run on text."""
        if not self.context_schedule:
            return ((0, self.context_length or self.tokens_per_step),)
        begins = accumulate((phase.steps for phase in self.context_schedule), initial=0)
        return tuple((begin, phase.context_length) for begin, phase in zip(begins, self.context_schedule, strict=False))


@dataclass(frozen=True)
class ModelConfig:
    """A transformers model: that of a folder, or a Llama of the given shape, named as in its transformers
    configuration.
    """

    path: str = ""
    """A folder with a config.json of any causal language model, relative to here or to the run file; the shape keys
    below do not apply then."""
    weights: str = "random"
    """random, seeded by run.seed; or pretrained, from the safetensors files in model.path."""
    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 0
    """Width of one attention head; 0 for hidden_size / num_attention_heads."""
    intermediate_size: int = 384
    """Width of the gated feed-forward layer."""
    vocab_size: int = 0
    """Token ids are below it; 0 for the vocabulary of the data's tokenizer."""
    dtype: str = "float32"
    """Dtype of the computation: float32, float64 or bfloat16. With bfloat16, weights, gradients and the optimizer are
    float32."""

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ParallelConfig:
    ranks: int = 4
    """Number of processes. After tensor and pipeline parallelism, the remaining ranks share each step's tokens."""
    strategy: str = "ring"
    """How attention is split: a name of distattn's strategies."""
    data: str = "replicated"
    """replicated: all ranks split one pack; per_rank: each rank, or block of ranks, has its own, and attention is shared."""
    context_parallel_size: int = 0
    """Neighbouring ranks that split one pack; 0 for all of them, or for one with data = "per_rank"."""
    tensor_parallel_size: int = 1
    """Ranks that split each layer's weights; engine megatron."""
    pipeline_parallel_size: int = 1
    """Stages, each with a part of the layers; engine megatron."""
    layout: str = "zigzag"
    """Assignment of tokens to ranks: a name of distattn's layouts."""
    min_chunk: int = 0
    """document_zigzag cuts documents into chunks of at least this many tokens; 0 for 512, or fewer where tokens are
    few."""
    kernel: str = "cpu"
    """Core attention on one device: cpu or reference; on GPUs auto, flash, triton, triton_tf32 or gluon."""
    backward: str = ""
    """keep, refetch-home or refetch-follow; empty for the strategy's own."""
    devices_per_node: int = 0
    """Ranks that share a node, so that strategies can use links between nodes less; 0 for all of them."""
    comm_dtype: str = ""
    """Dtype of partial outputs and gradients in messages: model.dtype, or empty for the accumulation dtype."""
    max_buffer_bytes: int = 0
    """Maximum bytes of attention buffers on a rank at once; a batch that needs more is refused. 0 for no limit."""
    latents: bool = False
    """Let latent attention (MLA) send latents, expanded on arrival, instead of keys and values of all heads."""

    @property
    def data_ranks(self) -> int:
        """Ranks that have their own tokens: tensor- and pipeline-parallel ranks work on the same tokens."""
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
        """Number of shares into which the packs of a step are dealt."""
        return self.data_ranks // self.split_ranks

    @property
    def layout_options(self) -> dict[str, int]:
        """The layout's arguments besides lengths and ranks."""
        return {"min_chunk": self.min_chunk} if self.min_chunk else {}

    @property
    def cluster(self) -> Cluster | None:
        """The nodes of the ranks that share attention; None if not set, or if one node holds them."""
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

    partition: str = ""
    account: str = ""
    time: str = ""
    """Time limit of the job, in sbatch's format: 12:00:00, or 2-00:00:00."""
    options: UseAppendAction[tuple[str, ...]] = ()
    """More lines for sbatch, such as --exclusive or --qos=long. On the command line --slurm.options=--exclusive adds one."""
    setup: UseAppendAction[tuple[str, ...]] = ()
    """Shell lines before the job begins, such as `module load cuda`. On the command line --slurm.setup="..." adds one."""
    signal_seconds: int = 120
    """Seconds before its time limit at which a job saves, ends with exit code 75 and is requeued; Slurm may signal a
    minute early."""
    max_requeues: int = 100
    """Maximum number of times a job is requeued after its time limit, a preemption or a lost node; 0 for never."""
    spare_nodes: int = 0
    """Extra nodes of the job that replace failed ones; `--spare` sets it."""
    container_image: str = ""
    """Image of the container in which ranks run; distattn must be in it, too. Empty for no container."""
    container_mounts: UseAppendAction[tuple[str, ...]] = ()
    """More folders for the container, as /host/folder:/folder; the run folder is mounted automatically."""
    container_runtime: str = "pyxis"
    """pyxis (srun --container-image) or apptainer (apptainer exec)."""


@dataclass(frozen=True)
class RayConfig:
    """The cluster on which `distattn launch ray` finds nodes."""

    address: str = ""
    """HOST:PORT of a cluster, or local for a new one here; empty for RAY_ADDRESS, or the cluster of this machine, or
    else a new one here."""
    waiting_seconds: float = 600.0
    """Maximum seconds to wait for enough free nodes, at the start and after a node is lost."""
    min_nodes: int = 0
    """Minimum number of nodes with which the run may go on, each number with more or fewer data-parallel replicas; 0 to
    keep the number."""
    shrink_seconds: float = 30.0
    """Seconds to wait for as many nodes as before; then the run uses fewer (ray.min_nodes), or nodes that failed
    before. While other users hold enough nodes, the wait is at least a minute, or half of ray.waiting_seconds."""


@dataclass(frozen=True)
class EngineConfig:
    """The engine that holds the model on the ranks."""

    name: str = "fsdp2"
    """fsdp2 (PyTorch's own), deepspeed or megatron."""
    shard_size: int = 0
    """fsdp2: neighbouring ranks over which parameters are sharded, each such group with a copy of them; 0 for all
    ranks."""
    zero_stage: int = 2
    """deepspeed: 0 to 3."""
    compile: bool = False
    """fsdp2: compile each layer with torch.compile."""


@dataclass(frozen=True)
class TrainConfig:
    """AdamW, its schedule, and what is logged."""

    steps: int = 60
    learning_rate: float = 3e-3
    """The peak of the schedule."""
    schedule: str = "constant"
    """After the warm-up: constant, cosine, linear, or wsd (stable, then a linear decay)."""
    warmup_steps: int = 0
    """Number of steps over which the learning rate rises linearly."""
    min_learning_rate: float = 0.0
    """The learning rate at the end of cosine, linear and wsd."""
    decay_share: float = 0.1
    """wsd: the share of the steps, at their end, in which the learning rate decays."""
    weight_decay: float = 0.01
    """For weight matrices only, not for norms, biases and other vectors."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """Maximum norm of the gradients, which are scaled down to it."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's denominator, a loss that keeps logits small."""
    histogram_every: int = 0
    """Steps between histograms of weights and gradients in TensorBoard; 0 for never."""
    wandb: str = ""
    """A project of Weights & Biases to log to, in addition to the run folder."""


@dataclass(frozen=True)
class CheckpointConfig:
    """The checkpoints that are saved, and how long they are kept."""

    every_steps: int = 0
    """Steps between saves, with one more at the end; 0 for the end only, -1 for never."""
    keep_last: int = 3
    """Number of newest checkpoints that are kept."""
    keep_every_hours: float = 0.0
    """Hours of which one checkpoint each is kept for good; 0 for none."""


@dataclass(frozen=True)
class MemoryConfig:
    """Recomputation and offload, so that longer sequences fit."""

    loss_tile_tokens: int = 4096
    """Number of tokens for which logits and loss exist at a time."""
    mlp_tile_tokens: int = 0
    """Number of tokens that feed-forward layers compute at a time; 0 for all at once."""
    activation_checkpointing: str = "none"
    """none; full, which keeps only each layer's input; save_attention, which also keeps attention's outputs."""
    offload: bool = False
    """Keep the inputs of checkpointed layers in host memory until backward."""
    state_on_host: bool = False
    """Keep weights, gradients and AdamW's averages in host memory, and run AdamW's step there."""


@dataclass(frozen=True)
class WatchConfig:
    """Reaction to wrong numbers: NaN, infinity, or a loss or gradient norm far above the last ones."""

    action: str = "skip"
    """skip the step's update, stop the run, or rollback to the newest checkpoint, and skip the step if it is bad again."""
    spike_window: int = 128
    """Number of last steps whose losses and gradient norms define the usual range; 0 watches for NaN and infinity
    only."""
    spike_threshold: float = 20.0
    """Number of median absolute deviations above the median from which a value is a spike."""
    replay_every: int = 0
    """Steps between checks that compute the first micro-batch twice and compare all bits; 0 for never."""
    digest_every: int = 1
    """Weights and optimizer state are hashed after every `digest_every` updates and before each save, and compared
    before the next update: this detects bits that flip in memory. 0 for never."""


@dataclass(frozen=True)
class SupervisionConfig:
    """Reaction to a killed or hanging rank: it is named, and all ranks restart from the newest checkpoint."""

    max_restarts: int = 3
    """Maximum number of restarts in a row without a new checkpoint, on Slurm within one job; 0 ends the run at the
    first failure."""
    patience_seconds: float = 10.0
    """Seconds without progress on any rank after which a rank hangs; at least four times the longest pause of an
    earlier step."""
    starting_seconds: float = 300.0
    """The same limit until two steps are done, since connecting, loading a checkpoint and compiling take longer."""


@dataclass(frozen=True)
class HealthConfig:
    """Reports of the ranks' speeds and of GPU errors, in health.jsonl and TensorBoard."""

    every_steps: int = 50
    """Steps between reports; 0 for never."""
    prometheus_file: str = ""
    """A file that each report replaces, in Prometheus' text format, such as a .prom of the node exporter's textfile collector."""
    prometheus_port: int = 0
    """Serve the reports at http://ADDRESS:PORT/metrics, for requests with the token in RUN/prometheus_token; 0 for no
    port."""
    prometheus_address: str = "127.0.0.1"
    """The only address of rank 0's machine on which health.prometheus_port listens."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out documents."""

    every_steps: int = 0
    """Steps between evaluations, with one more at the end; 0 for never."""
    path: str = ""
    """The TOML file of a plan made by `distattn data pack`; empty for the steps of the run's own plan after the trained
    ones."""
    steps: int = 8
    """Number of steps whose packs are evaluated."""


@dataclass(frozen=True)
class PreflightConfig:
    """Comparisons and measurements of the ranks before the first step."""

    action: str = "stop"
    """Reaction to a problem: stop, or warn and train anyway; off skips the preflight. With only, the run always ends
    after the preflight, and its folder is RUN-preflight."""


@dataclass(frozen=True)
class ReferenceCheckConfig:
    steps: int = 5
    """Number of first steps repeated in plain transformers, in one process, one document at a time; 0 skips the
    check."""
    tolerance: float = 0.0
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
