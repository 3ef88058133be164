"""What the README promises runs as written."""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

import distattn as da

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_named_file_exists():
    names = re.findall(r"`((?:distattn|parallel|kernels|launch|configs|benchmarks|tests)/[\w./]+\.\w+)`", README)
    assert len(names) > 6
    for name in [*names, "docs/score-matrix.png", "CONTRIBUTING.md", "LICENSE"]:
        assert (ROOT / name).is_file(), name


def test_the_first_example_runs_as_written(capsys):
    code = (
        re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
        .replace("ranks=8", "ranks=1")
        .replace("4096, 1024, 3072", "40, 10, 30")
    )
    names = dict(rank=0, group=None, q=torch.randn(80, 32, 128), k=torch.randn(80, 8, 128), v=torch.randn(80, 8, 128))
    exec(code, names)
    assert names["o"].shape == (80, 32, 128) and "ring on 1 ranks" in capsys.readouterr().out


def test_the_cluster_example_runs_as_written(capsys):
    lengths = [4096, 1024, 3072]
    names = dict(da=da, lengths=lengths, mask=da.Mask.documents(lengths))
    exec(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    text = capsys.readouterr().out
    assert "the least for these tasks" in text and "between nodes" in text


def test_the_trainer_example_runs_as_written():
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[2]
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    names = dict(
        da=da, F=F, AutoModelForCausalLM=AutoModelForCausalLM, config=config, group=None, sum_gradients=lambda: None
    )
    names |= dict(ids=torch.randint(0, 64, (1, 40)), lengths=[30, 10])
    exec(code, names)
    # an untrained model guesses among 64 tokens
    assert abs(float(names["loss"].detach()) - math.log(64)) < 0.5
