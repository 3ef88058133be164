"""Every key of run files and every option of commands does something, or is refused where it does nothing."""

import ast
import dataclasses
from pathlib import Path

import pytest

from distattn.ir.errors import DistattnError
from distattn.launch import cli
from distattn.launch.command_line import CommandParser
from distattn.training import config as configuration
from distattn.training.config import Config

ROOT = Path(__file__).parents[2]
# files have these for all launchers; the command line of another launcher refuses them
OF_LAUNCHERS = ("slurm", "ray")
TEXT_KEYS = ("suffix", "exclude", "tokens_per_step", "max_document_tokens", "context_length")
# by key: another valid value and, after it, what must be set with it for it to do something; the value alone is refused
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
# tables, in files only
NOT_HERE = {"data.context_schedule"}
KEYS = [
    f"{section.name}.{field.name}"
    for section in dataclasses.fields(Config)
    for field in dataclasses.fields(section.default_factory)
]
# what else does nothing, and with which other value
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
]


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    file = tmp_path_factory.mktemp("run") / "run.toml"
    file.write_text("")
    return file


def words_of(*words: str) -> list[str]:
    return [word.replace("{model}", str(ROOT / "configs/models/llama-3-8b")) for word in words]


def another(key: str) -> list[str]:
    """Return another value of a key: that of the table, else one of its type."""
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
    value, *belongs_to = words_of(*another(key))
    arguments = [value if value.startswith("--") else f"--{key}={value}"]
    changed, without = (configuration.load(empty, [*words, *belongs_to]) for words in (arguments, []))
    assert value_of(changed, key) != value_of(without, key)
    if belongs_to:
        with pytest.raises(DistattnError, match="command line: "):
            configuration.load(empty, arguments)


@pytest.mark.parametrize(("key", "value", "others"), IDLE, ids=[f"{one[0]} {' '.join(one[2])}" for one in IDLE])
def test_a_key_that_does_nothing_is_refused_with_its_name(key, value, others, empty):
    others = words_of(*others)
    configuration.load(empty, others)
    with pytest.raises(DistattnError, match=key) as refused:
        configuration.load(empty, [*others, f"--{key}={value}"])
    assert str(refused.value).count("\n") == 0
    if key.startswith(("data.", "model.")):
        # as these are amounts, their default is refused, too
        default = value_of(Config(), key)
        shown = " ".join(default) if isinstance(default, tuple) else str(default)
        with pytest.raises(DistattnError, match=key):
            configuration.load(empty, [*others, f"--{key}", *([shown] if shown or key == "data.suffix" else [])])


def test_a_file_s_keys_that_the_command_line_makes_idle_are_left_out_with_a_line():
    said: list[str] = []
    tiny = ROOT / "configs" / "tiny.toml"
    config = configuration.load(tiny, ["--data.path=packs.toml", "--parallel.layout=zigzag"], said.append)
    assert config.data == dataclasses.replace(Config().data, path="packs.toml") and not config.parallel.min_chunk
    assert said == [
        f"{tiny}: left out, since the command line makes them useless: data.suffix, data.exclude, parallel.min_chunk."
    ]
    said.clear()
    assert configuration.load(tiny, words_of("--model.path={model}"), said.append).model.num_layers == 32
    assert len(said) == 1 and "model.num_layers" in said[0]


def test_every_key_is_read_outside_of_the_configuration():
    read = set()
    for folder in ("distattn", "launch"):
        for file in (ROOT / folder).rglob("*.py"):
            if file.name in ("config.py", "config_checks.py", "config_idle_keys.py"):
                continue
            nodes = ast.walk(ast.parse(file.read_text("utf-8")))
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    templates = "".join(
        file.read_text("utf-8") for file in (ROOT / "launch/slurm/templates").iterdir() if file.is_file()
    )
    unread = [key for key in KEYS if key.split(".")[1] not in read and key.split(".")[1] not in templates]
    assert not unread


@pytest.mark.parametrize(
    "command", [("train",), ("launch", "local"), ("launch", "folder"), ("preflight",)], ids=" ".join
)
@pytest.mark.parametrize("section", OF_LAUNCHERS)
def test_a_launcher_s_keys_are_refused_on_another_s_command_line(command, section, capsys, empty):
    key = {"slurm": "slurm.time", "ray": "ray.address"}[section]
    assert cli.main([*command, str(empty), f"--{key}", "60"]) == 2
    assert f"{key}: does nothing here; it belongs to distattn launch {section}." in capsys.readouterr().err


# what is given to a command before its options
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
    """A command has come to its options."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_read(command, monkeypatch):
    parsers = []

    def parse(self, *given):
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
                # getattr(given, name) for names of a tuple
                read |= {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
    options = {action.dest for action in parsers[0]._actions} - {"help"}
    assert options and options <= read


@pytest.mark.parametrize("option", ["--strategy=ring", "--html=x.html", "--perfetto=x.json"])
def test_plan_s_options_that_do_nothing_with_memory_are_refused(option, capsys):
    assert cli.main(["plan", "tiny", "--memory", option]) == 2
    assert "does nothing with --memory" in capsys.readouterr().err
