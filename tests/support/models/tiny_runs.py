"""Tiny training runs: their configuration, run file and folder, and a function that trains them on one rank."""

import os
from pathlib import Path
from typing import Any

import torch

from distattn.training.config.run_file import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ReferenceCheckConfig,
    RunConfig,
)
from distattn.training.loop import train
from distattn.training.run_data import find_text, write_text
from distattn.training.run_folder import RunFolder

_RUN_FILE = """
[run]
folder = "run"
[data]
path = "texts/*.txt"
tokens_per_step = 256
max_document_tokens = 100
[model]
num_layers = 1
hidden_size = 16
num_attention_heads = 2
num_key_value_heads = 2
intermediate_size = 16
[parallel]
ranks = 2
"""


def tiny_config(
    texts: Path, folder: Path, data: dict | None = None, model: dict | None = None, ranks: int = 2, **sections: Any
) -> Config:
    """Return the configuration of a run without a comparison. data, model: fields to change. sections: further
    sections.
    """
    text = dict(path=str(texts), tokens_per_step=256, max_document_tokens=100)
    shape = dict(num_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
    return Config(
        run=RunConfig(folder=str(folder), seed=3),
        data=DataConfig(**text | (data or {})),
        model=ModelConfig(**shape | (model or {})),
        parallel=ParallelConfig(ranks=ranks, layout="document_zigzag", min_chunk=16),
        reference_check=ReferenceCheckConfig(steps=0),
        **sections,
    )


def write_run_file(folder: Path, sections: str) -> None:
    """Write run.toml for a run on two ranks, and its text, to a folder. sections: text to append to the common
    sections.
    """
    (folder / "run.toml").write_text(_RUN_FILE + sections)
    (folder / "texts").mkdir()
    (folder / "texts" / "one.txt").write_text((Path(__file__).parents[3] / "LICENSE").read_text())


def new_run(config: Config) -> RunFolder:
    """Create a run's folder, including the run's text."""
    run = RunFolder.create(config)
    write_text(run, config, find_text(config))
    return run


def train_on_rank(rank: int, folder: Path, config: Config) -> None:
    """Train the run in `folder` on this rank, on the CPU."""
    # torchrun sets LOCAL_RANK, and DeepSpeed needs it
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    train(RunFolder(folder), config, True, torch.device("cpu"))
