"""Every key of run files and every command option has an effect, or is refused where it has none."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from planned_data import write_corpus
from read_keys import noted_keys

from distattn.ir.errors import DistattnError
from distattn.launch import cli
from distattn.launch.command_keys import READ_BY, refuse_keys_that_do_nothing
from distattn.launch.command_line import CommandParser
from distattn.launch.ranks.machine_limits import check_run_fits
from distattn.launch.start_run import start_run
from distattn.preflight import facts
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config
from distattn.training.run_memory import memory_of_config

ROOT = Path(__file__).parents[2]
TEXT_KEYS = ("suffix", "exclude", "tokens_per_step", "max_document_tokens", "context_length")
# for each key, a valid value other than the default, followed by the settings without which that value has no effect
# and is refused
OTHERS = {
    "data.path": ["x"],
    "data.suffix": [".md"],
    "data.exclude": ["a"],
    "data.tokens_per_step": ["4096"],
    "data.max_document_tokens": ["64"],
    "data.context_length": ["4096"],
    "model.weights": ["pretrained", "--model.path={model}"],
    "model.path": ["{model}"],
    "model.num_layers": ["8"],
    "model.hidden_size": ["256"],
    "model.num_attention_heads": ["16"],
    "model.num_key_value_heads": ["8"],
    "model.head_dim": ["32"],
    "model.vocab_size": ["512"],
    "model.dtype": ["bfloat16"],
    "parallel.strategy": ["usp"],
    "parallel.data": ["per_rank", "--data.context_length=2048", "--data.max_document_tokens=100"],
    "parallel.context_parallel_size": ["2", "--data.context_length=4096"],
    "parallel.tensor_parallel_size": ["2", "--engine.name=megatron"],
    "parallel.pipeline_parallel_size": ["2", "--engine.name=megatron"],
    "parallel.layout": ["contiguous"],
    "parallel.min_chunk": ["64", "--parallel.layout=document_zigzag"],
    "parallel.kernel": ["reference"],
    "parallel.backward": ["refetch-home"],
    "parallel.devices_per_node": ["2"],
    "parallel.comm_dtype": ["bfloat16"],
    "parallel.max_buffer_bytes": ["1000000000"],
    "parallel.latents": ["True", "--model.path={latent}"],
    "parallel.overlap": ["True", "--data.context_length=4096"],
    "engine.name": ["deepspeed"],
    "engine.shard_size": ["2"],
    "engine.zero_stage": ["3", "--engine.name=deepspeed"],
    "train.schedule": ["cosine"],
    "train.min_learning_rate": ["1e-5", "--train.schedule=cosine"],
    "train.decay_share": ["0.2", "--train.schedule=wsd"],
    "train.beta1": ["0.8"],
    "train.beta2": ["0.9"],
    "checkpoint.keep_last": ["2"],
    "memory.activation_checkpointing": ["full"],
    "memory.offload": ["True", "--memory.activation_checkpointing=full"],
    "watch.action": ["rollback", "--checkpoint.every_steps=5"],
    "health.prometheus_address": ["127.0.0.2", "--health.prometheus_port=9000"],
    "evaluation.path": ["held.toml", "--evaluation.every_steps=5"],
    "evaluation.steps": ["4", "--evaluation.every_steps=5"],
    "preflight.action": ["warn"],
    "reference_check.tolerance": ["1e-3"],
    "ray.min_nodes": ["1", "--parallel.context_parallel_size=2", "--data.context_length=4096"],
    "slurm.time": ["60"],
    "slurm.options": ["--slurm.options=--qos=long"],
    "slurm.container_mounts": ["/data", "--slurm.container_image=i"],
    "slurm.container_runtime": ["apptainer", "--slurm.container_image=i"],
}
# tables can only be set in files
NOT_HERE = {"data.context_schedule"}
KEYS = [
    f"{section.name}.{field.name}"
    for section in dataclasses.fields(Config)
    for field in dataclasses.fields(section.default_factory)
]
# (key, value, arguments with which the key has no effect)
IDLE = [
    ("checkpoint.keep_last", "2", ["--checkpoint.every_steps=-1"]),
    ("checkpoint.keep_every_hours", "2", ["--checkpoint.every_steps=-1"]),
    ("watch.spike_threshold", "9", ["--watch.spike_window=0"]),
    ("health.prometheus_file", "a.prom", ["--health.every_steps=0"]),
    ("health.prometheus_port", "9000", ["--health.every_steps=0"]),
    ("reference_check.tolerance", "1e-3", ["--reference_check.steps=0"]),
    *((f"data.{name}", OTHERS[f"data.{name}"][0], ["--data.path=packs.toml"]) for name in TEXT_KEYS),
    *((f"model.{name}", "24", ["--model.path={model}"]) for name in ("num_layers", "hidden_size", "intermediate_size")),
    ("train.decay_share", "0.2", ["--train.schedule=cosine"]),
    ("engine.shard_size", "2", ["--engine.name=deepspeed"]),
    ("engine.zero_stage", "3", []),
    ("engine.compile", "True", ["--engine.name=deepspeed"]),
    ("memory.mlp_tile_tokens", "64", ["--engine.name=deepspeed"]),
    ("memory.offload", "True", ["--engine.name=deepspeed", "--memory.activation_checkpointing=full"]),
    ("memory.state_on_host", "True", ["--engine.name=deepspeed"]),
    ("memory.loss_tile_tokens", "64", ["--engine.name=megatron"]),
    ("memory.activation_checkpointing", "full", ["--engine.name=megatron"]),
    ("train.z_loss", "0.1", ["--engine.name=megatron"]),
    ("parallel.latents", "True", ["--engine.name=megatron"]),
    ("parallel.overlap", "True", ["--engine.name=deepspeed", "--data.context_length=4096"]),
    ("parallel.latents", "True", []),
    ("parallel.latents", "True", ["--model.path={model}"]),
    *(
        (
            "parallel.layout",
            layout,
            ["--parallel.data=per_rank", "--data.context_length=2048", "--data.max_document_tokens=100"],
        )
        for layout in ("contiguous", "zigzag")
    ),
    (
        "parallel.layout",
        "contiguous",
        ["--parallel.context_parallel_size=1", "--data.context_length=2048", "--data.max_document_tokens=100"],
    ),
]


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    file = tmp_path_factory.mktemp("run") / "run.toml"
    file.write_text("")
    latent = file.parent / "latent"
    latent.mkdir()
    model_config = json.loads((ROOT / "configs/models/llama-3-8b/config.json").read_text())
    (latent / "config.json").write_text(json.dumps(model_config | {"kv_lora_rank": 16}))
    return file


def words_of(empty: Path, *texts: str) -> list[str]:
    folders = {"model": ROOT / "configs/models/llama-3-8b", "latent": empty.parent / "latent"}
    return [word.format(**folders) for word in texts]


def another(key: str) -> list[str]:
    """Return a different value for a key, from OTHERS or of the same type as its default."""
    if key in OTHERS:
        return OTHERS[key]
    section, name = key.split(".")
    value = getattr(getattr(Config(), section), name)
    return [str(not value) if isinstance(value, bool) else f"{value + 1:g}" if isinstance(value, (int, float)) else "x"]


def value_of(config: Config, key: str):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


@pytest.mark.parametrize("key", [key for key in KEYS if key not in NOT_HERE])
def test_a_key_changes_the_configuration_and_is_refused_without_what_it_belongs_to(key, empty):
    value, *belongs_to = words_of(empty, *another(key))
    key_arguments = [value if value.startswith("--") else f"--{key}={value}"]
    changed, without = (configuration.load(empty, [*arguments, *belongs_to]) for arguments in (key_arguments, []))
    assert value_of(changed, key) != value_of(without, key)
    if belongs_to:
        with pytest.raises(DistattnError, match="command line: "):
            configuration.load(empty, key_arguments)


@pytest.mark.parametrize(("key", "value", "others"), IDLE, ids=[f"{case[0]} {' '.join(case[2])}" for case in IDLE])
def test_a_key_that_does_nothing_is_refused_with_its_name(key, value, others, empty):
    others = words_of(empty, *others)
    configuration.load(empty, others)
    with pytest.raises(DistattnError, match=key) as refused:
        configuration.load(empty, [*others, f"--{key}={value}"])
    assert str(refused.value).count("\n") == 0
    if key.startswith(("data.", "model.")):
        # even the default value is refused if it is given explicitly
        default = value_of(Config(), key)
        shown = " ".join(default) if isinstance(default, tuple) else str(default)
        with pytest.raises(DistattnError, match=key):
            configuration.load(empty, [*others, f"--{key}", *([shown] if shown or key == "data.suffix" else [])])


def test_a_file_s_keys_that_the_command_line_makes_idle_are_left_out_with_a_line(empty):
    lines: list[str] = []
    tiny = ROOT / "configs" / "tiny.toml"
    config = configuration.load(tiny, ["--data.path=packs.toml", "--parallel.layout=zigzag"], lines.append)
    assert config.data == dataclasses.replace(Config().data, path="packs.toml") and not config.parallel.min_chunk
    assert lines == [
        f"{tiny}: left out, since the command line makes them useless: data.suffix, data.exclude, parallel.min_chunk."
    ]
    lines.clear()
    per_rank = ["--parallel.data=per_rank", "--data.context_length=2048", "--data.max_document_tokens=100"]
    assert configuration.load(tiny, per_rank, lines.append).parallel.layout == Config().parallel.layout
    assert len(lines) == 1 and lines[0].endswith(": parallel.layout, parallel.min_chunk.")
    lines.clear()
    assert configuration.load(tiny, words_of(empty, "--model.path={model}"), lines.append).model.num_layers == 32
    assert len(lines) == 1 and "model.num_layers" in lines[0]


def test_every_key_is_read_outside_of_the_configuration():
    read = set()
    for folder in ("distattn", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            if file.parent.name == "config" and file.name in ("run_file.py", "checks.py", "idle_keys.py", "limits.py"):
                continue
            nodes = ast.walk(ast.parse(file.read_text("utf-8")))
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    templates = "".join(
        file.read_text("utf-8") for file in (ROOT / "launch/slurm/templates").iterdir() if file.is_file()
    )
    unread = [key for key in KEYS if key.split(".")[1] not in read and key.split(".")[1] not in templates]
    assert not unread


@pytest.mark.parametrize("command", READ_BY)
def test_keys_that_a_command_does_not_read_are_refused_on_its_command_line(command, capsys, empty, tmp_path):
    (tmp_path / "config.toml").write_text("")
    name, *options = command.replace("--docs", "--docs=512").split(" --")
    arguments = [*name.split(), str(tmp_path if name == "resume" else empty), *(f"--{option}" for option in options)]
    for key in KEYS:
        if key in READ_BY[command]:
            refuse_keys_that_do_nothing(command, [f"--{key}=1"])
            continue
        assert cli.main([*arguments, f"--{key}=1"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"distattn: command line: {key}: has no effect ") and error.count("\n") == 1
        if key.startswith(("slurm.", "ray.")):
            assert f"it belongs to distattn launch {key.partition('.')[0]}." in error


# variants of the run, each of which reads different keys
VARIANTS = {
    "text": [],
    "own packs": ["--parallel.data=per_rank", "--parallel.strategy=cad", "--data.context_length=256"],
    "held out": ["--evaluation.every_steps=2", "--evaluation.steps=2", "--train.steps=4"],
    "planned": ["--data.path={planned}", "--train.steps=2"],
}
# keys that are read only when a configuration is loaded, only by other engines, only for corpora with masks, or only
# together with their entire section
UNNOTED = {
    "model.path",
    "engine.zero_stage",
    "reference_check.steps",
    *(key for key in KEYS if key.startswith("memory.")),
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Make a two-step plan over a corpus without a tokenizer's manifest."""
    folder = tmp_path_factory.mktemp("planned")
    write_corpus(folder, "web", [[300] * 16])
    (folder / "p.toml").write_text(
        'plan = "p.packs"\nsteps = 2\ncorpus = [{name = "web", files = ["web-0"]}]\n'
        "[rule]\ncontext = [[0, 512]]\ntokens_per_step = 1024\nwindow = 4\n"
    )
    assert cli.main(["data", "pack", str(folder / "p.toml")]) == 0
    return folder / "p.toml"


def small_run(empty, planned, variant: str) -> list[str]:
    """Return the arguments of a run with small packs and a single text file."""
    arguments = [word.replace("{planned}", str(planned)) for word in VARIANTS[variant]]
    if variant == "planned":
        return [*arguments, "--model.vocab_size=60000", "--reference_check.steps=0"]
    return [*arguments, f"--data.path={ast.__file__}", "--data.tokens_per_step=1024", "--data.max_document_tokens=256"]


def read_by_plan(empty, planned, *options: str) -> set[str]:
    with noted_keys() as read:
        for variant in VARIANTS if "--docs=512" not in options else ["text"]:
            run_arguments = [] if "--docs=512" in options else small_run(empty, planned, variant)
            arguments = ["plan", str(empty), *run_arguments, *options, "--cluster=laptop-1x4"]
            assert cli.main([*arguments, *([] if "--memory" in options else ["--strategy=ring"])]) == 0
    return read


@pytest.mark.parametrize("command", [name for name in READ_BY if name.startswith("plan")])
def test_plan_reads_the_keys_that_it_takes(command, empty, planned, capsys):
    options = ["--docs=512" if word == "--docs" else word for word in command.split()[1:]]
    read = read_by_plan(empty, planned, *options)
    # plan settings include the kernel, but the plans of all kernels are equal
    assert read - READ_BY[command] == {"parallel.kernel"}
    assert READ_BY[command] - read <= UNNOTED


def test_preflight_reads_the_keys_that_it_takes(empty, planned, tmp_path, monkeypatch):
    monkeypatch.setattr(facts.dist, "get_rank", lambda: 0)
    with noted_keys() as read:
        for number, variant in enumerate(VARIANTS):
            arguments = [*small_run(empty, planned, variant), f"--run.folder={tmp_path / str(number)}"]
            config = configuration.load(empty, arguments)
            check_run_fits(config)
            run = start_run(config, lambda line: None)
            assert not facts.collect_facts(run, config, torch.device("cpu")).failure
        memory_of_config(config, [[256, 256]])
    assert read <= READ_BY["preflight"]
    assert READ_BY["preflight"] - read <= UNNOTED | {"supervision.patience_seconds", "supervision.starting_seconds"}


# the arguments of each command before its options
COMMANDS = {
    "plan": ["--docs=512"],
    "launch local": ["tiny"],
    "launch status": ["run"],
    "launch logs": ["run"],
    "launch cancel": ["run"],
    "calibrate": ["--out=x"],
    "doctor": ["x"],
    "ckpt list": ["run"],
    "ckpt verify": ["run"],
    "ckpt export-hf": ["run", "x"],
    "ckpt import-hf": ["x", "y"],
    "data tokenize": ["x"],
    "data pack": ["x"],
    "data show": ["x"],
    "data stats": ["x"],
    "data verify": ["x"],
}


class _ParsedError(Exception):
    """Raised once a command has parsed its options."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_read(command, monkeypatch):
    parsers = []

    def parse(self, *args):
        parsers.append(self)
        raise _ParsedError

    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(CommandParser, name, parse)
    with pytest.raises(_ParsedError):
        cli.main([*command.split(), *COMMANDS[command]])
    read = set()
    for file in (ROOT / "launch").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                read.add(node.attr)
            elif isinstance(node, (ast.For, ast.GeneratorExp)):
                # handles getattr(given, name) for names in a tuple
                read |= {constant.value for constant in ast.walk(node) if isinstance(constant, ast.Constant)}
    options = {action.dest for action in parsers[0]._actions} - {"help"}
    assert options and options <= read


@pytest.mark.parametrize("option", ["--strategy=ring", "--html=x.html", "--perfetto=x.json"])
def test_plan_s_options_that_do_nothing_with_memory_are_refused(option, capsys):
    assert cli.main(["plan", "tiny", "--memory", option]) == 2
    assert "has no effect with --memory" in capsys.readouterr().err
