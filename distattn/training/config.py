"""One run, one TOML file: frozen dataclasses, checked all at once, overridable as `--section.key value`."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import tomli_w
import tyro
from pydantic import TypeAdapter, ValidationError

from distattn.ir.errors import DistattnError
from distattn.ir.toml_lines import Key, TomlLines, syntax_place
from distattn.training.config_checks import problems_of
from distattn.training.config_sections import Config as Config
from distattn.training.config_sections import DataConfig as DataConfig
from distattn.training.config_sections import ModelConfig as ModelConfig
from distattn.training.config_sections import ParallelConfig as ParallelConfig
from distattn.training.config_sections import ReferenceCheckConfig as ReferenceCheckConfig
from distattn.training.config_sections import RunConfig as RunConfig
from distattn.training.config_sections import TrainConfig as TrainConfig
from distattn.kernels.registry import AUTO, KERNELS
from distattn.parallel.make_plan import STRATEGIES
# as in sbatch's manual: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on
_SLURM_TIME = r"\d+(:\d{2}){0,2}|\d+-\d+(:\d{2}){0,2}|UNLIMITED|INFINITE|infinite|unlimited"
_MOST, _MOST_STEPS = 1 << 40, 1_000_000
DTYPES = ("float32", "float64", "bfloat16")
DATA = ("replicated", "per_rank")
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
    folder. Or the TOML file of a plan made by `distattn data pack`, to which of the other keys only check_tokens applies."""
    suffix: str = ""
    """Only files that end so; empty for all."""
    exclude: tuple[str, ...] = ()
    """Names of folders and files to leave out; * and ? are wildcards."""
    tokens_per_step: int = 8192
    """Tokens (bytes) of one step, at most: documents are packed by best fit."""
    context_length: int = 0
    """Tokens (bytes) of a pack, of which a step has data.tokens_per_step / data.context_length; 0 for one pack a step."""
    max_document_tokens: int = 2700
    """Longer files are cut into documents of this many tokens (bytes)."""
    check_tokens: bool = True
    """Whether tokens are compared with their digests when they are first read, where there are digests."""
    @property
    def pack_tokens(self) -> int:
        """Tokens of a pack of a run on text."""
        return self.context_length or self.tokens_per_step
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

# keys of earlier configurations, and what they are called now
RENAMED = {
    "data.axis": "data.tokens_per_step",
    "data.max_document": "data.max_document_tokens",
    "model.layers": "model.num_layers",
    "model.width": "model.hidden_size",
    "model.heads": "model.num_attention_heads",
    "model.kv_heads": "model.num_key_value_heads",
    "model.mlp": "model.intermediate_size",
    "parallel.capacity": "parallel.max_buffer_bytes",
    "parallel.wire": "parallel.comm_dtype",
    "train.clip": "train.max_grad_norm",
    "proof": "reference_check",
    "proof.steps": "reference_check.steps",
    "proof.tolerance": "reference_check.tolerance",
}

# keys of the shape, and what config.json calls them
_FOLDER_NAMES: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer"),
    "hidden_size": ("n_embd",),
    "num_attention_heads": ("n_head",),
    "num_key_value_heads": (),
    "head_dim": (),
    "intermediate_size": ("n_inner",),
    "vocab_size": (),
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration of a file, with command-line overrides. Raises DistattnError naming every bad key and its line."""
    try:
        text = Path(path).read_text("utf-8")
        content = tomllib.loads(text)
    except FileNotFoundError:
        raise DistattnError(f"{path}: there is no such configuration file; try configs/tiny.toml.") from None
    except tomllib.TOMLDecodeError as error:
        raise DistattnError(f"{syntax_place(path, error)}: cannot be read as TOML: {error}.") from None
    except (UnicodeDecodeError, OSError) as error:
        raise DistattnError(f"{path}: cannot be read as TOML: {error}.") from None
    lines = TomlLines(text)
    config = _validated(content, lambda key: lines.place(path, key))
    if overrides:
        _check_overrides(config, overrides)
        changed = tyro.cli(Config, default=config, args=list(overrides))
        named = any(re.match(r"--parallel\.min[_-]chunk(=|$)", word) for word in overrides)
        if not named and changed.parallel.layout != config.parallel.layout:
            # the file's belongs to the file's layout
            changed = replace(changed, parallel=replace(changed.parallel, min_chunk=0))
        config = _validated(asdict(changed), lambda _: "command line")
    return config


def help_text() -> str:
    """Return a text with every key and its default, as tyro prints it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(Config, args=["--help"], prog="distattn train CONFIG")
    return out.getvalue()


def save(config: Config, path: Path) -> None:
    """Write the resolved configuration; `load` reads it back."""
    path.write_text(tomli_w.dumps(asdict(config)), "utf-8")


def _validated(content: dict[str, Any], place: Callable[[Key], str]) -> Config:
    """Make the configuration a nested dict describes. place: where a key was given, such as a file and its line.

    Raises DistattnError with all mistakes, each on a line that begins with its place.
    """
    try:
        # through JSON: strict about types, yet a TOML array is a tuple; a TOML date becomes a table, which fits nowhere
        text = json.dumps(content, default=lambda value: {type(value).__name__: str(value)})
        config = TypeAdapter(Config).validate_json(text, strict=True)
        config = replace(config, model=_with_folder_s_shape(config.model))
        problems = problems_of(config)
    except ValidationError as error:
        problems = [_sentence(one) for one in error.errors()]
    if problems:
        # each begins with its key
        raise DistattnError("\n".join(f"{place(_key_of(problem))}: {problem}" for problem in problems))
    return config


def _key_of(problem: str) -> Key:
    """The key that a problem begins with; entries of lists are numbers."""
    return tuple(int(part) if part.isdecimal() else part for part in problem.partition(":")[0].split("."))


def _with_folder_s_shape(model: ModelConfig) -> ModelConfig:
    """The model of a folder: its shape is that of the config.json there. Raises DistattnError where that says too little."""
    if not model.path:
        return model
    file = Path(model.path, "config.json")
    try:
        said = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise DistattnError(f"model.path: there is no {file}; name a folder of a transformers model.") from None
    except (OSError, ValueError) as error:
        raise DistattnError(f"model.path: {file} cannot be read: {error}.") from None
    shape: dict[str, int] = {}
    for name, others in _FOLDER_NAMES.items():
        found = next((said[one] for one in (name, *others) if isinstance(said, dict) and said.get(one)), None)
        if isinstance(found, int):
            shape[name] = found
    if missing := [name for name in ("num_layers", "hidden_size", "num_attention_heads") if name not in shape]:
        raise DistattnError(f"model.path: {file} does not say {missing[0]} as configurations of language models do.")
    usual = {"num_key_value_heads": shape["num_attention_heads"], "intermediate_size": 4 * shape["hidden_size"]}
    filled: dict[str, Any] = usual | {"head_dim": 0} | shape
    return replace(model, **filled)


def _check_overrides(config: Config, overrides: Sequence[str]) -> None:
    """Refuse what tyro would refuse, in a sentence: unknown keys, stray words, values that do not fit."""
    starts = [i for i, word in enumerate(overrides) if word.startswith("--")]
    if not starts or starts[0] != 0:
        raise DistattnError(f"command line: {overrides[0]!r} is not a key; write --section.key value.")
    known = {key for key in _keys(Config) if "." in key}
    for begin, end in pairwise([*starts, len(overrides)]):
        key = overrides[begin].removeprefix("--").split("=", 1)[0].replace("-", "_")
        if key == "help":
            continue
        if key not in known:
            raise DistattnError(f"command line: {_unknown(key)}")
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            try:
                tyro.cli(Config, default=config, args=list(overrides[begin:end]))
            except SystemExit:
                section, name = key.split(".")
                wanted = get_type_hints(type(getattr(config, section)))[name]
                inline = overrides[begin].partition("=")[2]
                given = " ".join([*([inline] if inline else []), *overrides[begin + 1 : end]]) or "nothing"
                raise DistattnError(
                    f"command line: {key}: {given!r} is not {getattr(wanted, '__name__', wanted)}."
                ) from None


def _unknown(key: str) -> str:
    near = [RENAMED[key]] if key in RENAMED else difflib.get_close_matches(key, _keys(Config), 1, 0.6)
    return f"{key}: unknown key." + (f" Did you mean {near[0]}?" if near else f" There are {', '.join(_keys(Config))}.")


def _sentence(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _unknown(key)
    return f"{key}: {error['msg'].lower().rstrip('.')}, not {error['input']!r}."


def _keys(config: Any, prefix: str = "") -> list[str]:
    """List all sections and keys, dotted."""
    keys = []
    for one in fields(config):
        keys.append(prefix + one.name)
        if is_dataclass(factory := one.default_factory):
            keys += _keys(factory, f"{prefix}{one.name}.")
    return keys


def _problems(config: Config) -> list[str]:
    """Find what cannot be, one sentence per key."""
    return [
        *_number_problems(config),
        *_shape_problems(config),
        *_name_problems(config),
        *_slurm_problems(config.slurm),
    ]


def _number_problems(config: Config) -> Iterator[str]:
    """Find numbers that are out of range, and a folder that is none."""
    model, data, parallel, train = config.model, config.data, config.parallel, config.train
    least = {
        "data.tokens_per_step": (data.tokens_per_step, 2),
        "data.context_length": (data.context_length, 0),
        "data.max_document_tokens": (data.max_document_tokens, 16),
        **{f"model.{name}": (value, name != "vocab_size") for name, value in asdict(model).items() if name != "dtype"},
        "parallel.ranks": (parallel.ranks, 1),
        "parallel.min_chunk": (parallel.min_chunk, 0),
        "parallel.devices_per_node": (parallel.devices_per_node, 0),
        "parallel.max_buffer_bytes": (parallel.max_buffer_bytes, 0),
        "train.steps": (train.steps, 1),
        "train.learning_rate": (train.learning_rate, 0),
        "train.weight_decay": (train.weight_decay, 0),
        "reference_check.steps": (config.reference_check.steps, 0),
        "reference_check.tolerance": (config.reference_check.tolerance, 0),
    }
    # the packs of a run on text are planned when it begins
    most = {"train.steps": _MOST_STEPS}
    for key, (value, low) in least.items():
        if value < low:
            yield f"{key}: at least {low}, not {value}."
        elif value > most.get(key, _MOST):
            yield f"{key}: at most {most.get(key, _MOST):,}, not {value}."
    if train.max_grad_norm <= 0:
        yield f"train.max_grad_norm: above 0, not {train.max_grad_norm}."
    if not 0 <= config.run.seed < 1 << 63:
        yield f"run.seed: 0 to 2^63 - 1, not {config.run.seed}."
    if not Path(config.run.folder).name or "\0" in config.run.folder:
        yield f"run.folder: {config.run.folder!r} names no folder."


def _shape_problems(config: Config) -> Iterator[str]:
    """Find sizes that do not go together."""
    model, data, parallel = config.model, config.data, config.parallel
    size = parallel.context_parallel_size
    if parallel.data == "replicated" and size:
        yield 'parallel.context_parallel_size: belongs to parallel.data = "per_rank"; otherwise all ranks split a pack.'
    elif size < 0 or parallel.ranks % (size or 1):
        yield f"parallel.context_parallel_size: {size} does not divide {parallel.ranks} ranks."
    elif not data.path.endswith(".toml"):
        yield from _pack_problems(data, parallel.data_parallel_size)
    if not data.path.endswith(".toml") and 0 < model.vocab_size < 256:
        yield f"model.vocab_size: {model.vocab_size}, but tokens of text are bytes: at least 256, or 0."
    if parallel.min_chunk and parallel.layout != "document_zigzag":
        yield f'parallel.min_chunk: belongs to parallel.layout = "document_zigzag", not to {parallel.layout}.'
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    if min(model.hidden_size, heads, kv_heads) >= 1:
        if model.hidden_size % heads or model.head_dim % 2:
            yield f"model.num_attention_heads: hidden_size {model.hidden_size} does not give {heads} heads of an even size."
        if heads % kv_heads:
            yield f"model.num_key_value_heads: {heads} query heads do not divide among {kv_heads} key/value heads."
    if parallel.devices_per_node > 0 and parallel.ranks % parallel.devices_per_node:
        yield f"parallel.devices_per_node: {parallel.devices_per_node} does not divide {parallel.ranks} ranks."


def _pack_problems(data: DataConfig, shares: int) -> Iterator[str]:
    """Find packs of text that documents, or a step, or the data-parallel shares do not fit."""
    tokens, step = data.pack_tokens, data.tokens_per_step
    # what is negative was said already
    if tokens < 1 or shares < 1:
        return
    packs = step // tokens
    if step % tokens:
        yield f"data.tokens_per_step: {step} is no multiple of data.context_length {tokens}; {max(packs, 1) * tokens} is."
    elif packs % shares:
        smaller = f"{step // shares}, or " if step % shares == 0 else ""
        yield (
            f"data.context_length: a step has {packs} pack{'s' * (packs > 1)} of {tokens} tokens, which {shares} shares of the "
            f"ranks cannot have equally many of; use {smaller}data.tokens_per_step = {-(-packs // shares) * shares * tokens}."
        )
    if data.max_document_tokens > tokens:
        yield (
            f"data.max_document_tokens: {data.max_document_tokens} tokens do not fit into a pack of {tokens}; at most "
            f"data.{'context_length' if data.context_length else 'tokens_per_step'}."
        )


def _slurm_problems(slurm: SlurmConfig) -> Iterator[str]:
    """Find what sbatch would refuse, or read as something else."""
    for name in ("partition", "account"):
        value = getattr(slurm, name)
        if value and not re.fullmatch(r"[^\s#-]\S*", value):
            yield f"slurm.{name}: {value!r} is no name of Slurm's: one word, without spaces."
    if slurm.time and not re.fullmatch(_SLURM_TIME, slurm.time):
        yield f"slurm.time: {slurm.time!r} is no time limit; write minutes, 12:00:00 or 2-00:00:00."
    for option in slurm.options:
        if not re.fullmatch(r"--?[A-Za-z].*", option):
            yield f"slurm.options: {option!r} is no option of sbatch; it begins with a dash, such as --qos=long."


def _name_problems(config: Config) -> Iterator[str]:
    """Find names that do not exist."""
    model, parallel = config.model, config.parallel
    names: dict[str, tuple[str, Sequence[str]]] = {
        "model.dtype": (model.dtype, DTYPES),
        "parallel.comm_dtype": (parallel.comm_dtype or DTYPES[0], DTYPES),
        "parallel.strategy": (parallel.strategy, list(STRATEGIES)),
        "parallel.data": (parallel.data, DATA),
        "parallel.layout": (parallel.layout, list(LAYOUTS)),
        "parallel.kernel": (parallel.kernel, [AUTO, *KERNELS]),
        "parallel.backward": (parallel.backward or POLICIES[0], POLICIES),
    }
    for key, (value, known) in names.items():
        if value not in known:
            near = difflib.get_close_matches(value, known, 1, 0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            yield f"{key}: there is no {value!r}; there are {', '.join(known)}.{hint}"
