"""Configuration and command line: a mistake gives one sentence that names the key and exit code 2, never a traceback."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LIMIT_SECONDS

from distattn.data.files.text import check_text, find_corpus
from distattn.ir.errors import DistattnError
from distattn.launch.cli import main
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.toml")


def test_the_shipped_configurations_load_and_survive_saving(tmp_path):
    for file in (ROOT / "configs").glob("*.toml"):
        config = configuration.load(file)
        configuration.save(config, tmp_path / "saved.toml")
        assert configuration.load(tmp_path / "saved.toml") == config


def test_the_command_line_overrides_the_file():
    config = configuration.load(
        TINY, ["--parallel.strategy", "ulysses", "--train.learning-rate", "1e-4", "--data.exclude", "a", "b"]
    )
    assert (config.parallel.strategy, config.train.learning_rate, config.data.exclude) == ("ulysses", 1e-4, ("a", "b"))
    assert config.model == configuration.load(TINY).model


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("[parallel]\nstratgy = 'ring'", ["parallel.stratgy: unknown key. Did you mean parallel.strategy?"]),
        ("[paralel]\nranks = 2", ["paralel: unknown key. Did you mean parallel?"]),
        ("[parallel]\nranks = 'four'", ['parallel.ranks: "four" is not a whole number; give one such as 4.']),
        ("[parallel]\nranks = '4'", ['parallel.ranks: "4" is not a whole number; give one such as 4.']),
        ("[train]\nlearning_rate = nan", ["train.learning_rate: nan is not a finite number; give one such as 0.003."]),
        ("[train]\nlearning_rate = 'x'", ['train.learning_rate: "x" is not a number; give one such as 0.003.']),
        ("[train]\nsteps = 1.5", ["train.steps: 1.5 is not a whole number; give one such as 60."]),
        ("[slurm]\noptions = '-a'", ['slurm.options: "-a" is not a list; give one such as ["a", "b"].']),
        ("train = [1]", ["train: [1] is not a table; give one such as [train]."]),
        ("[data]\ncontext_schedule = 3", ["is not a list; give one such as [[data.context_schedule]]."]),
        ("[data]\ncontext_schedule = [3]", ["is not a table; give one such as [[data.context_schedule]]."]),
        ("[data]\ncontext_schedule = [{steps = 3}]", ["data.context_schedule.0.context_length: is missing."]),
        (
            "[train]\nsteps = 0\n[parallel]\nranks = 0",
            ["train.steps: at least 1, not 0", "parallel.ranks: at least 1, not 0"],
        ),
        ("[parallel]\nstrategy = 'rign'", ["usp, cad, cad_greedy. Did you mean ring?"]),
        ("[parallel]\ndevices_per_node = 3", ["parallel.devices_per_node: 3 does not divide 4 ranks."]),
        ("[parallel]\nmax_buffer_bytes = -1", ["parallel.max_buffer_bytes: at least 0, not -1"]),
        ("[parallel]\nlayout = 'spiral'", ["parallel.layout: there is no 'spiral'"]),
        ("[parallel]\nbackward = 'later'", ["parallel.backward: there is no 'later'"]),
        ("[model]\ndtype = 'int8'", ["model.dtype: there is no 'int8'"]),
        (
            "[model]\nnum_attention_heads = 3",
            ["model.num_attention_heads: hidden_size 128 does not give 3 heads", "3 query heads do not divide among 4"],
        ),
        (
            "[data]\ntokens_per_step = 100",
            ["data.max_document_tokens: 2700 tokens do not fit into a pack of 100; at most data.tokens_per_step."],
        ),
        (
            "[data]\ncontext_length = 3000",
            ["data.tokens_per_step: 8192 is not a multiple of data.context_length 3000; 6000 is."],
        ),
        (
            "[data]\ncontext_length = 2048",
            ["data.max_document_tokens: 2700 tokens do not fit into a pack of 2048; at most data.context_length."],
        ),
        (
            "[parallel]\ndata = 'per_rank'",
            [
                "data.context_length: a step has 1 pack of 8192 tokens, which 4 shares of the ranks cannot share equally; "
                "use 2048, or data.tokens_per_step = 32768."
            ],
        ),
        (
            "[data]\ncontext_length = 4096\n[parallel]\ndata = 'per_rank'\nranks = 3",
            [
                "data.context_length: a step has 2 packs of 4096 tokens, which 3 shares",
                "; use data.tokens_per_step = 12288.",
            ],
        ),
        ("[data]\ncontext_length = -1", ["data.context_length: at least 0, not -1"]),
        ("[data]\ncheck_tokens = 1", ["data.check_tokens: 1 is not true or false."]),
        ("[parallel]\ncomm_dtype = 'int8'", ["parallel.comm_dtype: there is no 'int8'"]),
        ("parallel = 3", ["parallel: "]),
        ("[run]\nfolder = 2020-01-01", ['run.folder: 2020-01-01 is not text in quotes; give one such as "runs/run".']),
        ("[run]\nseed = -1", ["run.seed: 0 to 2^63 - 1, not -1"]),
        ("[run]\nfolder = '/'", ["run.folder: '/' names no folder"]),
        ('[run]\nfolder = "a\\u0000b"', ["names no folder"]),
        (
            "[parallel]\nkernel = 'flush'",
            ["parallel.kernel: there is no 'flush'; there are auto, reference, cpu, flash, triton"],
        ),
        ("[parallel", ["cannot be read as TOML"]),
        (
            '[watch]\naction = "rollback"',
            ["watch.action: rollback goes back to the newest checkpoint; set checkpoint."],
        ),
        (
            '[engine]\nname = "deepspeed"\nshard_size = 2\n[parallel]\ntensor_parallel_size = 2',
            [
                "engine.shard_size: engine deepspeed does not support it",
                "parallel.tensor_parallel_size: engine deepspeed",
            ],
        ),
        (
            "[train]\nbeta1 = 1\n[watch]\nspike_window = 3",
            ["train.beta1: below 1", "watch.spike_window: 0, or at least 8"],
        ),
        ("[parallel]\nmin_chunk = 8", ["parallel.min_chunk: belongs to parallel.layout = "]),
        ("[train]\nsteps = 99999999999999999999", ["train.steps: at most 1,000,000, not 99999999999999999999"]),
        ("[data]\nmax_document_tokens = 1", ["data.max_document_tokens: at least 16, not 1"]),
        (
            "[slurm]\ntime = 'banana'\npartition = 'a b'\noptions = ['--qos=long', 'exclusive']",
            [
                "slurm.time: 'banana' is not a time",
                "slurm.partition: 'a b' is not a Slurm name",
                "slurm.options: 'exclusive' is not an option",
            ],
        ),
    ],
)
def test_every_mistake_is_named_at_once(text, sentences, tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(DistattnError) as refusal:
        configuration.load(file)
    for sentence in sentences:
        assert sentence in str(refusal.value)
    assert all(line.startswith(str(file)) for line in str(refusal.value).splitlines())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "[parallel]\nranks = 4\ntensor_parallel_size = 3",
            "parallel.tensor_parallel_size: engine fsdp2 does not support",
        ),
        (
            "[parallel]\ntensor_parallel_size = 3\npipeline_parallel_size = 3\n[engine]\nname = 'megatron'",
            "parallel.tensor_parallel_size: with pipelines 9 ranks",
        ),
        ("[train]\nsteps = 5\nwarmup_steps = 10\nschedule = 'wsd'", "train.warmup_steps: 10 of 5 steps; use at most"),
        ("[train]\nlearning_rate = -1.0", "train.learning_rate: at least 0"),
        ("[parallel]\ndata = 'per_rankk'", "parallel.data: there is no 'per_rankk'"),
        ("[engine]\nzero_stage = 7", "engine.zero_stage: at most 3"),
        ("[parallel]\npipeline_parallel_size = 0", "parallel.pipeline_parallel_size: at least 1, not 0."),
        ("[data]\ntokens_per_step = 1", "data.tokens_per_step: at least 2"),
        ("[model]\nhidden_size = 0", "model.hidden_size: at least 1, not 0."),
        (
            "[data]\ncontext_schedule = [{contxt_length = 4096}]",
            "unknown key. Did you mean data.context_schedule.context_length?",
        ),
    ],
)
def test_a_mistake_is_one_sentence_whatever_follows_from_it(text, sentence, tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(DistattnError) as refusal:
        configuration.load(file)
    assert sentence in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


def test_mistakes_name_the_line_of_the_file_and_overrides_the_command_line(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text("[train]\n# none\nsteps = 0\n\n[data]\nexclude = [\n 'a',\n 3]\n")
    with pytest.raises(DistattnError, match=f"^{file}:8: data.exclude.1: 3 is not text in quotes; "):
        configuration.load(file)
    file.write_text(file.read_text().replace("3]", "'b']\n[parallel]\nranks = 0\n[model]"))
    with pytest.raises(DistattnError) as refusal:
        configuration.load(file)
    lines = str(refusal.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"{file}:10", f"{file}:3"]
    file.write_text("[train]\nsteps 0\n")
    with pytest.raises(DistattnError, match=f"^{file}:2: cannot be read as TOML"):
        configuration.load(file)
    with pytest.raises(DistattnError, match=r"^command line: train.steps: at least 1, not 0\.$"):
        configuration.load(TINY, ["--train.steps", "0"])


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "distattn.launch.cli", *arguments]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, ""),
        (("fly",), 2, "there is no command 'fly'"),
        (("train",), 2, "train: CONFIG is missing: name a configuration, for example: distattn train tiny"),
        (("train", "nowhere.toml"), 2, "nowhere.toml: there is no such configuration file"),
        (
            ("train", TINY, "--parallel.stratgy", "ring"),
            2,
            "parallel.stratgy: unknown key. Did you mean parallel.strategy?",
        ),
        (
            ("train", TINY, "--parallel.ranks", "many"),
            2,
            'command line: parallel.ranks: "many" is not a whole number; give one such as 4.',
        ),
        (("train", TINY, "--parallel.ranks"), 2, "command line: --parallel.ranks needs a value."),
        (("train", TINY, "ring"), 2, "command line: 'ring' is not a key"),
        (
            ("train", TINY, "--train.learning-rate", "inf"),
            2,
            "command line: train.learning_rate: inf is not a finite number",
        ),
        (
            ("train", TINY, "--parallel.strategy", "ulysses", "--parallel.ranks", "16"),
            2,
            "ulysses splits 8 query heads over 16 ranks",
        ),
        (("train", TINY, "--data.path", "{folder}/nowhere"), 2, "data.path: there is no file or folder"),
        (("train", TINY, "--data.path", "{folder}/empty"), 2, "holds no files"),
        (
            ("train", TINY, "--data.path", "{folder}/latin", "--data.suffix", ""),
            3,
            "latin/a.txt: not UTF-8 text (byte 2)",
        ),
        (("train", TINY, "--run.folder", "/dev/null/x"), 2, "run.folder: /dev/null/x cannot be written"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_nothing_started(arguments, code, sentence, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "a.txt").write_bytes("grün".encode("latin1"))
    arguments = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
    if arguments[:1] == ["train"] and len(arguments) > 2 and "--run.folder" not in arguments:
        arguments += ["--run.folder", str(tmp_path / "run")]
    done = run(*arguments)
    assert done.returncode == code
    shown = done.stdout + done.stderr
    assert sentence in shown and "Traceback" not in shown
    # nothing but one sentence
    assert not done.stderr or (done.stderr.startswith("distattn: ") and done.stderr.count("\n") == 1)
    assert not (tmp_path / "run").exists()


def test_help_lists_commands_and_keys_without_importing_torch(capsys):
    assert main(["--help"]) == 0 and "train CONFIG" in capsys.readouterr().out
    code = (
        "import sys; from distattn.launch.cli import main; main(['train', '--help']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for section in dataclasses.fields(Config):
        for key in dataclasses.fields(section.default_factory):
            shown, name = done.stdout.replace("_", "-"), f"{section.name}.{key.name}".replace("_", "-")
            assert f"--{name}" in shown or f"[[{name}]]" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--train.engine fsdp", "train.engine: unknown key. Did you mean engine.name?"),
        ("--train.optimizer adam", "train.optimizer: unknown key. There are train.steps, train.learning_rate, "),
        ("--memory.checkpoint all", "memory.checkpoint: unknown key. Did you mean memory.activation_checkpointing?"),
        ("--train.strategy ring", "Did you mean parallel.strategy?"),
        ("--tran.steps 3", "Did you mean train.steps?"),
        ("--strategy ring", "Did you mean parallel.strategy?"),
        ("--steps 3", "Did you mean train.steps, evaluation.steps or reference_check.steps?"),
        ("--train.steps", "command line: --train.steps needs a value."),
        ("--train.steps=", "command line: --train.steps needs a value."),
        ("--train.steps 4096x", 'train.steps: "4096x" is not a whole number; give one such as 60.'),
        ("--train.learning_rate x", 'train.learning_rate: "x" is not a number; give one such as 0.003.'),
        ("--engine.compile maybe", 'engine.compile: "maybe" is not True or False.'),
        ("--run.folder a b", 'run.folder: "a b" is not one value; put quotes around one that has spaces.'),
    ],
)
def test_a_mistake_on_the_command_line_leads_to_what_was_meant(arguments, sentence):
    with pytest.raises(DistattnError) as refusal:
        configuration.load(TINY, arguments.split())
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("launch local tiny --gpu 2", "launch: '--gpu' is not known. Did you mean --gpus?"),
        ("launch local tiny --gpus x", "launch: --gpus: 'x' is not a whole number."),
        ("launch local tiny --gpus", "launch: --gpus needs a value."),
        ("plan tiny --layuot x", "plan: '--layuot' is not known. Did you mean --layout?"),
        ("train tiny --jsn", "train: '--jsn' is not known. Did you mean --json?"),
        ("resume runs/none --stp 3", "resume: '--stp' is not known. Did you mean --step?"),
        ("preflight", "for example: distattn preflight tiny"),
    ],
)
def test_a_misspelled_option_leads_to_the_one_that_was_meant(arguments, sentence, capsys):
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize("limit", ["30", "30:00", "12:00:00", "2-0", "2-00:30", "2-00:00:00", "UNLIMITED"])
def test_time_limits_have_the_format_of_sbatch(limit, tmp_path):
    file = tmp_path / "good.toml"
    file.write_text(f'[slurm]\ntime = "{limit}"\noptions = ["--exclusive"]\n')
    config = configuration.load(file, ["--slurm.options=--qos=long", "--slurm.options=--mem=0"])
    assert config.slurm.time == limit and config.slurm.options == ("--exclusive", "--qos=long", "--mem=0")


def test_an_empty_configuration_is_a_run(tmp_path):
    (tmp_path / "empty.toml").write_text("")
    config = configuration.load(tmp_path / "empty.toml")
    corpus = find_corpus(config.data.path, max_document_tokens=config.data.max_document_tokens)
    check_text(corpus)
    assert len(corpus.documents) > 100 and not corpus.binary_files


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("context_length", "1024"),
        ("tokens_per_step", "4096"),
        ("max_document_tokens", "100"),
        ("suffix", ".py"),
        ("exclude", "a"),
    ],
)
def test_keys_about_text_are_refused_with_a_plan_of_packs(key, value):
    packs, setting = ["--data.path", "packs.toml"], [f"--data.{key}", value]
    # the run file's keys for text apply only to its own text
    assert configuration.load("configs/tiny.toml", packs).data.path == "packs.toml"
    with pytest.raises(DistattnError, match=f"data.{key}: does nothing here"):
        configuration.load("configs/tiny.toml", [*packs, *setting])


@pytest.mark.parametrize(
    ("key", "value", "meant"), [("engine.name", "zero", "deepspeed"), ("model.dtype", "fp16", "bfloat16")]
)
def test_a_value_used_by_other_tools_suggests_ours(key, value, meant):
    with pytest.raises(DistattnError, match=f"Did you mean {meant}"):
        configuration.load("configs/tiny.toml", [f"--{key}", value])
