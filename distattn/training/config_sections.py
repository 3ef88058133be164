"""The sections of a run file: frozen dataclasses whose docstrings are the help of `distattn train --help`."""

from __future__ import annotations

from dataclasses import dataclass, field

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
class DataConfig:
    path: str = "{stdlib}/*.py"
    """A folder, a file or a glob of UTF-8 text files, whose bytes are tokens; {stdlib} is the Python standard library's source
    folder. Or the TOML file of a plan made by `distattn data pack`, to which the other keys of [data] do not apply."""
    suffix: str = ""
    """Only files that end so; empty for all."""
    exclude: tuple[str, ...] = ()
    """Names of folders and files to leave out; * and ? are wildcards."""
    tokens_per_step: int = 8192
    """Tokens (bytes) of one step, at most: documents are packed by best fit."""
    max_document_tokens: int = 2700
    """Longer files are cut into documents of this many tokens (bytes)."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama, in the terms of its transformers configuration."""

    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    intermediate_size: int = 384
    """Width of the gated feed-forward layer."""
    vocab_size: int = 0
    """Token ids are below it; 0 for what the data's tokenizer has."""
    dtype: str = "float32"
    """float32, float64 or bfloat16."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ParallelConfig:
    ranks: int = 4
    """Processes; they share each step's tokens."""
    strategy: str = "ring"
    """How attention is split: a name of distattn's strategies."""
    data: str = "replicated"
    """replicated: all ranks split one pack; per_rank: each rank, or block of ranks, has its own, and attention is shared."""
    context_parallel_size: int = 0
    """With data = "per_rank": neighbouring ranks that split one pack; 0 for one."""
    layout: str = "zigzag"
    """Which rank owns which tokens: a name of distattn's layouts."""
    min_chunk: int = 0
    """document_zigzag cuts documents into chunks of at least this many tokens; 0 for 512, or less where tokens are few."""
    kernel: str = "cpu"
    """What computes core attention on one device: cpu, reference, and on GPUs triton, triton_tf32 or gluon."""
    backward: str = ""
    """keep, refetch-home or refetch-follow; empty for the strategy's own."""
    devices_per_node: int = 0
    """Ranks that share a node, so that strategies can spare the links between nodes; 0 for all of them."""
    comm_dtype: str = ""
    """Dtype in which partial outputs and gradients travel: model.dtype, or empty for the one they are accumulated in."""
    max_buffer_bytes: int = 0
    """Bytes of attention buffers a rank may need at once; a batch that needs more is refused. 0 for no limit."""

    @property
    def data_parallel_size(self) -> int:
        """How many packs a step has: one that all ranks split, or one for each rank or block of ranks."""
        return 1 if self.data == "replicated" else self.ranks // (self.context_parallel_size or 1)

    @property
    def layout_options(self) -> dict[str, int]:
        """The arguments the layout takes beside lengths and ranks."""
        return {"min_chunk": self.min_chunk} if self.min_chunk else {}

    @property
    def cluster(self) -> Cluster | None:
        """How ranks are spread over nodes, None where that is not given."""
        return Cluster(self.ranks // self.devices_per_node, self.devices_per_node) if self.devices_per_node else None


@dataclass(frozen=True)
class ClusterConfig:
    description: str = ""
    """What the run is timed on by `distattn plan`: a name such as h200-8x8 (nodes x devices) or a TOML file."""


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


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 60
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""


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
    train: TrainConfig = field(default_factory=TrainConfig)
    reference_check: ReferenceCheckConfig = field(default_factory=ReferenceCheckConfig)


for _section in (
    RunConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ClusterConfig,
    SlurmConfig,
    TrainConfig,
    ReferenceCheckConfig,
):
    setattr(_section, "__pydantic_config__", _STRICT)  # noqa: B010
